"""What the tests of gradients share: those of torch alone, and their norm."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recorder import checkered

F64 = torch.float64
WEIGHTS = ["0.weight", "2.weight"]


def sgd(model: nn.Module, **arguments: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | arguments)


def plain_gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """What torch alone gives for the weights as they are."""
    twin = copy.deepcopy(model)
    loss(twin).backward()
    return {name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None}


def masked(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: g * checkered(g.shape) if n in WEIGHTS else g for n, g in gradients.items()}


def total_norm(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()


def plain_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
