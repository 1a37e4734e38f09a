"""OWL: blocks whose inputs hold more outliers keep more.

Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity", 2023,
arXiv:2310.05175.

    D_ℓ = 100·share of the block's Wanda scores above M·their mean,  M = 5
    k_ℓ = (D_ℓ − min D)/(max D − min D)·2λ,  λ = 0.08;      keep_ℓ = k_ℓ − mean k + (1 − S)

In the code: M = `outlier`, λ = `width`, D = `shares`. n:m: k_ℓ = (D_ℓ − min D)/(max D − min D)·`group_width`, and a
block keeps n + round(k_ℓ − mean k) of m (the paper's: M = 6, 2 of a group of 8).

Deviations from the authors' code: means over blocks are weighted by size, so that the total is exact where blocks
differ; keep_ℓ is held between a tenth of 1 − S and 1, and the others take what that frees; n:m roundings are corrected
where they erred most until the total is nearest.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated

from pydantic import Field
from torch import Tensor

from rarefy.axes.budget import Allocation, Layer
from rarefy.axes.top_k import largest_remainder
from rarefy.axes.value import value


@value
class OWL(Allocation):
    """Args:
    outlier: M, how many times the mean makes an outlier. width: λ, half the range of the blocks' sparsities.
    group_width: the range of weights kept per group, for n:m.
    Only methods that see the inputs of each block can use it (Wanda, SparseGPT, ALPS).

    >>> OWL().densities([1.0, 3.0, 5.0], 0.7)
    [0.22, 0.3, 0.38]
    """

    outlier: Annotated[float, Field(gt=0)] = 5.0
    width: Annotated[float, Field(ge=0, lt=1)] = 0.08
    group_width: Annotated[float, Field(ge=0)] = 2.0

    needs_inputs = True

    def split(
        self, layers: Sequence[Layer], sparsity: float, scores: Sequence[Tensor] | None, pinned: Mapping[int, int]
    ) -> list[int]:
        """Raises ValueError: shapes alone do not say where outliers are; see `by_block`."""
        raise ValueError(
            f"{self} follows the outliers in the inputs of each block: use it with Wanda, SparseGPT or ALPS, which see "
            "them, or choose another allocation"
        )

    def by_block(
        self, layers: Sequence[Layer], blocks: Sequence[int], shares: Sequence[float], sparsity: float
    ) -> list[int]:
        """Units that each layer keeps; they sum to floor((1 − s)·units + ½).

        blocks: for each layer the index of its block. shares: D of each block.
        """
        sizes = [0] * len(shares)
        for layer, block in zip(layers, blocks, strict=True):
            sizes[block] += layer.units
        density = self.densities(shares, sparsity, sizes)
        ideal = [Fraction(density[block]) * layer.units for layer, block in zip(layers, blocks, strict=True)]
        return largest_remainder(ideal, self.total(layers, sparsity), [layer.units for layer in layers])

    def densities(self, shares: Sequence[float], sparsity: float, sizes: Sequence[int] | None = None) -> list[float]:
        """keep_ℓ of each block, to 12 decimals. sizes: units of each block (default: all the same)."""
        sizes = [1] * len(shares) if sizes is None else sizes
        wanted = [1 - sparsity + k for k in _centred(shares, 2 * self.width, sizes)]
        low, high = (1 - sparsity) / 10, 1.0
        target = (1 - sparsity) * sum(sizes)
        below, above = -1.0, 1.0
        shift = 0.0
        while above - below > 1e-15 and not math.isclose(_kept(wanted, shift, low, high, sizes), target, rel_tol=1e-14):
            below, above = (shift, above) if _kept(wanted, shift, low, high, sizes) < target else (below, shift)
            shift = (below + above) / 2
        return [round(min(high, max(low, keep + shift)), 12) for keep in wanted]

    def of_groups(self, shares: Sequence[float], n: int, m: int, sizes: Sequence[int] | None = None) -> list[int]:
        """n of each block, for a pattern of n:m on average; each from 1 to m.

        >>> OWL().of_groups([1.0, 3.0, 5.0], 4, 8)
        [3, 4, 5]
        """
        sizes = [1] * len(shares) if sizes is None else sizes
        ideal = [min(m, max(1, n + k)) for k in _centred(shares, self.group_width, sizes)]
        kept = [round(x) for x in ideal]
        while True:
            over = sum((have - n) * size for have, size in zip(kept, sizes, strict=True))
            step = -1 if over > 0 else 1
            movable = [i for i, have in enumerate(kept) if 1 <= have + step <= m and 0 < sizes[i] < 2 * abs(over)]
            if not movable:
                return kept
            kept[max(movable, key=lambda i: step * (ideal[i] - kept[i]))] += step


def _centred(shares: Sequence[float], span: float, sizes: Sequence[int]) -> list[float]:
    """Shares stretched to a range of `span`, with a weighted mean of zero; all zero where they do not differ."""
    least, most = min(shares), max(shares)
    stretched = [(d - least) / (most - least) * span if most > least else 0.0 for d in shares]
    mean = math.fsum(k * size for k, size in zip(stretched, sizes, strict=True)) / sum(sizes)
    return [k - mean for k in stretched]


def _kept(wanted: Sequence[float], shift: float, low: float, high: float, sizes: Sequence[int]) -> float:
    return math.fsum(min(high, max(low, keep + shift)) * size for keep, size in zip(wanted, sizes, strict=True))
