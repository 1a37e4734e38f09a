"""Every optimizer of torch.optim that takes dense gradients, in its variants and implementations; one of another's."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

Make = Callable[[nn.Module], list[Optimizer]]


class Momentum(Optimizer):
    """Somebody else's optimizer: a momentum of the parameter's shape, one that starts at something else, a counter."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group["lr"])
        return loss

    def _update(self, p: Tensor, lr: float) -> None:
        state = self.state[p]
        if not state:
            state.update(speed=torch.zeros_like(p), step=torch.zeros(()), signs=torch.ones_like(p, dtype=torch.int8))
        state["step"] += 1
        state["speed"].mul_(0.9).add_(p.grad)
        p.sub_(lr * state["speed"])


class Wrapped:
    """No torch optimizer, but it holds one, as trainers' wrappers do."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def one(kind: type[Optimizer], **arguments: Any) -> Make:
    return lambda model: [kind(model.parameters(), **arguments)]


def muon(model: nn.Module) -> list[Optimizer]:
    """Muon takes matrices only: the biases are frozen."""
    for p in model.parameters():
        p.requires_grad_(p.ndim == 2)
    return [optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.05)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [optim.Muon(matrices, lr=0.05), optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.05)]


def split(model: nn.Module) -> list[Optimizer]:
    """The first layer to one optimizer, the rest to another."""
    first, *rest = model.parameters()
    return [optim.SGD([first], lr=0.1, momentum=0.9), optim.Adagrad(rest, lr=0.1)]


_IMPLEMENTED: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (optim.SGD, {"lr": 0.1}),
    "SGD momentum decay": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "SGD nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD maximize": (optim.SGD, {"lr": 0.01, "momentum": 0.9, "maximize": True}),
    "SGD decay above 1": (optim.SGD, {"lr": 0.5, "weight_decay": 3.0}),
    "Adam": (optim.Adam, {"lr": 0.05, "weight_decay": 0.1}),
    "Adam amsgrad": (optim.Adam, {"lr": 0.05, "amsgrad": True, "maximize": True}),
    "Adam decoupled": (optim.Adam, {"lr": 0.5, "weight_decay": 3.0, "decoupled_weight_decay": True}),
    "AdamW": (optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "AdamW decay above 1": (optim.AdamW, {"lr": 0.5, "weight_decay": 3.0, "amsgrad": True}),  # 1 − lr·wd < 0: −0.0
    "Adagrad": (optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.1}),
    "Adagrad initial": (optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.25}),
    "Adamax": (optim.Adamax, {"lr": 0.05, "weight_decay": 0.1}),
    "NAdam": (optim.NAdam, {"lr": 0.05, "weight_decay": 0.1}),
    "NAdam decoupled": (optim.NAdam, {"lr": 0.5, "weight_decay": 3.0, "decoupled_weight_decay": True}),
    "RAdam": (optim.RAdam, {"lr": 0.05, "weight_decay": 0.1}),
    "RAdam decoupled": (optim.RAdam, {"lr": 0.5, "weight_decay": 3.0, "decoupled_weight_decay": True}),
    "RMSprop": (optim.RMSprop, {"lr": 0.01, "weight_decay": 0.1}),
    "RMSprop centered": (optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9, "maximize": True}),
    "Rprop": (optim.Rprop, {"lr": 0.02}),
    "Adadelta": (optim.Adadelta, {"lr": 1.0, "weight_decay": 0.1}),
    "ASGD": (optim.ASGD, {"lr": 0.1, "t0": 2.0, "lambd": 0.01, "weight_decay": 0.1}),
    "ASGD decay above 1": (optim.ASGD, {"lr": 1.0, "lambd": 1.5}),
    "Adafactor": (optim.Adafactor, {"lr": 0.05, "weight_decay": 0.1}),
    "Adafactor decay above 1": (optim.Adafactor, {"lr": 0.5, "weight_decay": 3.0}),
}
_FUSED = (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad)  # on the CPU

OTHERS: dict[str, Make] = {
    "LBFGS": one(optim.LBFGS, lr=0.2, max_iter=4, history_size=3),
    "LBFGS strong_wolfe": one(optim.LBFGS, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
    "Muon": muon,
    "Muon and AdamW": muon_and_adamw,
    "SGD and Adagrad": split,
    "third party": one(Momentum),
}

DEFAULT: dict[str, Make] = {name: one(kind, **kw) for name, (kind, kw) in _IMPLEMENTED.items()} | OTHERS
"""Each variant once, in the implementation that torch chooses on a CPU (the loop)."""

IMPLEMENTATIONS: dict[str, Make] = (
    {f"{name}, loop": one(kind, **kw, foreach=False) for name, (kind, kw) in _IMPLEMENTED.items()}
    | {f"{name}, foreach": one(kind, **kw, foreach=True) for name, (kind, kw) in _IMPLEMENTED.items()}
    | {f"{name}, fused": one(kind, **kw, fused=True) for name, (kind, kw) in _IMPLEMENTED.items() if kind in _FUSED}
    | OTHERS
)
"""Each variant in each of its implementations."""


def needs_closure(optimizers: Iterable[Optimizer]) -> bool:
    return any(isinstance(optimizer, optim.LBFGS) for optimizer in optimizers)


def update(optimizers: list[Optimizer], loss: Callable[[], Tensor], touch: Callable[[], None] = lambda: None) -> None:
    """One step of the ordinary loop; `touch` is what the user does to gradients before the optimizers step."""

    def closure() -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        value = loss()
        value.backward()
        touch()
        return value

    if needs_closure(optimizers):
        for optimizer in optimizers:
            optimizer.step(closure)
        return
    closure()
    for optimizer in optimizers:
        optimizer.step()
