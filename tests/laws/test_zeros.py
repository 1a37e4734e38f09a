"""Law 3: after every optimizer step masked weights are +0.0 to the bit, with every optimizer, whatever came before."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import optimizer_list
import rarefy
from rarefy import Cubic, Every, Sparsity
from recorder import Mover, checkered, data, loss_of, net, nonzeros, recorded, same

DTYPES = [torch.float32, torch.float64, torch.bfloat16]

# Masks that stand still, that move with and without a dense gradient, that shrink; a dense weight behind a sparse one.
METHODS: dict[str, rarefy.Method] = {
    "static": rarefy.Random(0.7, allocation="uniform"),
    "RigL": rarefy.RigL(0.7, allocation="uniform", every=Every(2, 1.0)),
    "SET": rarefy.SET(0.7, allocation="uniform", every=Every(2, 1.0)),
    "GMP": rarefy.GMP(0.7, schedule=Cubic(start=1, end=6, every=2)),
    "SRSTE": rarefy.SRSTE(pattern="1:2"),
    "TopKAST": rarefy.TopKAST(0.7, density_backward=0.6, every=2),
    "channel": rarefy.Magnitude(0.5, pattern="channel"),
}


def train(
    model: nn.Module,
    optimizers: list[Optimizer],
    s: Sparsity,
    steps: int = 6,
    before: Callable[[int], None] = lambda step: None,
    touch: Callable[[], None] = lambda: None,
) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        before(step)
        optimizer_list.update(optimizers, lambda step=step: loss_of(model, step, dtype), touch)
        assert not nonzeros(s), step
        assert s.step == step + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", optimizer_list.IMPLEMENTATIONS)
def test_masked_weights_are_zero_after_every_step(name: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizers = optimizer_list.IMPLEMENTATIONS[name](model)
    s = rarefy.sparsify(model, METHODS["RigL"], optimizer=optimizers, steps=8)
    train(model, optimizers, s, steps=8)
    rarefy.check(model, s)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in optimizer_list.DEFAULT if name != "Muon"])
def test_with_every_kind_of_method(name: str, method: str) -> None:
    model = net()
    optimizers = optimizer_list.DEFAULT[name](model)
    s = rarefy.sparsify(model, METHODS[method], optimizer=optimizers, steps=8)
    train(model, optimizers, s)
    rarefy.check(model, s)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", optimizer_list.IMPLEMENTATIONS)
def test_kept_weights_are_those_of_a_loop_that_masks_gradients_and_weights(name: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    literal = copy.deepcopy(model)
    masks = {n: checkered(p.shape) for n, p in literal.named_parameters() if p.ndim == 2}
    hold(literal, masks)
    optimizers, others = (optimizer_list.IMPLEMENTATIONS[name](m) for m in (model, literal))
    recorded(model, optimizers)
    for step in range(5):
        optimizer_list.update(optimizers, lambda step=step: loss_of(model, step, dtype))
        optimizer_list.update(
            others, lambda step=step: loss_of(literal, step, dtype), lambda: hold(literal, masks, gradients=True)
        )
        hold(literal, masks)
        for p, q in zip(model.parameters(), literal.parameters(), strict=True):
            assert same(p, q)


def hold(model: nn.Module, masks: dict[str, Tensor], gradients: bool = False) -> None:
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in masks:
                tensor = p.grad if gradients else p
                assert tensor is not None
                tensor.masked_fill_(~masks[n], 0)


# -- what users do between steps --------------------------------------------------------------------------------------


def load_dense(model: nn.Module, optimizers: list[Optimizer], step: int) -> None:
    model.load_state_dict(net(seed=step + 5).state_dict())


def copy_into_data(model: nn.Module, optimizers: list[Optimizer], step: int) -> None:
    for p, q in zip(model.parameters(), net(seed=step + 5).parameters(), strict=True):
        p.data.copy_(q.data)  # moves no version counter


def replace_data(model: nn.Module, optimizers: list[Optimizer], step: int) -> None:
    for p, q in zip(model.parameters(), net(seed=step + 5).parameters(), strict=True):
        p.data = q.data


def negate(model: nn.Module, optimizers: list[Optimizer], step: int) -> None:
    for p in model.parameters():
        p.data.neg_()  # −0.0 where masked


def in_place(model: nn.Module, optimizers: list[Optimizer], step: int) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)


def fill_state(model: nn.Module, optimizers: list[Optimizer], step: int) -> None:
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point():
                    value.add_(0.25)


def load_state(model: nn.Module, optimizers: list[Optimizer], step: int) -> None:
    fill_state(model, optimizers, step)
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


EDITS = [load_dense, copy_into_data, replace_data, negate, in_place, fill_state, load_state]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("name", optimizer_list.DEFAULT)
def test_whatever_was_written_to_weights_and_state_between_steps(
    name: str, edit: Callable[[nn.Module, list[Optimizer], int], None]
) -> None:
    model = net()
    optimizers = optimizer_list.DEFAULT[name](model)
    s, _ = recorded(model, optimizers)
    train(model, optimizers, s, steps=4, before=lambda step: edit(model, optimizers, step))


@pytest.mark.parametrize("frozen", ["held", "unheld"])
@pytest.mark.parametrize("edit", EDITS[:5], ids=lambda edit: edit.__name__)
def test_frozen_layers_too(frozen: str, edit: Callable[[nn.Module, list[Optimizer], int], None]) -> None:
    model = net()
    model[0].requires_grad_(False)
    given = model.parameters() if frozen == "held" else model[2].parameters()
    optimizers: list[Optimizer] = [torch.optim.AdamW(given, lr=0.1)]
    s, _ = recorded(model, optimizers)
    train(model, optimizers, s, steps=4, before=lambda step: edit(model, optimizers, step))


def noise(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.add_(0.1)


def noise_in_data(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.data.add_(0.1)  # moves no version counter


def replace(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad = torch.full_like(p, 0.1)


TOUCHES = [noise, noise_in_data, replace]
SOME = ["AdamW decay above 1", "Adafactor", "ASGD", "LBFGS", "Muon and AdamW", "third party"]


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: touch.__name__)
@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in optimizer_list.DEFAULT for method in ("static", "RigL")]
    + [(name, method) for name in SOME for method in ("SRSTE", "TopKAST", "channel")],
)
def test_whatever_was_written_to_gradients(name: str, method: str, touch: Callable[[nn.Module], None]) -> None:
    model = net()
    optimizers = optimizer_list.DEFAULT[name](model)
    s = rarefy.sparsify(model, METHODS[method], optimizer=optimizers, steps=8)
    train(model, optimizers, s, steps=3, touch=lambda: touch(model))


@pytest.mark.parametrize("name", ["Muon", "Adafactor", "LBFGS", "third party", "ASGD"])
def test_gradient_noise_at_masked_positions_does_not_reach_kept_weights_nor_copies(name: str) -> None:
    """Muon and Adafactor mix positions; ASGD keeps an average of the weights."""

    def run(noisy: bool) -> tuple[nn.Module, list[Optimizer]]:
        model = net(torch.float64)
        optimizers = optimizer_list.DEFAULT[name](model)
        recorded(model, optimizers)

        def touch() -> None:
            for p in model.parameters():
                if p.grad is not None and p.ndim == 2 and noisy:
                    p.grad.data[~checkered(p.shape)] += 0.3

        for step in range(4):
            optimizer_list.update(optimizers, lambda step=step: loss_of(model, step, torch.float64), touch)
        return model, optimizers

    (quiet, one), (noisy, other) = run(False), run(True)
    for p, q in zip(quiet.parameters(), noisy.parameters(), strict=True):
        assert same(p, q)
        for key, value in one[0].state.get(p, {}).items():
            if isinstance(value, Tensor):
                assert same(value, other[0].state[q][key])


@pytest.mark.parametrize("kept", [False, True])
def test_a_gradient_that_is_not_set_to_none(kept: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    s, _ = recorded(model, optimizer, dense=2)
    for step in range(6):
        if not kept:
            optimizer.zero_grad(set_to_none=False)
        loss_of(model, step).backward()
        optimizer.step()
        assert not nonzeros(s)


def test_a_nan_at_a_masked_position_is_cleared() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    s, _ = recorded(model, optimizer)
    loss_of(model, 0).backward()
    model[0].weight.data.view(-1)[1] = float("nan")
    model[2].weight.data.view(-1)[2] = float("-inf")
    optimizer.step()
    assert not nonzeros(s)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax])
def test_an_optimizer_that_divides_zero_by_zero(kind: Any) -> None:
    model = net()
    optimizers: list[Optimizer] = [kind(model.parameters(), lr=0.01, eps=0.0)]
    s, _ = recorded(model, optimizers)
    train(model, optimizers, s, steps=3)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# -- where weights lie, and who holds them -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD momentum decay", "AdamW decay above 1", "Adafactor", "ASGD"])
@pytest.mark.parametrize("form", ["channels_last", "transposed", "expanded bias"])
def test_in_every_memory_order(name: str, form: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 9, 3))
    if form == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    elif form == "transposed":
        model[2].weight.data = model[2].weight.data.t().contiguous().t()
    optimizers = optimizer_list.DEFAULT[name](model)
    s, _ = recorded(model, optimizers)
    for step in range(4):
        inputs = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        optimizer_list.update(optimizers, lambda inputs=inputs: model(inputs).square().mean())
        assert not nonzeros(s)
        if step == 1 and form == "channels_last":
            model[0].weight.data = torch.randn(4, 3, 3, 3)  # now in another order than the mask


@pytest.mark.parametrize("cast", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_cast_after_attaching(cast: torch.dtype) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    s, _ = recorded(model, optimizer, dense=2)
    model.to(cast)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step, cast).backward()
        optimizer.step()
        assert not nonzeros(s)


def test_followers_in_another_optimizer_than_their_layer() -> None:
    """Muon takes the matrices, AdamW the biases; AdamW steps last, or first."""
    for order in (0, 1):
        model = net()
        pair = optimizer_list.muon_and_adamw(model)
        s = rarefy.sparsify(model, rarefy.Magnitude(0.5, pattern="channel"), optimizer=pair)
        assert any(site.followers for site in s.sites)

        def fill(step: int, model: nn.Module = model) -> None:
            for p in model.parameters():
                p.data.add_(1.0)

        train(model, pair[::-1] if order else pair, s, steps=3, before=fill)


def test_one_parameter_in_two_optimizers() -> None:
    model = net()
    weights = [p for p in model.parameters() if p.ndim == 2]
    pair: list[Optimizer] = [torch.optim.Adafactor(weights, lr=0.1), torch.optim.Adafactor(model.parameters(), lr=0.1)]
    s, _ = recorded(model, pair)
    train(model, pair, s, before=lambda step: copy_into_data(model, pair, step))


def test_a_layer_that_is_unfrozen_and_added_to_the_optimizer_later() -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adafactor(model[2].parameters(), lr=0.1)
    s, log = recorded(model, optimizer)
    for step in range(6):
        if step == 3:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[0].parameters())})
        optimizer.zero_grad()
        loss_of(model, step).backward()
        total = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        kept = [p.grad[checkered(p.shape)] if p.ndim == 2 else p.grad for p in model.parameters() if p.grad is not None]
        assert torch.allclose(total, torch.cat([g.flatten() for g in kept]).norm())
        optimizer.step()
        assert not nonzeros(s)
    assert [len(told.ready) for told in log.told] == [1, 1, 1, 2, 2, 2]


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=3.0)
    s, _ = recorded(model, optimizer, dense=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.arange(10)).square().mean().backward()
        optimizer.step()
        assert not nonzeros(s)


def test_a_wrapper_that_holds_the_optimizer() -> None:
    model = net()
    wrapper: Any = optimizer_list.Wrapped(torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=3.0))
    s, log = recorded(model, wrapper)
    train(model, [wrapper], s)
    assert log.moved == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, where it compiles optimizers
def test_a_compiled_optimizer_step() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5), weight_decay=3.0)
    s = rarefy.sparsify(model, Mover(at=2), optimizer=optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(4):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        step()
        assert not nonzeros(s)
    assert s.step == 4


def test_a_compiled_model_sees_dense_gradients_and_is_compiled_once() -> None:
    model, graphs = net(), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    s, log = recorded(model, optimizer, dense=2)
    for step in range(6):
        inputs, targets = data(step)
        optimizer.zero_grad()
        plain = torch.autograd.grad((model(inputs) - targets).square().mean(), [site.parameter for site in s.sites])
        (compiled(inputs) - targets).square().mean().backward()
        optimizer.step()
        assert not nonzeros(s)
        for site, expected in zip(s.sites, plain, strict=True):
            if step % 2:
                assert torch.allclose(log.told[-1].dense[site.name], expected, rtol=1e-5, atol=1e-7)
    assert len(graphs) == 1
