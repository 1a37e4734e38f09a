"""Steps in which something raises, and what they leave."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

import rarefy
from core.watched import F64, METHODS, WEIGHTS, backward, train
from rarefy import Sparsity
from rarefy.core.method import Method
from recorder import checkered, loss_of, net, nonzeros, recorded, same


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
