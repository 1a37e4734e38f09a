"""What every pattern can do. A new pattern is one file here with a subclass of `Pattern`, imported in `pattern.py`.

A pattern cuts a weight of the canonical shape (out, in, *kernel) into *units* that are kept or dropped whole: weights,
tiles, rows. Scores and choices of units are 1-D tensors in an order that the pattern fixes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rarefy.axes.top_k import count, top_k
from rarefy.axes.value import Value

Shape = Sequence[int]

Pool = Literal["mean_abs", "abs_mean", "mean"]
"""How the scores in a unit become one: mean |x| (norms), |mean x| (first-order saliencies), mean x (signed)."""


class Pattern(Value, ABC):
    """Where zeros may lie.

    fixed: how many weights are kept follows from the pattern, a sparsity is not asked for.
    elementwise: the pattern is blind to the position of a weight, so that any layout will do.
    shorthand: how the pattern is written as text; a pattern with fields overrides `from_text` and `__str__`.
    """

    fixed: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    shorthand: ClassVar[str] = ""

    @classmethod
    def from_text(cls, text: str) -> "Pattern | None":
        """The pattern that this shorthand means, None if it is another pattern's."""
        return cls() if text == cls.shorthand else None

    def __str__(self) -> str:
        return self.shorthand or super().__str__()

    @abstractmethod
    def units(self, shape: Shape) -> int:
        """Number of units in a weight of this canonical shape."""

    @abstractmethod
    def members(self, t: Tensor) -> Tensor:
        """A canonical tensor as (units, members of a unit); short units are padded with zeros."""

    @abstractmethod
    def spread(self, units: Tensor, shape: Shape) -> Tensor:
        """Kept units (bool, 1-D) as a contiguous canonical mask of this shape; it may share their memory."""

    def sizes(self, shape: Shape) -> Tensor | int:
        """Weights in each unit: one number for all, or a 1-D tensor."""
        return _numel(shape) // self.units(shape)

    def fits(self, shape: Shape) -> str | None:
        """None if a weight of this canonical shape can carry the pattern, else the reason and what would work."""
        return None if len(shape) and _numel(shape) else f"{self} needs weights, got an empty shape {tuple(shape)}"

    def whole(self, shape: Shape) -> bool:
        """Whether at least one unit or group is complete."""
        return self.fits(shape) is None

    def asked(self, shape: Shape, sparsity: float | None) -> int:
        """Units to keep in one weight of this shape: floor((1 − s)·units + ½). Raises ValueError without a sparsity."""
        if sparsity is None:
            raise ValueError(
                f"{self} needs a sparsity, in [0, 1), to know how many of {self.units(shape)} units to keep"
            )
        return count(sparsity, self.units(shape))

    def pool(self, scores: Tensor, how: Pool = "mean_abs") -> Tensor:
        """Canonical scores (floating) → one score for each unit (1-D).

        A unit of one weight keeps the dtype; sums over several are float64 in an order that depends on nothing but the
        size of the unit: neither on threads nor on the device.
        """
        self.require(scores.shape)
        members = self.members(scores.detach())
        if how == "mean_abs":
            members = members.abs()
        means = members[:, 0] if members.shape[1] == 1 else _ordered_sum(members) / self._sizes_on(scores)
        return means.abs() if how == "abs_mean" else means

    def gather(self, mask: Tensor) -> Tensor:
        """Canonical bool mask → bool for each unit: whether anything of it is kept. Inverts `spread`."""
        self.require(mask.shape)
        members = self.members(mask)
        return members[:, 0] if members.shape[1] == 1 else members.any(1)

    def fill(self, keep: Tensor | None, scores: Tensor, k: int, shape: Shape) -> Tensor:
        """Keep `keep` and add the best of the other units, until k are kept.

        keep: bool (units,), None for nothing. scores: (units,), as `pool` returns them, finite where not kept.
        Returns bool (units,). Ties go to the lower index. Raises ValueError if `keep` already exceeds what may be kept.
        """
        self.check_units(scores, shape)
        if keep is None:
            return top_k(scores, k)
        self.check_units(keep, shape)
        kept = int(keep.sum())
        if kept > k:
            raise ValueError(f"{self}: {kept} units are to stay, but only {k} of {len(scores)} may; keep fewer")
        return keep | top_k(scores, k - kept, among=~keep)

    def project(self, scores: Tensor, k: int, how: Pool = "mean_abs") -> Tensor:
        """The legal canonical mask that keeps the k units of highest pooled score.

        scores: canonical, floating, finite. Returns a bool mask of the same shape.
        Raises ValueError if the shape does not fit or k is impossible.
        """
        return self.spread(self.fill(None, self.pool(scores, how), k, scores.shape), scores.shape)

    def legal(self, mask: Tensor) -> bool:
        """Whether a canonical bool mask obeys the pattern, whatever its density."""
        return self.fits(mask.shape) is None and torch.equal(self.spread(self.gather(mask), mask.shape), mask)

    def require(self, shape: Shape) -> None:
        """Raises ValueError unless a weight of this canonical shape fits."""
        if reason := self.fits(shape):
            raise ValueError(reason)

    def check_units(self, units: Tensor, shape: Shape) -> None:
        """Raises ValueError unless `units` is 1-D and has one entry for each unit of this canonical shape."""
        self.require(shape)
        if tuple(units.shape) != (self.units(shape),):
            raise ValueError(
                f"{self}: a weight of shape {_times(shape)} has {self.units(shape)} units, got a tensor of shape "
                f"{tuple(units.shape)}; make it with pool or gather"
            )

    def _sizes_on(self, like: Tensor) -> Tensor | int:
        sizes = self.sizes(like.shape)
        return sizes.to(like.device) if isinstance(sizes, Tensor) else sizes


class WeightPattern(Pattern):
    """A pattern whose unit is one weight, in row order; subclasses limit which weights go together."""

    def units(self, shape: Shape) -> int:
        return _numel(shape)

    def members(self, t: Tensor) -> Tensor:
        return t.reshape(-1, 1)

    def spread(self, units: Tensor, shape: Shape) -> Tensor:
        self.check_units(units, shape)
        return units.reshape(tuple(shape))


def _ordered_sum(x: Tensor) -> Tensor:
    """Sum over dim 1 in float64, the second half onto the first again and again: only elementwise additions, so that
    the result is the same to the last bit for any number of threads, memory layout and device."""
    x = x.double()
    while x.shape[1] > 1:
        half = (x.shape[1] + 1) // 2
        rest = x.shape[1] - half
        x = torch.cat([x[:, :rest] + x[:, half:], x[:, rest:half]], 1)
    return x[:, 0]


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape))
