"""When a step counts, when it is void, when a step of several optimizers ends, and what the method is told of it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

import optimizer_list
import rarefy
from rarefy import Every, Sparsity
from rarefy.core.method import Method
from recorder import checkered, loss_of, net, nonzeros, recorded, same

F64 = torch.float64
WEIGHTS = ("0.weight", "2.weight")


def train(model: nn.Module, optimizers: list[Optimizer], begin: int, end: int) -> None:
    for step in range(begin, end):
        optimizer_list.update(optimizers, lambda step=step: loss_of(model, step, F64))


# -- counting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in optimizer_list.DEFAULT if n not in {"LBFGS", "LBFGS strong_wolfe"}])
def test_one_call_of_each_hook_per_step(name: str) -> None:
    model = net(F64)
    optimizers = optimizer_list.DEFAULT[name](model)
    s, log = recorded(model, optimizers, dense=3)
    train(model, optimizers, 0, 7)
    assert log.moved == [1, 2, 3, 4, 5, 6, 7]
    ready = [site.name for site in s.sites if site.parameter.requires_grad]
    for step in range(7):
        told = [told for told in log.told if told.step == step]
        assert [name for one in told for name in one.ready] == ready
        assert all(one.deciding for one in told)
    assert s.ledger.steps == 7
    assert s.ledger.dense_steps == [2, 5]


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.LBFGS])
@pytest.mark.parametrize("by", ["position", "name"])
def test_a_closure_is_followed_by_on_gradients_and_decides_once(kind: Any, by: str) -> None:
    model = net(F64)
    optimizer = kind(model.parameters(), lr=0.05)
    s, log = recorded(model, optimizer, dense=2)
    evaluations: list[int] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        evaluations.append(s.step)
        optimizer.zero_grad()
        loss = loss_of(model, 0, F64)
        loss.backward()
        return loss

    for _ in range(4):
        returned = optimizer.step(closure) if by == "position" else optimizer.step(closure=closure)
        assert isinstance(returned, Tensor)
        assert not nonzeros(s)
    assert log.moved == [1, 2, 3, 4]
    assert log.steps == evaluations
    for step in range(4):
        deciding = [told.deciding for told in log.told if told.step == step]
        assert deciding == [True] + [False] * (len(deciding) - 1)
    assert len(evaluations) == 4 if kind is not optim.LBFGS else len(evaluations) > 40


def test_a_closure_gives_what_the_plain_loop_gives() -> None:
    def run(closed: bool) -> tuple[nn.Module, dict[str, Tensor]]:
        model = net(F64)
        optimizer = optim.AdamW(model.parameters(), lr=0.05)
        method = rarefy.RigL(0.6, allocation="uniform", every=Every(2, 1.0))
        s = rarefy.sparsify(model, method, optimizer=optimizer, steps=10)
        for step in range(8):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, step, F64)
                loss.backward()
                return loss

            if closed:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        return model, s.masks

    (one, masks), (other, others) = run(True), run(False)
    assert all(same(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(masks[name], others[name]) for name in masks)


def test_a_step_before_any_gradient_counts() -> None:
    """As some do to keep learning rate schedulers quiet."""
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    s, log = recorded(model, optimizer)
    optimizer.step()
    assert (s.step, log.moved, log.told[0].gradients) == (1, [1], {})


def test_nothing_is_watched_after_detach() -> None:
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    s, log = recorded(model, optimizer, dense=1)
    s.detach()
    loss_of(model, 0).backward()
    assert all(bool(p.grad[~checkered(p.shape)].any()) for p in model.parameters() if p.ndim == 2)
    optimizer.step()
    assert (s.step, log.told) == (0, [])
    assert nonzeros(s)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    for p in model.parameters():
        assert not p._post_accumulate_grad_hooks
        assert not p._backward_hooks


# -- RigL's skipped step -----------------------------------------------------------------------------------------------

SKIPPING = [n for n in optimizer_list.IMPLEMENTATIONS if not n.startswith("LBFGS")]


@pytest.mark.parametrize("name", SKIPPING)
def test_a_skipped_step_leaves_weights_and_state_as_they_are(name: str) -> None:
    model = net(F64)
    optimizers = optimizer_list.IMPLEMENTATIONS[name](model)
    s, log = recorded(model, optimizers)
    log.act = lambda s: s.skip_optimizer_step() if s.step == 2 else None
    schedulers = [optim.lr_scheduler.StepLR(optimizer, 1, 0.9) for optimizer in optimizers]
    for step in range(5):
        before = copy.deepcopy(model.state_dict()), copy.deepcopy([o.state_dict() for o in optimizers])
        optimizer_list.update(optimizers, lambda step=step: loss_of(model, step, F64))
        gradients = [p.grad is not None for p in model.parameters() if p.requires_grad]
        assert all(gradients)  # they are back
        if step == 2:
            assert all(same(v, before[0][k]) for k, v in model.state_dict().items())
            for optimizer, was in zip(optimizers, before[1], strict=True):
                assert equal(optimizer.state_dict(), was)
        elif step > 0:
            assert not equal([o.state_dict() for o in optimizers], before[1]) or name.startswith("SGD")
        for scheduler in schedulers:
            scheduler.step()  # a warning would fail the test
    assert log.moved == [1, 2, 3, 4, 5]
    assert not nonzeros(s)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return same(a, b) if isinstance(a, Tensor) else a == b


def test_a_method_that_asks_to_skip_and_then_raises_skips_nothing() -> None:
    model = net(F64)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    _, log = recorded(model, optimizer)

    def act(s: Sparsity) -> None:
        s.skip_optimizer_step()
        raise ValueError("no")

    log.act = act
    loss_of(model, 0, F64).backward()
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="no"):
        optimizer.step()
    assert same(model[0].weight, before)
    log.act = None
    optimizer.step()
    assert not same(model[0].weight, before)
    assert log.moved == [1]


# -- gradient scalers --------------------------------------------------------------------------------------------------

SCALED: dict[str, optimizer_list.Make] = {
    "SGD": optimizer_list.one(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    # Without momentum: if its first step is void, torch leaves the buffer of fused SGD as malloc gave it.
    "SGD fused": optimizer_list.one(optim.SGD, lr=0.1, weight_decay=0.1, fused=True),
    "Adam foreach": optimizer_list.one(optim.Adam, lr=0.05, foreach=True),
    "Adam fused": optimizer_list.one(optim.Adam, lr=0.05, fused=True),
    "AdamW fused": optimizer_list.one(optim.AdamW, lr=0.05, weight_decay=0.1, amsgrad=True, fused=True),
    "Adagrad fused": optimizer_list.one(optim.Adagrad, lr=0.1, fused=True),
    "Adafactor": optimizer_list.one(optim.Adafactor, lr=0.05),
}
METHODS: dict[str, rarefy.Method] = {
    "Random": rarefy.Random(0.6, allocation="uniform"),
    "RigL": rarefy.RigL(0.6, allocation="uniform", every=Every(2, 1.0)),
    "ITOP": rarefy.ITOP(0.6, allocation="uniform", every=Every(3, 1.0)),
    "GraNet": rarefy.GraNet(0.6, every=Every(2, 1.0), schedule=rarefy.Cubic(initial=0.2, end=8, every=2)),
    "SRSTE": rarefy.SRSTE(pattern="1:2", decay=0.1),
    "TopKAST": rarefy.TopKAST(0.6, every=2, penalty=0.01),
}
VOID = {0, 3, 4, 7}  # iterations whose gradients overflow


def spoil_everything(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.mul_(float("inf"))


def spoil_a_bias(model: nn.Module) -> None:
    model[0].bias.grad[0] = float("inf")


def spoil_a_kept_weight(model: nn.Module) -> None:
    model[2].weight.grad.view(-1)[model[2].weight.detach().view(-1).nonzero()[0]] = float("nan")


SPOILS = [spoil_everything, spoil_a_bias, spoil_a_kept_weight]


def scaled_run(
    make: optimizer_list.Make,
    method: rarefy.Method,
    *,
    spoil: Callable[[nn.Module], None] | None,
    parts: int = 1,
    clip: bool = False,
) -> tuple[nn.Module, Sparsity, list[Optimizer]]:
    """`spoil`: under a scaler, with the iterations in VOID overflowing; None: without, and without these iterations."""
    model = net(F64)
    optimizers = make(model)
    s = rarefy.sparsify(model, method, optimizer=optimizers, steps=12)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2, enabled=spoil is not None)
    for iteration in range(12):
        if spoil is None and iteration in VOID:
            continue
        for optimizer in optimizers:
            optimizer.zero_grad()
        for part in range(parts):
            scaler.scale(loss_of(model, 10 * iteration + part, F64)).backward()
        if spoil is not None and iteration in VOID:
            spoil(model)
        if clip:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = s.step, s.masks, copy.deepcopy(model.state_dict())
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        if spoil is not None and iteration in VOID:
            assert s.step == before[0]
            assert all(torch.equal(before[1][n], s.masks[n]) for n in s.masks)
            assert all(same(before[2][k], v) for k, v in model.state_dict().items())
        else:
            assert s.step == before[0] + 1
        assert not nonzeros(s)
    return model, s, optimizers


@pytest.mark.parametrize(("parts", "clip"), [(1, False), (1, True), (2, True)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SCALED)
def test_a_scaled_run_is_the_run_without_its_void_steps(name: str, method: str, parts: int, clip: bool) -> None:
    """Scales are powers of two, so that nothing is rounded: equal to the bit."""
    plain, expected, _ = scaled_run(SCALED[name], METHODS[method], spoil=None, parts=parts, clip=clip)
    spoil = SPOILS[(len(name) + len(method)) % 3]
    model, s, _ = scaled_run(SCALED[name], METHODS[method], spoil=spoil, parts=parts, clip=clip)
    assert s.step == expected.step == 12 - len(VOID)
    assert all(torch.equal(s.masks[n], expected.masks[n]) for n in s.masks)
    assert s.ledger.dense_steps == expected.ledger.dense_steps
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12 if clip else 0, atol=0)


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", ["SGD", "SGD fused"])
def test_wherever_the_overflow_is(name: str, spoil: Callable[[nn.Module], None]) -> None:
    _, s, _ = scaled_run(SCALED[name], METHODS["RigL"], spoil=spoil)
    assert s.step == 12 - len(VOID)


@pytest.mark.parametrize("name", SCALED)
def test_gradients_are_unscaled_when_told(name: str) -> None:
    model = net(F64)
    optimizers = SCALED[name](model)
    _, log = recorded(model, optimizers, dense=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    for step in range(5):
        twin = net(F64)
        twin.load_state_dict(model.state_dict())
        loss_of(twin, step, F64).backward()
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(loss_of(model, step, F64)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for weight in WEIGHTS:
            expected = twin.get_parameter(weight).grad
            assert same(log.told[-1].gradients[weight] + 0.0, expected * checkered(expected.shape) + 0.0)
            if step % 2:
                assert same(log.told[-1].dense[weight] + 0.0, expected + 0.0)
    assert scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_at_masked_positions_alone(fused: bool) -> None:
    """It is cleared in an ordinary step; in a step that asks for the dense gradient it is one, and voids the step."""
    model = net(F64)
    optimizer = optim.SGD(model.parameters(), lr=0.1, fused=fused)
    s, log = recorded(model, optimizer, dense=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    poisoned = [True]
    model[0].weight.register_hook(
        lambda grad: grad.masked_fill(~checkered((8, 6)), float("inf")) if poisoned[0] else grad
    )
    for iteration, (poison, counts, scale) in enumerate(
        [(True, 1, 2**10), (True, 1, 2**9), (True, 1, 2**8), (False, 2, 2**8), (True, 3, 2**8), (True, 3, 2**7)]
    ):
        poisoned[0] = poison
        optimizer.zero_grad()
        scaler.scale(loss_of(model, iteration, F64)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (s.step, scaler.get_scale()) == (counts, scale)
        assert not nonzeros(s)
    assert log.moved == [1, 2, 3]


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_under_a_scaler(fused: bool) -> None:
    model = net(F64)
    optimizer = optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    s = rarefy.sparsify(model, METHODS["RigL"], optimizer=optimizer, steps=12)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    for step in range(5):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step, F64)).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if step in {2, 4}:
            for name, after in model.state_dict().items():
                assert same(after, before[name].masked_fill(~s.masks[name], 0) if name in s.masks else before[name])
    assert s.step == 5


# -- several optimizers ------------------------------------------------------------------------------------------------


def pair(fused: bool = False) -> tuple[nn.Module, list[Optimizer]]:
    model = net(F64)
    first = optim.SGD(model[0].parameters(), lr=0.1, momentum=0.0 if fused else 0.9, fused=fused)
    return model, [first, optim.Adam(model[2].parameters(), lr=0.05, fused=fused)]


def backward(model: nn.Module, optimizers: list[Optimizer], step: int, scaler: Any = None) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = loss_of(model, step, F64)
    (loss if scaler is None else scaler.scale(loss)).backward()


@pytest.mark.parametrize("orders", [((0, 1),), ((1, 0),), ((0, 1), (1, 0)), ((1, 0), (1, 0), (0, 1))])
def test_a_step_ends_when_the_last_has_stepped(orders: tuple[tuple[int, int], ...]) -> None:
    model, optimizers = pair()
    s, log = recorded(model, optimizers, dense=2)
    for step in range(6):
        backward(model, optimizers, step)
        for nth, index in enumerate(orders[step % len(orders)]):
            optimizers[index].step()
            assert s.step == step + (nth == 1)
        assert not nonzeros(s)
    assert log.moved == [1, 2, 3, 4, 5, 6]
    assert sorted((t.step, t.ready[0]) for t in log.told) == [(i, name) for i in range(6) for name in WEIGHTS]
    assert all(bool(t.dense[t.ready[0]].any()) for t in log.told if t.step % 2)


def test_a_pair_gives_what_one_optimizer_gives() -> None:
    def run(split: bool) -> tuple[nn.Module, dict[str, Tensor]]:
        model = net(F64)
        groups = [list(model[0].parameters()), list(model[2].parameters())]
        optimizers: list[Optimizer] = [optim.AdamW(g, lr=0.05) for g in (groups if split else [groups[0] + groups[1]])]
        s = rarefy.sparsify(model, METHODS["RigL"], optimizer=optimizers, steps=20)
        train(model, optimizers, 0, 12)
        assert s.step == 12
        return model, s.masks

    (one, masks), (other, others) = run(True), run(False)
    assert all(same(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(masks[name], others[name]) for name in masks)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("voided", [0, 1])
@pytest.mark.parametrize("dense", [1, 2, 3])
def test_one_of_two_is_voided(voided: int, order: tuple[int, int], fused: bool, dense: int) -> None:
    """Its turn comes again in the next iteration; the step is over when the other one begins its next, at the latest.

    Each site is told of every step once, and where the dense gradient was asked for it is the one of the last backward
    pass.
    """
    model, optimizers = pair(fused)
    s, log = recorded(model, optimizers, dense=dense)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=100)
    stepped = [0, 0]
    for iteration in range(9):
        backward(model, optimizers, iteration, scaler)
        whole = {}
        twin = net(F64)
        twin.load_state_dict(model.state_dict())
        loss_of(twin, iteration, F64).backward()
        for name in WEIGHTS:
            whole[name] = twin.get_parameter(name).grad
        bad = voided if iteration in {0, 3, 4} else None
        if bad is not None:
            list(model[2 * bad].parameters())[1].grad[0] = float("inf")
        seen = len(log.told)
        for index in order:
            scaler.step(optimizers[index])
            stepped[index] += index != bad
        scaler.update()
        assert not nonzeros(s)
        assert len(log.told) - seen == 2 - (bad is not None)
        for told in log.told[seen:]:
            for name, gradient in told.dense.items():
                assert same(gradient + 0.0, whole[name] + 0.0)
    assert stepped[voided] == 6
    assert stepped[1 - voided] == 9
    for name in WEIGHTS:
        steps = [told.step for told in log.told if told.ready == (name,)]
        assert len(steps) == len(set(steps))
        assert steps == sorted(steps)
    assert log.moved == list(range(1, s.step + 1))
    assert 8 <= s.step <= 9
    if fused:
        assert s.step == 9


@pytest.mark.parametrize("fused", [False, True])
def test_both_of_two_are_voided(fused: bool) -> None:
    model, optimizers = pair(fused)
    s, log = recorded(model, optimizers, dense=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for iteration in range(6):
        backward(model, optimizers, iteration, scaler)
        if iteration % 2 == 0:
            spoil_everything(model)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    assert log.moved == [1, 2, 3]
    assert s.ledger.dense_steps == [0, 1, 2]


def test_one_that_steps_more_often() -> None:
    """The step of the other is over when the first begins its next; it joins every second."""
    model, optimizers = pair()
    s, log = recorded(model, optimizers)
    for iteration in range(6):
        backward(model, optimizers, iteration)
        optimizers[0].step()
        if iteration % 2:
            optimizers[1].step()
        assert not nonzeros(s)
    assert s.step == 6
    assert [t.step for t in log.told if t.ready == ("0.weight",)] == [0, 1, 2, 3, 4, 5]
    assert [t.step for t in log.told if t.ready == ("2.weight",)] == [1, 3, 5]


def test_alternating_losses() -> None:
    """Each optimizer after a backward pass of its own, which reaches the other's weights too."""
    model, optimizers = pair()
    s, log = recorded(model, optimizers, dense=2)
    for step in range(6):
        for part, optimizer in enumerate(optimizers):
            backward(model, optimizers, 10 * step + part)
            twin = net(F64)
            twin.load_state_dict(model.state_dict())
            loss_of(twin, 10 * step + part, F64).backward()
            optimizer.step()
            expected = twin.get_parameter(WEIGHTS[part]).grad
            if step % 2:
                assert same(log.told[-1].dense[WEIGHTS[part]] + 0.0, expected + 0.0)
        assert s.step == step + 1
        assert not nonzeros(s)


