"""Steps that gradient scalers void are no steps."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn, optim
from torch.optim import Optimizer

import optimizer_list
import rarefy
from core.watched import F64, METHODS, WEIGHTS, spoil_everything
from rarefy import Sparsity
from recorder import checkered, loss_of, net, nonzeros, recorded, same

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
VOID = {0, 3, 4, 7}  # iterations whose gradients overflow


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


WAYS = [(1, False), (1, True), (2, True)]  # micro-batches, clipped
# All of them with every optimizer and method; in the fast part they take turns.
SCALED_RUNS = [
    pytest.param(name, method, *way, marks=pytest.mark.slow if (i + j + k) % 3 else ())
    for i, name in enumerate(SCALED)
    for j, method in enumerate(METHODS)
    for k, way in enumerate(WAYS)
]


@pytest.mark.parametrize(("name", "method", "parts", "clip"), SCALED_RUNS)
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
