"""Constant fan-in: every output keeps the same number of inputs.

Lasby et al., "Dynamic Sparse Training with Structured Sparsity", 2023, arXiv:2305.02299.
"""

import math

from torch import Tensor

from rarefy.axes.patterns.base import Shape, WeightPattern
from rarefy.axes.top_k import ready, top_k_per_row
from rarefy.axes.value import value


@value
class ConstantFanIn(WeightPattern):
    """Every row of the (out, in·kernel) matrix keeps floor(k / rows) weights, so that it packs into a dense matrix.

    What a budget of k leaves over, k mod rows, is not kept. A mask is legal if all rows that keep anything keep as
    many; empty rows are ablated outputs.

    >>> import torch
    >>> ConstantFanIn().project(torch.tensor([[1., -4., 2.], [3., 0., 1.]]), 3).int()
    tensor([[0, 1, 0],
            [1, 0, 0]], dtype=torch.int32)
    """

    shorthand = "constant_fan_in"

    def asked(self, shape: Shape, sparsity: float | None) -> int:
        k = super().asked(shape, sparsity)
        return k - k % shape[0]

    def fill(self, keep: Tensor | None, scores: Tensor, k: int, shape: Shape) -> Tensor:
        self.check_units(scores, shape)
        if not 0 <= k <= len(scores):
            raise ValueError(f"{self}: asked to keep {k} of {len(scores)} weights; k must be from 0 to {len(scores)}")
        fan_in = k // shape[0]
        scores = ready(scores, keep)
        if keep is not None:
            self._check_quota(keep, fan_in, shape)
            scores = scores.masked_fill(keep, math.inf)
        return top_k_per_row(scores.reshape(shape[0], -1), fan_in).flatten()

    def legal(self, mask: Tensor) -> bool:
        if self.fits(mask.shape):
            return False
        fan_in = mask.flatten(1).sum(1)
        return bool((fan_in[fan_in > 0] == fan_in.max()).all())

    def fits(self, shape: Shape) -> str | None:
        if (reason := super().fits(shape)) or len(shape) > 1:
            return reason
        return f"{self} needs a matrix, got shape {tuple(shape)}; use 'unstructured' or skip the layer"

    def _check_quota(self, keep: Tensor, fan_in: int, shape: Shape) -> None:
        self.check_units(keep, shape)
        kept = keep.reshape(shape[0], -1).sum(1)
        if (most := int(kept.max())) > fan_in:
            raise ValueError(
                f"{self}: {most} weights of row {int(kept.argmax())} are to stay, but each of {shape[0]} rows keeps "
                f"{fan_in}; keep fewer"
            )
