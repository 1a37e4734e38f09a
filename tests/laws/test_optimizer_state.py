"""Law 3: a grown or dropped position gets the optimizer's initial state, all others keep theirs to the bit."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import optimizer_list
import rarefy
from rarefy.axes import Channel
from recorder import Mover, Recorder, checkered, loss_of, net, nonzeros, recorded, same

PER_WEIGHT = {
    name: make
    for name, make in optimizer_list.IMPLEMENTATIONS.items()
    if not name.startswith(("Adafactor", "LBFGS", "Muon and", "SGD and"))
}


def states(optimizers: list[Optimizer], p: Tensor) -> dict[str, Any]:
    """What the optimizers keep for a parameter, copied."""
    return {name: copy.deepcopy(v) for optimizer in optimizers for name, v in optimizer.state.get(p, {}).items()}


def initial(make: optimizer_list.Make) -> dict[str, float]:
    """What torch itself has after the first step for a weight of zero with a gradient of zero, which moves no state but
    the exp_inf of Adamax (from 0 to eps)."""
    model = net(torch.float64)
    optimizers = make(model)
    for p in model.parameters():
        p.data.zero_()
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    weight = model[0].weight
    found = {name: v[0, 0].item() + 0.0 for name, v in states(optimizers, weight).items() if per_weight(v, weight)}
    return found | ({"exp_inf": 0.0} if "exp_inf" in found else {})


def per_weight(value: Any, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point()


def train(model: nn.Module, optimizers: list[Optimizer], begin: int, end: int) -> None:
    for step in range(begin, end):
        optimizer_list.update(optimizers, lambda step=step: loss_of(model, step, torch.float64))


@pytest.mark.parametrize("name", PER_WEIGHT)
def test_when_masks_move(name: str) -> None:
    model, still = net(torch.float64), net(torch.float64)
    optimizers, others = PER_WEIGHT[name](model), PER_WEIGHT[name](still)
    rarefy.sparsify(model, Mover(at=3), optimizer=optimizers)
    rarefy.sparsify(still, Mover(at=99), optimizer=others)
    train(model, optimizers, 0, 3)
    train(still, others, 0, 3)
    expected = initial(PER_WEIGHT[name])
    for p, q in zip(model.parameters(), still.parameters(), strict=True):
        moved = (
            checkered(p.shape) ^ checkered(p.shape, moved=1) if p.ndim == 2 else torch.zeros_like(p, dtype=torch.bool)
        )
        was, now = states(others, q), states(optimizers, p)
        assert was.keys() == now.keys()
        for key, value in now.items():
            if not per_weight(value, p):
                assert same(value, was[key]) if isinstance(value, Tensor) else value == was[key]
                continue
            assert same(value[~moved], was[key][~moved])
            assert same(value[moved], torch.full_like(value[moved], expected.get(key, 0.0)))
            if p.ndim == 2 and key not in {"max_exp_avg_sq"}:
                assert not same(was[key][moved], value[moved]) or key in {"prev"} or "SGD, " in name, key


def test_the_table_is_not_zero_everywhere() -> None:
    assert initial(optimizer_list.DEFAULT["Rprop"])["step_size"] == 0.02
    assert initial(optimizer_list.DEFAULT["Adagrad initial"])["sum"] == 0.25
    assert set(initial(optimizer_list.DEFAULT["Adam amsgrad"]).values()) == {0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Rprop", "Adagrad initial", "AdamW", "ASGD"])
def test_in_other_types(name: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizers = optimizer_list.DEFAULT[name](model)
    rarefy.sparsify(model, Mover(at=2), optimizer=optimizers)
    for step in range(2):
        optimizer_list.update(optimizers, lambda step=step: loss_of(model, step, dtype))
    weight = model[0].weight
    moved = checkered(weight.shape) ^ checkered(weight.shape, moved=1)
    fresh = torch.zeros_like(weight)
    for key, value in states(optimizers, weight).items():
        if per_weight(value, weight):
            start = {"step_size": 0.02, "sum": 0.25 if name == "Adagrad initial" else 0.0}.get(key, 0.0)
            assert same(value[moved], fresh.fill_(start).detach()[moved]), key


def test_the_average_of_asgd_follows_the_weight() -> None:
    """From t0 on it lags behind the weights; at a dropped position it is 0 as the weight is."""
    model = net(torch.float64)
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.1, t0=1.0)
    s = rarefy.sparsify(model, Mover(at=4), optimizer=optimizer)
    for step in range(8):
        train(model, [optimizer], step, step + 1)
        for site in s.sites:
            average = optimizer.state[site.parameter]["ax"]
            assert bool((average[~site.mask] == 0).all())
            if step > 4:
                assert not same(average[site.mask], site.parameter[site.mask])


@pytest.mark.parametrize("form", ["loop", "foreach"])
def test_factored_state_is_kept(form: str) -> None:
    model, still = net(torch.float64), net(torch.float64)
    optimizers = [torch.optim.Adafactor(m.parameters(), lr=0.05, foreach=form == "foreach") for m in (model, still)]
    rarefy.sparsify(model, Mover(at=3), optimizer=optimizers[0])
    rarefy.sparsify(still, Mover(at=99), optimizer=optimizers[1])
    for m, optimizer in zip((model, still), optimizers, strict=True):
        train(m, [optimizer], 0, 3)
    for p, q in zip(model.parameters(), still.parameters(), strict=True):
        now, was = optimizers[0].state[p], optimizers[1].state[q]
        assert all(same(now[key], was[key]) for key in now)
        assert p.ndim == 1 or {"row_var", "col_var"} <= now.keys()


def test_a_column_of_factored_state_is_not_taken_for_state_of_weights() -> None:
    """row_var of a 5×1 weight is 5×1 too."""
    model = nn.Sequential(nn.Linear(1, 6)).double()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.05)
    rarefy.sparsify(model, Mover(at=1), optimizer=optimizer)
    model(torch.ones(2, 1, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    grown = checkered((6, 1), moved=1)
    assert bool((optimizer.state[model[0].weight]["row_var"][grown] == 0).all())  # nothing was ever there
    assert bool((optimizer.state[model[0].weight]["row_var"][checkered((6, 1))] > 0).all())


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_the_history_of_lbfgs_is_cleared_when_masks_move(search: str | None) -> None:
    model = net(torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=3, line_search_fn=search)
    s = rarefy.sparsify(model, Mover(at=3), optimizer=optimizer)
    train(model, [optimizer], 0, 2)
    state = optimizer.state[next(model.parameters())]
    assert len(state["old_dirs"]) > 0
    train(model, [optimizer], 2, 3)
    assert set(state) <= {"func_evals", "n_iter"}
    assert state["n_iter"] == 0
    # It goes on as a fresh optimizer would.
    twin = copy.deepcopy(model)
    fresh = torch.optim.LBFGS(twin.parameters(), lr=0.3, max_iter=3, line_search_fn=search)
    recorded_masks = {n: m.clone() for n, m in s.masks.items()}
    train(model, [optimizer], 3, 4)
    literal(twin, fresh, recorded_masks, 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert same(p, q)


def literal(model: nn.Module, optimizer: Optimizer, masks: dict[str, Tensor], step: int) -> None:
    def touch() -> None:
        for n, p in model.named_parameters():
            if n in masks:
                p.grad.masked_fill_(~masks[n], 0)

    optimizer_list.update([optimizer], lambda: loss_of(model, step, torch.float64), touch)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_survives_masks_that_move_inside_its_first_evaluation(search: str | None) -> None:
    """RigL decides when gradients are final, which is in the middle of an LBFGS step; that step is then void."""
    model = net(torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=3, line_search_fn=search)
    method = rarefy.RigL(0.6, allocation="uniform", every=rarefy.Every(3, 1.0))
    s = rarefy.sparsify(model, method, optimizer=optimizer, steps=10)
    for step in range(10):
        before = copy.deepcopy(model)
        masks = s.masks
        train(model, [optimizer], step, step + 1)
        assert not nonzeros(s)
        if step in {3, 6}:
            assert any(not torch.equal(masks[name], s.masks[name]) for name in masks)
            for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
                assert same(p, q.masked_fill(~s.masks[name], 0) if name in masks else q)
    assert s.step == 10


# Under a zero gradient these do not stay as they began; a past is left as it is, since by it no weight moves.
DRIFTING = {"exp_inf", "step_size"}


# -- an optimizer with a past ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["attach", "load"])
@pytest.mark.parametrize("name", PER_WEIGHT)
def test_an_optimizer_with_a_past(name: str, how: str) -> None:
    """Trained dense, then attached; or its dense state loaded into one that is attached."""
    model = net(torch.float64)
    optimizers = PER_WEIGHT[name](model)
    train(model, optimizers, 0, 3)
    if how == "load":
        model.zero_grad()
        past = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
        optimizers = PER_WEIGHT[name](model)
        recorded(model, optimizers)
        for optimizer, state in zip(optimizers, past, strict=True):
            optimizer.load_state_dict(state)
            optimizer.step()  # nothing has a gradient
            trained = [p for p in model.parameters() if p.requires_grad]
        was = {p: past[0]["state"].get(i, {}) for i, p in enumerate(trained)}
    else:
        was = {p: states(optimizers, p) for p in model.parameters()}
        recorded(model, optimizers)
    expected = initial(PER_WEIGHT[name])
    for p in model.parameters():
        masked = ~checkered(p.shape) if p.ndim == 2 else torch.zeros_like(p, dtype=torch.bool)
        for key, value in states(optimizers, p).items():
            if per_weight(value, p) and key != "signs":
                assert same(value[~masked], was[p][key][~masked])
                start = torch.full_like(value[masked], expected.get(key, 0.0))
                assert same(value[masked], was[p][key][masked] if key in DRIFTING else start), key


@pytest.mark.parametrize("past", ["dense", "sparse"])
def test_lbfgs_keeps_its_history_unless_masked_positions_took_part(past: str) -> None:
    """Else a run that is resumed would not go on as the one that was not stopped."""
    model = net(torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=3)
    s = rarefy.sparsify(model, Recorder())
    if past == "sparse":
        recorded(model, optimizer)
    train(model, [optimizer], 0, 3)
    before = copy.deepcopy(optimizer.state_dict())
    twin = net(torch.float64)
    twin.load_state_dict(model.state_dict())
    later = torch.optim.LBFGS(twin.parameters(), lr=0.3, max_iter=3)
    later.load_state_dict(before)
    s, _ = recorded(twin, later, seed=1)
    state = later.state_dict()["state"][0]
    if past == "dense":
        assert "old_dirs" not in state
    else:
        assert all(same(a, b) for a, b in zip(state["old_dirs"], before["state"][0]["old_dirs"], strict=True))
        assert len(state["old_dirs"]) > 0
    train(twin, [later], 3, 5)
    assert not nonzeros(s)


# -- followers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "Rprop", "Adagrad initial", "ASGD", "Adafactor", "third party"])
def test_followers_have_their_state_set_back_too(name: str) -> None:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 4, 3)).double()

    def run(at: int) -> tuple[nn.Module, list[Optimizer]]:
        model = build()
        optimizers = optimizer_list.DEFAULT[name](model)
        s = rarefy.sparsify(model, Mover(at=at, pattern=Channel()), optimizer=optimizers, only="0")
        assert {f.name for f in s.sites[0].followers} == {"0.bias", "1.weight", "1.bias"}
        for step in range(3):
            inputs = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(step)).double()
            optimizer_list.update(optimizers, lambda inputs=inputs: model(inputs).square().mean())
            assert not nonzeros(s)
        return model, optimizers

    (model, optimizers), (still, others) = run(3), run(99)
    moved = checkered((6,)) ^ checkered((6,), moved=1)
    expected = {"step_size": 0.02, "sum": 0.25 if name == "Adagrad initial" else 0.0}
    for key in ("0.bias", "1.weight", "1.bias"):
        p, q = model.get_parameter(key), still.get_parameter(key)
        now, was = states(optimizers, p), states(others, q)
        for part, value in now.items():
            if per_weight(value, p):
                assert same(value[~moved], was[part][~moved])
                assert same(value[moved], torch.full_like(value[moved], expected.get(part, 0.0))), part


def test_a_follower_in_another_optimizer_has_its_own_state_set_back() -> None:
    model = net(torch.float64)
    pair = optimizer_list.muon_and_adamw(model)
    s = rarefy.sparsify(model, Mover(at=2, pattern=Channel()), optimizer=pair)
    train(model, pair, 0, 2)
    for site in s.sites:
        (follower,) = site.followers
        state = pair[1].state[follower.parameter]
        moved = checkered(follower.parameter.shape) ^ checkered(follower.parameter.shape, moved=1)
        assert bool((state["exp_avg"][moved] == 0).all())
        assert bool((state["exp_avg"][checkered(follower.parameter.shape) & ~moved] != 0).all())
