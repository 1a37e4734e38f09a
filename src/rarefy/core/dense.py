"""The dense gradient of one step, set aside when the gradient that the optimizer sees was cleared."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.core import bits


class Dense:
    """A whole gradient, split by a byte mask (None: nothing is masked): its kept part goes on, the rest stays here.

    whole: this rank's shard of it. scale: by what the kept part was multiplied since; None where that cannot be told.
    """

    def __init__(self, whole: Tensor, by: Tensor | None) -> None:
        self.whole = whole
        self.by = by
        self.scale: Tensor | None = None

    def follow(self, gradient: Tensor) -> None:
        """Scale the rest as the kept part was until it became `gradient`; the kept part is the gradient itself.

        Clipping by norm, unscaling, a reset to zero are scalings; of anything else, the scaling that comes nearest.
        """
        kept, now = self._kept(self.whole), self._kept(gradient)
        if torch.equal(kept, now) and bool(kept.count_nonzero()):  # nothing happened to it, as in most steps
            self.scale = kept.new_ones(())
            return
        kept = kept.double()
        square = kept.square().sum()
        rest = self.rest(self.whole)
        self.scale = ((kept * now.double()).sum() / square).to(rest.dtype) if square > 0 else None
        self.whole = (rest if self.scale is None else rest.mul_(self.scale)).add_(now)

    def rescale(self, scale: Tensor) -> None:
        """Where no kept part could tell: multiply by what others were."""
        if self.scale is None:
            self.whole.mul_(scale.to(self.whole))

    def put_back(self, gradient: Tensor) -> None:
        """Make a cleared gradient whole again."""
        gradient.detach().add_(self.rest(self.whole))

    def rest(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` with its kept part zero."""
        if self.by is None:
            return torch.zeros_like(tensor)
        return _cleared(tensor, ~self.by)

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if self.by is None else _cleared(tensor, self.by)


def _cleared(tensor: Tensor, keep: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    bits.clear_(copied, keep)
    return copied
