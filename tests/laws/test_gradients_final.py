"""Gradients are final in `on_gradients`: accumulated, given by hand, not finite; a voided step is no step."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import rarefy
from laws.gradients import F64, WEIGHTS, masked, plain_gradients, sgd, total_norm
from rarefy import Every
from recorder import checkered, loss_of, net, nonzeros, recorded, same

# -- accumulated -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["none", "zero"])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_micro_batches_sum_to_one_big_batch(parts: int, reset: str) -> None:
    model = net(F64)
    optimizer = sgd(model)
    _, log = recorded(model, optimizer, dense=2)
    for step in range(6):
        whole = plain_gradients(model, lambda m, step=step: sum(loss_of(m, 10 * step + i, F64) for i in range(parts)))
        optimizer.zero_grad(set_to_none=reset == "none")
        for i in range(parts):
            loss_of(model, 10 * step + i, F64).backward()
            for name, expected in masked(plain_gradients_of(model)).items():
                assert same(model.get_parameter(name).grad, expected)  # clear after every micro-batch
        optimizer.step()
        for name in WEIGHTS:
            torch.testing.assert_close(log.told[-1].gradients[name], masked(whole)[name], rtol=1e-12, atol=1e-15)
            if step % 2:
                torch.testing.assert_close(log.told[-1].dense[name], whole[name], rtol=1e-12, atol=1e-15)


def plain_gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_single_backward_pass_gives_the_very_bits_of_torch() -> None:
    model = net()
    optimizer = sgd(model)
    _, log = recorded(model, optimizer, dense=1)
    for step in range(3):
        expected = plain_gradients(model, lambda m, step=step: loss_of(m, step))
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        assert all(same(log.told[-1].dense[name] + 0.0, expected[name] + 0.0) for name in WEIGHTS)


@pytest.mark.parametrize("reset", ["none", "zero", "by hand", "scaled", "replaced", "model"])
def test_what_happens_to_the_gradient_between_two_backward_passes(reset: str) -> None:
    """A stale dense gradient must not leak; a scaled one goes in as scaled."""
    model = net(F64)
    optimizer = sgd(model)
    _, log = recorded(model, optimizer, dense=1)
    weight = model[0].weight
    for step in range(3):
        first = plain_gradients(model, lambda m, step=step: loss_of(m, 100 + step, F64))["0.weight"]
        second = plain_gradients(model, lambda m, step=step: loss_of(m, step, F64))["0.weight"]
        optimizer.zero_grad()
        loss_of(model, 100 + step, F64).backward()
        share = 0.0
        if reset in {"none", "zero"}:
            optimizer.zero_grad(set_to_none=reset == "none")
        elif reset == "by hand":
            weight.grad = None
        elif reset == "model":
            model.zero_grad()
        elif reset == "scaled":
            share = 0.25
            weight.grad.mul_(0.25)
        else:
            weight.grad = torch.zeros_like(weight)
        loss_of(model, step, F64).backward()
        optimizer.step()
        expected = second + share * first
        torch.testing.assert_close(log.told[-1].dense["0.weight"], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(log.told[-1].gradients["0.weight"], expected * checkered((8, 6)))


def test_a_reset_with_an_equal_number_of_writes_does_not_leak() -> None:
    """Whatever the version counter of a new gradient tensor says, and wherever it lies."""
    model = net(F64)
    optimizer = sgd(model)
    _, log = recorded(model, optimizer, dense=1)
    for step in range(20):
        expected = plain_gradients(model, lambda m, step=step: loss_of(m, step, F64))
        loss_of(model, 100 + step, F64).backward()
        for p in model.parameters():
            p.grad = None
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(step % 4):
            for p in model.parameters():
                p.grad.add_(0.0)
        loss_of(model, step, F64).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name in WEIGHTS:
            torch.testing.assert_close(log.told[-1].dense[name], expected[name], rtol=1e-9, atol=1e-12)


# -- given by hand -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["nothing", "a backward pass"])
def test_gradients_that_are_assigned(before: str) -> None:
    """torch.autograd.grad runs no hook of the parameter's gradient."""
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=2)
    for step in range(6):
        optimizer.zero_grad()
        if before != "nothing":
            loss_of(model, 50 + step, F64).backward()
        found = torch.autograd.grad(loss_of(model, step, F64), list(model.parameters()))
        for p, g in zip(model.parameters(), found, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for name, expected in zip(WEIGHTS, (found[0], found[2]), strict=True):
            assert same(log.told[-1].gradients[name] + 0.0, expected * checkered(expected.shape) + 0.0)
            if step % 2:
                assert same(log.told[-1].dense[name] + 0.0, expected + 0.0)
        assert not nonzeros(s)


def test_asking_for_gradients_between_backward_and_step_changes_nothing() -> None:
    def run(asking: bool) -> tuple[nn.Module, Any]:
        model = net(F64)
        optimizer = sgd(model)
        _, log = recorded(model, optimizer, dense=1)
        for step in range(3):
            optimizer.zero_grad()
            for part in range(2):
                loss_of(model, 10 * step + part, F64).backward()
                if asking:
                    torch.autograd.grad(loss_of(model, 7, F64), list(model.parameters()))
            norm = clip_grad_norm_(model.parameters(), 0.5)
            log.moved.append(float(norm))  # type: ignore[arg-type]
            optimizer.step()
        return model, log

    (one, quiet), (other, asked) = run(False), run(True)
    assert all(same(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert quiet.moved == asked.moved
    for a, b in zip(quiet.told, asked.told, strict=True):
        assert all(torch.allclose(a.dense[n], b.dense[n], rtol=1e-13, atol=0) for n in WEIGHTS)


def test_an_averaged_clear_gradient_takes_the_place_of_the_last_one() -> None:
    """As gradient surgery does: the mean of gradients that were cleared. The masked part is then the last one's."""
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=1)
    parts = []
    for part in range(2):
        optimizer.zero_grad()
        loss_of(model, part, F64).backward()
        parts.append([p.grad.clone() for p in model.parameters()])
    for p, a, b in zip(model.parameters(), *parts, strict=True):
        p.grad = (a + b) / 2
    optimizer.step()
    for name, a, b in zip(WEIGHTS, parts[0][::2], parts[1][::2], strict=True):
        kept = checkered(a.shape)
        assert same(log.told[0].dense[name][kept], ((a + b) / 2)[kept])
        assert bool(log.told[0].dense[name][~kept].any())
    assert not nonzeros(s)


# -- not finite --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["kept", "masked"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [False, True])
def test_a_bad_gradient_at_an_update_step_raises_and_changes_nothing(clip: bool, bad: float, at: str) -> None:
    model = net(F64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    method = rarefy.RigL(0.6, allocation="uniform", every=Every(3, 1.0))
    s = rarefy.sparsify(model, method, optimizer=optimizer, steps=20)
    poison: list[float] = []

    def spoil(grad: Tensor) -> Tensor:
        if not poison:
            return grad
        mask = s.masks["0.weight"]
        place = (mask if at == "kept" else ~mask).nonzero()[0]
        return grad.index_put(tuple(place), torch.tensor(poison.pop(), dtype=F64))

    model[0].weight.register_hook(spoil)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step, F64).backward()
        optimizer.step()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    masks, saved = s.masks, s.generator.get_state()
    poison.append(bad)
    optimizer.zero_grad()
    loss_of(model, 3, F64).backward()
    if clip:
        clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(ValueError, match=r"'0\.weight'"):
        optimizer.step()
    assert all(same(value, model.state_dict()[name]) for name, value in weights.items())
    assert all(torch.equal(masks[name], s.masks[name]) for name in masks)
    assert s.step == 3
    assert torch.equal(saved, s.generator.get_state())
    for index, entries in optimizer.state_dict()["state"].items():
        assert all(same(value, state["state"][index][name]) for name, value in entries.items())
    # The loop may go on with the next batch, and the update takes place then.
    optimizer.zero_grad()
    loss_of(model, 4, F64).backward()
    optimizer.step()
    assert s.step == 4
    assert any(not torch.equal(masks[name], s.masks[name]) for name in masks)
    assert not nonzeros(s)


def test_a_bad_gradient_at_a_masked_position_of_an_ordinary_step_is_cleared() -> None:
    model = net(F64)
    optimizer = sgd(model)
    s, log = recorded(model, optimizer, dense=2)
    expected = plain_gradients(model, lambda m: loss_of(m, 0, F64))
    model[0].weight.register_hook(lambda grad: grad.masked_fill(~checkered((8, 6)), float("nan")))
    loss_of(model, 0, F64).backward()
    norm = clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(norm, total_norm(masked(expected)), rtol=1e-12, atol=0)
    optimizer.step()
    assert log.moved == [1]
    assert not nonzeros(s)


def test_a_sparse_gradient_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rarefy.sparsify(model, rarefy.Random(0.5), optimizer=optimizer, only=[nn.Embedding, nn.Linear])
    with pytest.raises(ValueError, match=r"'0\.weight' is sparse.*sparse=False"):
        model(torch.arange(5)).sum().backward()
