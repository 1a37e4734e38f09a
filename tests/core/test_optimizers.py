"""Which optimizers are refused, and what the error says; wrappers; the small questions asked of optimizers."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

import optimizer_list
import rarefy
import tiny
from rarefy.core import optimizers
from recorder import Recorder, checkered, loss_of, net, nonzeros, recorded


def refused(model: nn.Module, given: Any, match: str, kind: type[Exception] = ValueError) -> None:
    """Refused by `sparsify` and by `attach`, with model and optimizers as they were."""
    states = copy.deepcopy([o.state_dict() for o in listed(given)])
    before = tiny.picture(model)
    with pytest.raises(kind, match=match):
        recorded(model, given)
    assert tiny.picture(model) == before
    s = rarefy.sparsify(model, Recorder())
    before = tiny.picture(model)
    with pytest.raises(kind, match=match):
        s.attach(given)
    assert tiny.picture(model) == before
    assert not s.attached
    for optimizer, state in zip(listed(given), states, strict=True):
        assert str(optimizer.state_dict()) == str(state)
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


def listed(given: Any) -> list[Optimizer]:
    many: Iterable[Any] = given if isinstance(given, list | tuple) else [given]
    return [o for o in many if isinstance(o, Optimizer)]


def test_sparse_adam() -> None:
    model = net()
    refused(model, optim.SparseAdam(model.parameters()), r"SparseAdam takes sparse gradients.*use Adam or AdamW")


def test_an_optimizer_that_does_not_hold_a_site() -> None:
    model = net()
    refused(
        model,
        optim.SGD(model[0].parameters(), lr=0.1),
        r"no given optimizer holds '2\.weight' \(shape \(4, 8\)\).*pass",
    )


def test_an_optimizer_that_holds_clones() -> None:
    """As apex does with its float32 copies: its parameters are not the model's."""
    model = net(torch.bfloat16)
    clones = [p.detach().float().requires_grad_(True) for p in model.parameters()]
    refused(
        model, optim.SGD(clones, lr=0.1), r"no given optimizer holds '0\.weight'.*copies of its own.*freeze the layer"
    )


def test_parameters_replaced_after_the_optimizer_was_made() -> None:
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    refused(model, optimizer, r"no given optimizer holds '0\.weight'.*replaced after the optimizer was made")


def test_a_follower_that_no_optimizer_holds() -> None:
    model = net()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    with pytest.raises(ValueError, match=r"no given optimizer holds '0\.bias'"):
        rarefy.sparsify(model, rarefy.Magnitude(0.5, pattern="channel"), optimizer=optim.Muon(matrices))


def test_a_frozen_layer_need_not_be_held() -> None:
    model = net()
    model[0].requires_grad_(False)
    s, _ = recorded(model, optim.SGD(model[2].parameters(), lr=0.1))
    assert s.attached


@pytest.mark.parametrize("name", ["master_param", "master_params", "master_weight", "master", "fp32_param"])
def test_a_hidden_master_copy_in_the_state(name: str) -> None:
    model = net(torch.bfloat16)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    for p in model.parameters():
        optimizer.state[p] = {name: p.detach().float()}
    refused(model, optimizer, rf"AdamW keeps a hidden master copy of the weights \({name}\).*float32 parameters")


class Copying(Optimizer):
    """Steps on a copy of each parameter, of its dtype or wider, then writes it back; `begin` makes the copies."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1, dtype: torch.dtype | None = None) -> None:
        super().__init__(params, {"lr": lr})
        self.dtype = dtype

    def begin(self) -> None:
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                self.state[p]["z"] = p.detach().clone().to(self.dtype or p.dtype)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.begin()
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p]["z"]
                z.sub_(p.grad.to(z.dtype), alpha=group["lr"])
                p.copy_(z)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_a_copy_under_another_name_with_a_past(dtype: torch.dtype | None) -> None:
    model = net(torch.bfloat16)
    optimizer = Copying(model.parameters(), dtype=dtype)
    optimizer.begin()
    refused(model, optimizer, r"Copying keeps a copy of the weights of '0\.weight' as state\['z'\].*SGD or AdamW")


def test_a_copy_that_is_made_in_the_first_step_is_found_after_it() -> None:
    model = net()
    optimizer = Copying(model.parameters())
    s, log = recorded(model, optimizer)
    loss_of(model, 0).backward()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Copying keeps a copy of the weights of '0\.weight' as state\['z'\]"):
            optimizer.step()
        assert not nonzeros(s)
    assert (s.step, log.moved) == (0, [])


class ScheduleFree(Optimizer):
    """Defazio et al. 2024: z is a sequence of its own, the parameter lies between it and its average."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            c, lr, beta = 1 / (group["k"] + 1), group["lr"], group["beta"]
            for y in group["params"]:
                state = self.state[y]
                z = state.setdefault("z", y.detach().clone())
                y.lerp_(z, c)
                y.add_(y.grad, alpha=lr * (beta * (1 - c) - 1))
                z.sub_(y.grad, alpha=lr)
            group["k"] += 1


