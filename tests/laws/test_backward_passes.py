"""Gradients are final in `on_gradients`: after backward passes of every kind."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from laws.gradients import F64, WEIGHTS, masked, plain_gradients, plain_of, sgd, total_norm
from recorder import checkered, data, loss_of, net, nonzeros, recorded, same


def test_two_backward_passes_through_one_graph() -> None:
    model = net(F64)
    optimizer = sgd(model)
    _, log = recorded(model, optimizer, dense=1)
    expected = plain_gradients(model, lambda m: 2 * loss_of(m, 0, F64))
    loss = loss_of(model, 0, F64)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    for name in WEIGHTS:
        torch.testing.assert_close(log.told[0].dense[name], expected[name], rtol=1e-13, atol=0)


@pytest.mark.parametrize("dense", [0, 1])
def test_a_gradient_penalty_by_create_graph(dense: int) -> None:
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=dense)
    inputs, targets = data(0, F64)

    def loss(m: nn.Module) -> Tensor:
        value = (m(inputs) - targets).square().mean()
        gradients = torch.autograd.grad(value, list(m.parameters()), create_graph=True)
        return value + sum(g.square().sum() for g in gradients)

    expected = plain_gradients(model, loss)
    loss(model).backward()
    optimizer.step()
    for name in WEIGHTS:
        assert same(log.told[0].gradients[name] + 0.0, masked(expected)[name] + 0.0)
        if dense:
            assert same(log.told[0].dense[name] + 0.0, expected[name] + 0.0)
    assert not nonzeros(s)


@pytest.mark.parametrize("dense", [0, 1])
def test_a_backward_pass_that_creates_a_graph(dense: int) -> None:
    """p.grad is then itself differentiable; the penalty counts kept weights."""
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=dense)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a reference cycle, as torch says
        for m in (model, twin):
            loss_of(m, 0, F64).backward(create_graph=True)
    penalty = {n: (g * checkered(g.shape) if n in WEIGHTS else g) for n, g in plain_of(twin).items()}
    sum(g.square().sum() for g in penalty.values()).backward()
    sum(p.grad.square().sum() for p in model.parameters()).backward()
    expected = {name: p.grad.detach() for name, p in twin.named_parameters()}
    optimizer.step()
    for name in WEIGHTS:
        kept = checkered(expected[name].shape)
        torch.testing.assert_close(log.told[0].gradients[name].detach(), expected[name] * kept, rtol=1e-9, atol=1e-12)
        if dense:
            torch.testing.assert_close(log.told[0].dense[name], expected[name], rtol=1e-9, atol=1e-12)
    assert not nonzeros(s)
    for p in (*model.parameters(), *twin.parameters()):
        p.grad = None  # breaks the cycle


class Twice(nn.Module):
    """One Linear used twice, each time inside a checkpoint."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer, self.head = nn.Linear(6, 6).double(), nn.Linear(6, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            if self.reentrant is None:
                x = torch.tanh(self.layer(x))
            else:
                x = checkpoint(lambda y: torch.tanh(self.layer(y)), x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing_and_a_layer_used_twice(reentrant: bool | None) -> None:
    model = Twice(reentrant)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=2)
    inputs, targets = data(0, F64)
    inputs.requires_grad_(True)
    for step in range(4):
        twin = Twice(None)
        twin.load_state_dict(model.state_dict())
        expected = plain_gradients(twin, lambda m: (m(inputs) - targets).square().mean())
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        norm = clip_grad_norm_(model.parameters(), 1e9)
        kept = {n: g * checkered(g.shape) if g.ndim == 2 else g for n, g in expected.items()}
        torch.testing.assert_close(norm, total_norm(kept), rtol=1e-12, atol=0)
        optimizer.step()
        for name in ("layer.weight", "head.weight"):
            torch.testing.assert_close(log.told[-1].gradients[name], kept[name], rtol=1e-12, atol=1e-15)
            if step % 2:
                torch.testing.assert_close(log.told[-1].dense[name], expected[name], rtol=1e-12, atol=1e-15)
        assert not nonzeros(s)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_the_user(when: str) -> None:
    """One that comes first sees the whole gradient, one that comes later the kept part; both may write to it."""
    model = net(F64)
    optimizer = sgd(model)
    weight, seen = model[0].weight, []

    def hook(p: Tensor) -> None:
        seen.append(p.grad.clone())
        p.grad.mul_(2.0)

    if when == "before":
        weight.register_post_accumulate_grad_hook(hook)
    s, log = recorded(model, optimizer, dense=2)
    if when == "after":
        weight.register_post_accumulate_grad_hook(hook)
    for step in range(4):
        twin = net(F64)
        twin.load_state_dict(model.state_dict())
        expected = plain_gradients(twin, lambda m, step=step: loss_of(m, step, F64))["0.weight"]
        optimizer.zero_grad()
        loss_of(model, step, F64).backward()
        optimizer.step()
        clear = expected * checkered((8, 6)) if when == "after" and step % 2 == 0 else expected
        assert same(seen[-1] + 0.0, clear + 0.0)
        assert same(log.told[-1].gradients["0.weight"] + 0.0, 2 * expected * checkered((8, 6)) + 0.0)
        if step % 2:
            assert same(log.told[-1].dense["0.weight"] + 0.0, 2 * expected + 0.0)
        assert not nonzeros(s)


