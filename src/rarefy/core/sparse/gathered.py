"""The dense gradient of one step, kept as its factors and made a chunk of rows at a time: never whole.

dW = Σ over backward passes of factor · dyᵀ x. What scales the gradient after a pass (clipping, unscaling, another
loss scale) is read off the gradient of the non-zeros, as `core.dense` does for whole gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rarefy.core.sparse import kernels
from rarefy.core.sparse.structure import Structure

Factors = tuple[Tensor, Tensor]
"""The input x (tokens, in) and the gradient dy (tokens, out) of one use of a layer."""


class Gathered:
    """scale: by what the gradient was multiplied since the last pass; None where that cannot be told."""

    def __init__(self) -> None:
        self.factors: list[Factors] = []
        self.weights: list[Tensor] = []
        self.scale: Tensor | None = None
        self._kept = torch.zeros(0)

    def add(self, factors: Sequence[Factors], gradient: Tensor) -> None:
        """Another pass; `gradient` is what it left at the non-zeros."""
        self.factors += factors
        self.weights += [gradient.new_ones(())] * len(factors)
        self._kept = gradient.detach().clone()

    def follow(self, gradient: Tensor) -> None:
        """Scale as the non-zeros were scaled until they became `gradient`; of anything else, what comes nearest."""
        kept, now = self._kept, gradient.detach()
        if torch.equal(kept, now) and bool(kept.count_nonzero()):
            self.scale = kept.new_ones(())
            return
        square = kept.double().square().sum()
        self.scale = ((kept.double() * now.double()).sum() / square).to(kept.dtype) if square > 0 else None
        self._kept = now.clone()
        if self.scale is not None:
            self.multiply(self.scale)

    def rescale(self, scale: Tensor) -> None:
        """Where no non-zero could tell: multiply by what other gradients were."""
        if self.scale is None:
            self.multiply(scale)

    def multiply(self, scale: Tensor) -> None:
        self.weights = [weight * scale.to(weight.dtype) for weight in self.weights]

    def unscale(self, inverse: Tensor) -> None:
        """Multiply, as the gradient at the non-zeros was too."""
        self.multiply(inverse)
        self._kept.mul_(inverse.to(self._kept.dtype))

    def is_finite(self) -> bool:
        """Whether all factors are finite; then so is the gradient, unless the product overflows."""
        return all(bool(torch.isfinite(part).all()) for pair in self.factors for part in pair)

    def rows(self, structure: Structure, gradient: Tensor) -> Iterator[Tensor]:
        """Chunks of rows of the dense gradient, which is `gradient` at the non-zeros."""
        matrix = structure.by_row
        for first, last in matrix.chunks():
            begin, end = matrix.span(first, last)
            chunk = self._chunk(first, last, structure.cols, gradient)
            chunk.view(-1)[matrix.positions(first, last)] = gradient[begin:end]
            yield chunk

    def _chunk(self, first: int, last: int, cols: int, like: Tensor) -> Tensor:
        chunk: Tensor | None = None
        for (x, dy), weight in zip(self.factors, self.weights, strict=True):
            part = (dy[:, first:last].t() @ x).mul_(weight)
            chunk = part if chunk is None else chunk.add_(part)
        return like.new_zeros(last - first, cols) if chunk is None else chunk

    def at(self, structure: Structure, like: Tensor) -> Tensor:
        """The gradient at the non-zeros of any structure."""
        found = like.new_zeros(structure.nonzeros)
        for (x, dy), weight in zip(self.factors, self.weights, strict=True):
            found.add_(kernels.weight_gradient(structure.by_row, x, dy).mul_(weight))
        return found