def test_muon_and_adamw_under_rigl() -> None:
    model = net(F64)
    optimizers = optimizer_list.muon_and_adamw(model)
    s = rarefy.sparsify(model, METHODS["RigL"], optimizer=optimizers, steps=12)
    for step in range(8):
        before = copy.deepcopy(model.state_dict())
        train(model, optimizers, step, step + 1)
        assert not nonzeros(s)
        rested = all(same(before[name], model.state_dict()[name]) for name in ("0.bias", "2.bias"))
        assert rested == (step in {2, 4, 6})
    assert s.step == 8


# -- what goes wrong ---------------------------------------------------------------------------------------------------


class Faulty(optim.SGD):
    """Raises after the first parameter, when told so."""

    fault = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad + 1e-3)  # moves masked weights too
                if self.fault:
                    raise RuntimeError("out of memory")
        return None


@pytest.mark.parametrize("method", ["Random", "SRSTE", "TopKAST", "ITOP"])
@pytest.mark.parametrize("closed", [False, True])
def test_a_step_that_raises_half_way(method: str, closed: bool) -> None:
    model = net(F64)
    optimizer = Faulty(model.parameters(), lr=0.05)
    s = rarefy.sparsify(model, METHODS[method], optimizer=optimizer, steps=12)
    for iteration in range(6):
        optimizer.fault = iteration == 3

        def closure(iteration: int = iteration) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, iteration, F64)
            loss.backward()
            return loss

        if optimizer.fault:
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step(closure) if closed else (closure(), optimizer.step())
            assert s.step == 3
            continue
        optimizer.step(closure) if closed else (closure(), optimizer.step())
        assert not nonzeros(s)
        rarefy.check(model, s)
    assert s.step == 5