def test_schedule_free() -> None:
    model = net()
    optimizer = ScheduleFree(model.parameters())
    _, _ = recorded(model, optimizer)
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match=r"ScheduleFree keeps a copy of the weights of '0\.weight' as state\['z'\]"):
        optimizer.step()


def test_state_that_equals_a_scale_of_ones_is_no_copy() -> None:
    """Norms begin at one, as some state does."""

    class Ones(optimizer_list.Momentum):
        def _update(self, p: Tensor, lr: float) -> None:
            super()._update(p, lr)
            self.state[p].setdefault("curvature", torch.ones_like(p))

    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 2))
    optimizer = Ones(model.parameters(), lr=0.0)
    s = rarefy.sparsify(model, rarefy.Magnitude(0.5, pattern="channel"), optimizer=optimizer)
    for _ in range(2):
        model(torch.ones(2, 2, 4, 4)).sum().backward()
        optimizer.step()
    assert s.step == 2


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on import
def test_an_optimizer_in_the_backward_pass() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = net()
    _apply_optimizer_in_backward(optim.SGD, model.parameters(), {"lr": 0.1})
    refused(
        model, optim.SGD(model.parameters(), lr=0.1), r"'0\.weight' is updated by an optimizer inside the backward pass"
    )


def test_what_is_no_optimizer() -> None:
    model = net()
    for given, match in [("adam", "is no torch.optim.Optimizer"), ([None], "wraps none"), (3, "pass an optimizer")]:
        refused(model, given, match, TypeError)
    refused(model, [], "holds no optimizer: pass one, or None")
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    refused(model, [optimizer, optimizer], "the same optimizer twice: pass each of them once")


def test_wrappers() -> None:
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    class AcceleratedOptimizer(Optimizer):
        """An Optimizer that passes everything on, its own step hooks unused."""

        def __init__(self, inner: Optimizer) -> None:
            self.optimizer = inner

    for given in (optimizer_list.Wrapped(optimizer), optimizer_list.Wrapped(optimizer_list.Wrapped(optimizer))):
        assert optimizers.unwrap(given) is optimizer
    assert optimizers.unwrap(AcceleratedOptimizer(optimizer)) is optimizer
    assert optimizers.as_sequence((optimizer_list.Wrapped(optimizer),)) == (optimizer,)
    assert optimizers.as_sequence(optimizer) == (optimizer,)


def test_owner_and_learning_rate() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    first = optim.SGD([{"params": [model[0].weight], "lr": 0.5}, {"params": [model[2].weight]}], lr=0.1)
    second = optim.Adam([model[2].bias], lr=torch.tensor(0.25))
    both = (first, second)
    assert optimizers.owner(both, model[2].bias) is second
    assert optimizers.owner(both, model[0].bias) is None
    assert [optimizers.learning_rate(both, p) for p in model.parameters()] == [0.5, 0.0, 0.1, 0.25]


@pytest.mark.parametrize("make", list(optimizer_list.DEFAULT.values()), ids=list(optimizer_list.DEFAULT))
def test_every_dense_optimizer_of_torch_is_accepted(make: Callable[[nn.Module], list[Optimizer]]) -> None:
    """With a past too: none of them is taken for one that keeps copies."""
    model = net(torch.float64)
    given = make(model)
    for step in range(2):
        optimizer_list.update(given, lambda step=step: loss_of(model, step, torch.float64))
    s, _ = recorded(model, given)
    for step in range(2):
        optimizer_list.update(given, lambda step=step: loss_of(model, step, torch.float64))
    assert s.step == 2


def test_the_list_names_all_that_torch_has() -> None:
    """A new one of torch's must be looked at: does it keep copies, what does its state begin with?"""
    known = {kind for kind in vars(optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)}
    tested = {type(o) for make in optimizer_list.DEFAULT.values() for o in make(net())}
    assert known - {Optimizer, optim.SparseAdam} <= tested


@pytest.mark.parametrize("kind", sorted(optimizers.WEIGHTWISE, key=lambda kind: kind.__name__))
def test_weightwise_optimizers_treat_every_weight_by_itself(kind: Any) -> None:
    """What is done to some weights does not show in the others."""
    results = []
    for spoiled in (False, True):
        weight = nn.Parameter(torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6))
        optimizer = kind([weight], lr=0.1)
        for step in range(4):
            weight.grad = torch.sin(torch.arange(24.0, dtype=torch.float64) * (step + 1)).reshape(4, 6)
            if spoiled:
                weight.grad[~checkered((4, 6))] = float("nan")
            optimizer.step()
        results.append(weight.detach()[checkered((4, 6))])
    assert torch.equal(*results)
