"""What the tests of zeros share: methods of every kind, and a loop that looks after each step."""

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

import optimizer_list
import rarefy
from rarefy import Cubic, Every, Sparsity
from recorder import loss_of, nonzeros

# Masks that stand still, that move with and without a dense gradient, that shrink; a dense weight behind a sparse one.
METHODS: dict[str, rarefy.Method] = {
    "static": rarefy.Random(0.7, allocation="uniform"),
    "RigL": rarefy.RigL(0.7, allocation="uniform", every=Every(2, 1.0)),
    "SET": rarefy.SET(0.7, allocation="uniform", every=Every(2, 1.0)),
    "GMP": rarefy.GMP(0.7, schedule=Cubic(start=1, end=6, every=2)),
    "SRSTE": rarefy.SRSTE(pattern="1:2"),
    "TopKAST": rarefy.TopKAST(0.7, density_backward=0.6, every=2),
    "channel": rarefy.Magnitude(0.5, pattern="channel"),
}


def train(
    model: nn.Module,
    optimizers: list[Optimizer],
    s: Sparsity,
    steps: int = 6,
    before: Callable[[int], None] = lambda step: None,
    touch: Callable[[], None] = lambda: None,
) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        before(step)
        optimizer_list.update(optimizers, lambda step=step: loss_of(model, step, dtype), touch)
        assert not nonzeros(s), step
        assert s.step == step + 1
