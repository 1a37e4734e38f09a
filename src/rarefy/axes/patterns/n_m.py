"""N:M: n kept of every m consecutive inputs.

Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv:2104.08378 (2:4);
Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021, arXiv:2102.04010.
"""

import math
import re
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rarefy.axes.patterns.base import Shape, WeightPattern
from rarefy.axes.top_k import from_array, ready, top_k_per_row
from rarefy.axes.value import value

_MOST_RANKED = 64  # beyond, comparing all pairs of a group is slower than selecting (measured); int8 ends at 128


@value
class NM(WeightPattern):
    """n weights are **kept** of every m consecutive inputs.

    Units are weights in the order (out, *kernel, in): in a convolution the groups run along the input channels, at each
    position of the kernel. If the inputs are no multiple of m, the last group of each row is short: of its L weights
    ceil(n·L / m) are kept. How many are kept is thereby fixed; a sparsity and a count are ignored.
    Raises ValueError unless 1 ≤ n ≤ m.

    >>> import torch
    >>> NM(2, 4).project(torch.tensor([[.1, -.4, .3, .2, 1., -1., .5]]), 0).int()
    tensor([[0, 1, 1, 0, 1, 1, 0]], dtype=torch.int32)
    """

    n: Annotated[int, Field(ge=1)]
    m: Annotated[int, Field(ge=1)]
    fixed = True
    shorthand = "n:m such as 2:4 (2 kept of 4)"

    def __post_init__(self) -> None:
        if self.n > self.m:
            raise ValueError(f"n is how many are kept of m, so n must be at most m = {self.m}, got {self.n}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def from_text(cls, text: str) -> "NM | None":
        found = re.fullmatch(r"(\d+):(\d+)", text)
        return cls(int(found[1]), int(found[2])) if found else None

    def asked(self, shape: Shape, sparsity: float | None = None) -> int:
        """Weights that the pattern keeps; the sparsity is ignored."""
        full, short = divmod(shape[1], self.m)
        return (full * self.n + self._quota(short)) * (self.units(shape) // shape[1])

    def members(self, t: Tensor) -> Tensor:
        return t.movedim(1, -1).reshape(-1, 1)

    def spread(self, units: Tensor, shape: Shape) -> Tensor:
        self.check_units(units, shape)
        return units.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()

    def fill(self, keep: Tensor | None, scores: Tensor, k: int, shape: Shape) -> Tensor:
        """As `Pattern.fill`, until every group has its quota: k is ignored."""
        self.check_units(scores, shape)
        scores = ready(scores, keep)
        if keep is not None:
            self._check_quotas(keep, shape)
            scores = scores.masked_fill(keep, math.inf)
        full, short = self._groups(scores, shape)
        best = _best(full, self.n)
        if short.numel():
            best = torch.cat([best.reshape(len(short), -1), _best(short, self._quota(short.shape[1]))], 1)
        return best.flatten()

    def legal(self, mask: Tensor) -> bool:
        """Whether every group keeps exactly its quota."""
        if self.fits(mask.shape):
            return False
        full, short = self._groups(self.gather(mask), mask.shape)
        return bool((full.sum(1) == self.n).all()) and bool((short.sum(1) == self._quota(short.shape[1])).all())

    def fits(self, shape: Shape) -> str | None:
        if (reason := super().fits(shape)) or len(shape) > 1:
            return reason
        return (
            f"{self} needs a weight of shape (out, in, ...), got {tuple(shape)}; use 'unstructured' or skip the layer"
        )

    def whole(self, shape: Shape) -> bool:
        return super().whole(shape) and shape[1] >= self.m

    def _quota(self, length: int) -> int:
        return -(-self.n * length // self.m)

    def _groups(self, units: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """The full groups (groups, m), and the short last group of each row (rows, in mod m)."""
        rows = units.reshape(-1, shape[1])
        end = shape[1] - shape[1] % self.m
        return rows[:, :end].reshape(-1, self.m), rows[:, end:]

    def _check_quotas(self, keep: Tensor, shape: Shape) -> None:
        self.check_units(keep, shape)
        for groups in self._groups(keep, shape):
            quota = self._quota(groups.shape[1])
            if groups.numel() and (most := int(groups.sum(1).max())) > quota:
                raise ValueError(
                    f"{self}: {most} weights of a group of {groups.shape[1]} are to stay, but it keeps {quota}; "
                    "keep fewer"
                )


def _best(groups: Tensor, n: int) -> Tensor:
    """The n largest of each row of (groups, m), ties to the lower index."""
    m = groups.shape[1]
    if not groups.numel() or m > _MOST_RANKED:
        return top_k_per_row(groups, n)
    flat = groups.reshape(-1)
    place = from_array(np.tile(np.arange(m, dtype=np.int8), len(groups))).to(groups.device)
    # rank = how many of the group come first, less n: at first all to the left, then corrected pair by pair. Whole
    # vectors are compared with themselves shifted, which crosses groups: `place` takes those pairs out again.
    ranks = place - n
    for distance in range(1, m):
        outside = (place[distance:] - distance) >> 7  # −1 where the earlier one is in another group, else 0
        later_wins = _greater(flat[distance:], flat[:-distance]).bitwise_and_(outside.bitwise_not_())
        ranks[:-distance] += later_wins
        ranks[distance:] -= later_wins
    return (ranks.view(torch.uint8) >> 7).view(torch.bool).view(groups.shape)  # the sign bit: rank below n


def _greater(a: Tensor, b: Tensor) -> Tensor:
    """a > b as int8 0 and 1; numpy's comparison is vectorised where torch's, with a boolean result, is not."""
    if a.device.type == "cpu" and a.dtype in (torch.float32, torch.float64, torch.float16):
        return from_array(np.greater(a.numpy(), b.numpy()).view(np.int8))
    return (a > b).view(torch.int8)
