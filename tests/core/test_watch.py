"""When a step counts, when it is skipped, and what the method is told of it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import optimizer_list
import rarefy
from core.watched import F64, train
from rarefy import Every, Sparsity
from recorder import checkered, loss_of, net, nonzeros, recorded, same

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
