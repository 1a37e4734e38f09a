"""When a step of several optimizers ends, and what of it is void."""

import copy

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

import optimizer_list
import rarefy
from core.watched import F64, METHODS, WEIGHTS, backward, pair, spoil_everything, train
from recorder import loss_of, net, nonzeros, recorded, same


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