def test_a_closure_that_raises() -> None:
    def run(raising: bool) -> tuple[nn.Module, Any, Sparsity]:
        model = net(F64)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        s = rarefy.sparsify(model, METHODS["SRSTE"], optimizer=optimizer)

        def bad() -> Tensor:
            raise KeyError("no batch")

        for step in range(4):
            if raising and step == 2:
                with pytest.raises(KeyError, match="no batch"):
                    optimizer.step(bad)

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, step, F64)
                loss.backward()
                return loss

            optimizer.step(closure)
        return model, optimizer, s

    (one, _, s), (other, _, t) = run(False), run(True)
    assert all(same(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert s.step == t.step == 4


def test_a_pre_hook_that_raises_during_a_skipped_step_does_not_bring_old_gradients_back() -> None:
    model = net(F64)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    _, log = recorded(model, optimizer)
    log.act = lambda s: s.skip_optimizer_step() if s.step == 1 else None
    raising = [False]

    def theirs(*_: Any) -> None:
        if raising[0]:
            raise RuntimeError("theirs")

    optimizer.register_step_pre_hook(theirs)  # after ours
    backward(model, [optimizer], 0)
    optimizer.step()
    backward(model, [optimizer], 1)
    raising[0] = True
    with pytest.raises(RuntimeError, match="theirs"):
        optimizer.step()
    raising[0], log.act = False, None
    backward(model, [optimizer], 2)
    expected = {name: model.get_parameter(name).grad.clone() for name in WEIGHTS}
    optimizer.step()
    assert all(same(log.told[-1].gradients[name], expected[name]) for name in WEIGHTS)


def test_a_step_retried_after_a_pre_hook_raised_has_its_gradients() -> None:
    model = net(F64)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    _, log = recorded(model, optimizer)
    log.act = lambda s: s.skip_optimizer_step()
    hook = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    backward(model, [optimizer], 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    hook.remove()
    log.act = None
    optimizer.step()
    assert set(log.told[-1].gradients) == set(WEIGHTS)


@dataclass(frozen=True)
class Raiser(Method):
    """Raises in `on_weights` at step `at`; asks for a dense gradient in every second step."""

    at: int = 3
    needs = frozenset({"optimizer"})

    def begin(self, s: Sparsity) -> None:
        for site in s.sites:
            s.keep(site, checkered(site.parameter.shape))

    def wants_dense_gradient(self, step: int, steps: int | None) -> bool:
        return step % 2 == 1

    def on_weights(self, s: Sparsity) -> None:
        for site in s.sites:
            s.keep(site, checkered(site.parameter.shape, moved=s.step))
        if s.step == self.at:
            raise ValueError("undecided")


def test_a_method_that_raises_after_the_step() -> None:
    model = net(F64)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    s = rarefy.sparsify(model, Raiser(at=3), optimizer=optimizer)
    train(model, [optimizer], 0, 2)
    masks = s.masks
    with pytest.raises(ValueError, match="undecided"):
        train(model, [optimizer], 2, 3)
    assert all(torch.equal(masks[name], s.masks[name]) for name in masks)
    assert not nonzeros(s)
    assert s.step == 3
    assert s.sites[0].held.wants_dense  # of the next step
    train(model, [optimizer], 3, 5)
    assert s.step == 5
    assert not nonzeros(s)


def test_a_step_inside_the_backward_pass_is_refused() -> None:
    """A plain hook that steps; whether it was registered first or last."""
    for first in (False, True):
        model = net(F64)
        optimizer = optim.SGD(model.parameters(), lr=0.1)

        def hook(p: Tensor, optimizer: Optimizer = optimizer) -> None:
            optimizer.step()
            p.grad = None

        if first:
            model[2].weight.register_post_accumulate_grad_hook(hook)
        s, log = recorded(model, optimizer)
        if not first:
            model[2].weight.register_post_accumulate_grad_hook(hook)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match=r"inside the backward pass.*step after backward"):
            loss_of(model, 0, F64).backward()
        assert all(same(value, model.state_dict()[name]) for name, value in before.items())
        assert (s.step, log.told) == (0, [])


def test_a_gradient_taken_away_inside_the_backward_pass_is_named() -> None:
    """By a hook that updates the weight itself."""
    model = net(F64)

    def hook(p: Tensor) -> None:
        with torch.no_grad():
            p.sub_(0.1 * p.grad)
        p.grad = None

    model[2].weight.register_post_accumulate_grad_hook(hook)
    recorded(model, optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"'2\.weight' was taken away.*step after backward"):
        loss_of(model, 0, F64).backward()


def test_a_dense_gradient_that_was_not_announced_is_refused() -> None:
    model = net(F64)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    s, log = recorded(model, optimizer)
    log.act = lambda s: s.dense_gradient(s.sites[0]).sum()
    loss_of(model, 0, F64).backward()
    with pytest.raises(RuntimeError, match=r"'0\.weight'.*announces it before the forward pass"):
        optimizer.step()
    assert s.step == 0


def test_a_learning_rate_of_zero_is_no_copy_of_the_weights() -> None:
    """Warm-up begins with a step that moves nothing."""
    model = net(F64)
    optimizer = optim.Adafactor(model.parameters(), lr=0.0)
    s, _ = recorded(model, optimizer)
    train(model, [optimizer], 0, 2)
    assert s.step == 2
