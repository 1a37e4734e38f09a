"""Law 3: masked weights are +0.0 after a step, whatever a user wrote before it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import optimizer_list
import rarefy
from laws.zeros import METHODS, train
from recorder import checkered, loss_of, net, nonzeros, recorded, same


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


def test_one_parameter_in_two_optimizers() -> None:
    model = net()
    weights = [p for p in model.parameters() if p.ndim == 2]
    pair: list[Optimizer] = [torch.optim.Adafactor(weights, lr=0.1), torch.optim.Adafactor(model.parameters(), lr=0.1)]
    s, _ = recorded(model, pair)
    train(model, pair, s, before=lambda step: copy_into_data(model, pair, step))
