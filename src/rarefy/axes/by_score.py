"""Allocations that let all layers' scores compete: global and LAMP."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rarefy.axes.budget import Allocation, Layer, unpinned_budget
from rarefy.axes.top_k import top_k
from rarefy.axes.value import value


@value
class Global(Allocation):
    """The best scores of all layers together; ties to the earlier layer.

    Layers may collapse; `AtLeast` gives each a floor.

    >>> from rarefy.axes import Unstructured
    >>> layers = [Layer("a", (1, 2), 2, Unstructured()), Layer("b", (1, 2), 2, Unstructured())]
    >>> Global().counts(layers, 0.5, [torch.tensor([4.0, 3.0]), torch.tensor([1.0, 2.0])])
    [2, 0]
    """

    needs_scores = True

    def rank(self, scores: Tensor) -> Tensor:
        """One layer's scores, as they compete with other layers'."""
        return scores

    def split(
        self, layers: Sequence[Layer], sparsity: float, scores: Sequence[Tensor] | None, pinned: Mapping[int, int]
    ) -> list[int]:
        """How many of each layer's units are among the best of all layers that are not pinned."""
        assert scores is not None  # `counts` has checked them
        rest = unpinned_budget(layers, self.total(layers, sparsity), pinned, asked=str(self))
        free = [i for i in range(len(layers)) if i not in pinned]
        counts = [pinned.get(i, 0) for i in range(len(layers))]
        if free:
            device = scores[free[0]].device
            chosen = top_k(torch.cat([self.rank(scores[i]).to(device) for i in free]), rest)
            start = 0
            for i in free:
                counts[i] = int(chosen[start : start + layers[i].units].sum())
                start += layers[i].units
        return counts


@value
class Lamp(Global):
    """LAMP: global on each layer's squared scores over the sum of those at least as large.

    Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", 2021, arXiv:2010.07611.

    The best of every layer has the score 1, so no layer collapses before every layer is at its last unit; but a layer
    of zeros has the score 0. Scores must be ≥ 0. It yields amounts; the order within a layer stays that of the scores.
    """

    def rank(self, scores: Tensor) -> Tensor:
        """The LAMP scores."""
        return lamp_scores(scores)

    def check_scores(self, name: str, scores: Tensor) -> None:
        """Raises ValueError for a negative score."""
        if (scores < 0).any():
            raise ValueError(
                f"{self}: {name!r} has negative scores, whose squares would rank highest; "
                "use a score that is never negative (magnitude), or global"
            )


def lamp_scores(weights: Tensor) -> Tensor:
    """LAMP of one layer: w_u² / Σ_{v ≥ u} w_v², the weights sorted ascending by w².

    weights: any shape and floating dtype, finite. Of equal weights the first has the highest score; a layer of zeros
    has the score 0. Returns float64 of the same shape, the same on every device.

    >>> lamp_scores(torch.tensor([1.0, -2.0, 3.0, -4.0]))
    tensor([0.0333, 0.1379, 0.3600, 1.0000], dtype=torch.float64)
    """
    size = weights.detach().flatten().double().abs()
    if not size.numel() or not size.any():
        return torch.zeros_like(weights, dtype=torch.float64)
    # A power of two is exact and cancels; it keeps the squares in range.
    _, exponent = math.frexp(size.max().item())
    order = size.argsort(descending=True, stable=True)
    squares = (size[order] * math.ldexp(1.0, min(1023, -exponent))) ** 2
    # One after the other, on the CPU: other devices sum in another order, and masks must not depend on the device.
    sums = squares.cpu().cumsum(0).to(squares.device)
    return torch.empty_like(size).index_copy_(0, order, squares / sums).view_as(weights)
