"""What the tests of handles share."""

from typing import Any

from torch import nn

from laws.training import TRAINING, Run

MANY = [*TRAINING, "Magnitude"]


def trained(model: nn.Module, optimizers: Any, steps: int, step: int = 0) -> None:
    Run(model, optimizers, step=step).train(step + steps)
