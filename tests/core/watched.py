"""What the tests of `core/watch` share: runs in float64, methods that move masks often, two optimizers, overflows."""

from typing import Any

import torch
from torch import nn, optim
from torch.optim import Optimizer

import optimizer_list
import rarefy
from rarefy import Every
from recorder import loss_of, net

F64 = torch.float64
WEIGHTS = ("0.weight", "2.weight")


def train(model: nn.Module, optimizers: list[Optimizer], begin: int, end: int) -> None:
    for step in range(begin, end):
        optimizer_list.update(optimizers, lambda step=step: loss_of(model, step, F64))


METHODS: dict[str, rarefy.Method] = {
    "Random": rarefy.Random(0.6, allocation="uniform"),
    "RigL": rarefy.RigL(0.6, allocation="uniform", every=Every(2, 1.0)),
    "ITOP": rarefy.ITOP(0.6, allocation="uniform", every=Every(3, 1.0)),
    "GraNet": rarefy.GraNet(0.6, every=Every(2, 1.0), schedule=rarefy.Cubic(initial=0.2, end=8, every=2)),
    "SRSTE": rarefy.SRSTE(pattern="1:2", decay=0.1),
    "TopKAST": rarefy.TopKAST(0.6, every=2, penalty=0.01),
}


def spoil_everything(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.mul_(float("inf"))


def pair(fused: bool = False) -> tuple[nn.Module, list[Optimizer]]:
    model = net(F64)
    first = optim.SGD(model[0].parameters(), lr=0.1, momentum=0.0 if fused else 0.9, fused=fused)
    return model, [first, optim.Adam(model[2].parameters(), lr=0.05, fused=fused)]


def backward(model: nn.Module, optimizers: list[Optimizer], step: int, scaler: Any = None) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = loss_of(model, step, F64)
    (loss if scaler is None else scaler.scale(loss)).backward()