def test_a_backward_pass_that_raises_half_way() -> None:
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=1)
    bomb = [True]

    def explode(grad: Tensor) -> None:
        if bomb.pop():
            raise MemoryError("no room")

    handle = model[0].weight.register_hook(explode)
    with pytest.raises(MemoryError):
        loss_of(model, 5, F64).backward()
    handle.remove()
    expected = plain_gradients(model, lambda m: loss_of(m, 0, F64))
    optimizer.zero_grad()
    loss_of(model, 0, F64).backward()
    optimizer.step()
    for name in WEIGHTS:
        assert same(log.told[0].dense[name] + 0.0, expected[name] + 0.0)
    assert not nonzeros(s)


def test_a_layer_that_is_not_used_has_no_gradient() -> None:
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=1)
    before = model[2].weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        model[0](data(step, F64)[0]).square().mean().backward()
        optimizer.step()
        assert set(log.told[-1].gradients) == {"0.weight"}
        assert not log.told[-1].dense["2.weight"].any()
        assert not nonzeros(s)
    assert same(model[2].weight, before)


def test_a_layer_not_used_in_the_next_step_does_not_show_the_dense_gradient_of_the_last() -> None:
    model = net(F64)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    _, log = recorded(model, optimizer, dense=1)
    scaler.scale(loss_of(model, 0, F64)).backward()
    model[0].bias.grad[0] = float("inf")  # void
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(model[0](data(1, F64)[0]).square().mean()).backward()
    scaler.step(optimizer)
    assert not log.told[0].dense["2.weight"].any()


def test_frozen_layers_keep_their_weights() -> None:
    model = net(F64)
    model[2].requires_grad_(False)
    optimizer = sgd(model, weight_decay=0.1)
    s, log = recorded(model, optimizer, dense=2)
    before = model[2].weight.detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step, F64).backward()
        optimizer.step()
        assert not nonzeros(s)
    assert same(model[2].weight, before)
    assert log.steps == [0, 1, 2, 3]


def test_bfloat16_autocast() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    s, log = recorded(model, optimizer, dense=2)

    def loss(m: nn.Module, step: int) -> Tensor:
        inputs, targets = data(step)
        with torch.autocast("cpu", torch.bfloat16):
            output = m(inputs)
        return (output.float() - targets).square().mean()

    for step in range(6):
        expected = plain_gradients(model, lambda m, step=step: loss(m, step))
        optimizer.zero_grad()
        loss(model, step).backward()
        norm = clip_grad_norm_(model.parameters(), 1e9)
        torch.testing.assert_close(norm.double(), total_norm(masked(expected)), rtol=1e-5, atol=0)
        optimizer.step()
        for name in WEIGHTS:
            assert same(log.told[-1].gradients[name] + 0.0, masked(expected)[name] + 0.0)
            if step % 2:
                assert same(log.told[-1].dense[name] + 0.0, expected[name] + 0.0)
        assert not nonzeros(s)
