"""One matrix at a time: what a layer-wise solver sees and returns, and masks within groups of rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rarefy.axes import NM, Block, Channel, ConstantFanIn, Pattern
from rarefy.axes.patterns.unstructured import Unstructured
from rarefy.axes.top_k import top_k, top_k_per_row
from rarefy.core.capture.statistics import Statistics

Group = Literal["row", "layer"]
"""What is compared: the units of one output row, or of the whole matrix."""

_CACHED = 1 << 19
_SAMPLED = 1 << 15
_SAMPLE = 4096


@dataclass
class Matrix:
    """One matrix of one site, as solvers see it. Nothing here is to be written to, but for `shared`.

    name: of the site. weight: (out, in), float32 or float64. statistics: of its inputs. keep: units of the pattern to
    keep. sparsity: the share of units to drop, exact. mask: given by an earlier stage. line: consecutive columns that
    groups of n:m lie in (a convolution: its input channels); None: all. shared: of all matrices that read the same
    inputs, for what is computed once.
    """

    name: str
    weight: Tensor
    statistics: Statistics
    pattern: Pattern
    keep: int
    sparsity: Fraction
    mask: Tensor | None = None
    line: int | None = None
    shared: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def gram(self) -> Tensor:
        """Σ x xᵀ, in the weight's dtype. Raises ValueError where none was collected."""
        if (gram := self.statistics.gram) is None:
            raise ValueError(f"{self.name!r}: its inputs were seen without Σ x xᵀ, which this method solves with")
        return gram.to(self.weight.dtype)


@dataclass
class Solved:
    """mask: bool (out, in). weight: the new values, (out, in); None: kept weights stay as they are."""

    mask: Tensor
    weight: Tensor | None = None


def exact_share(sparsity: float) -> Fraction:
    """The decimal that was written: 0.7 → 7/10."""
    return Fraction(str(float(sparsity)))


def quota(sparsity: Fraction, units: int) -> int:
    """floor((1 − s)·units + ½)."""
    return math.floor((1 - sparsity) * units + Fraction(1, 2))


def layer_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """Σ over calibration inputs of ‖x (W − Ŵ)ᵀ‖² = tr((W − Ŵ) G (W − Ŵ)ᵀ).

    weight, pruned: (out, in). gram: (in, in), Σ x xᵀ, or another positive multiple of it. Rows are taken in chunks and
    summed in float64.

    >>> layer_error(torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    3.0
    """
    return float(row_errors(weight, pruned, gram).sum())


def row_errors(weight: Tensor, pruned: Tensor, gram: Tensor) -> Tensor:
    """The summands of `layer_error`: (out,), float64."""
    found = [torch.zeros(0, dtype=torch.float64, device=weight.device)]
    for rows, others in zip(weight.split(len(gram)), pruned.split(len(gram)), strict=True):
        difference = (rows - others).to(gram.dtype)
        found.append((difference @ gram).mul_(difference).sum(1, dtype=torch.float64))
    return torch.cat(found)


def choose_mask(
    scores: Tensor, pattern: Pattern, keep: int, sparsity: Fraction, group: Group = "layer", line: int | None = None
) -> Tensor:
    """The mask that keeps the best units of each group. Ties go to the lower index.

    scores: (out, in), ≥ 0. keep: units of the whole matrix; taken with group="layer". sparsity: taken with "row", where
    each row (of tiles, for blocks) keeps floor((1 − s)·units of a row + ½). n:m and channels are their own groups.

    >>> scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [8.0, 7.0, 6.0, 5.0]])
    >>> choose_mask(scores, Unstructured(), 4, Fraction(1, 2), "row").int()
    tensor([[1, 1, 0, 0],
            [1, 1, 0, 0]], dtype=torch.int32)
    """
    if isinstance(pattern, NM):
        return pattern.project(scores.reshape(-1, line or scores.shape[1]), 0).reshape(scores.shape)
    if isinstance(pattern, ConstantFanIn):
        return top_k_per_row(scores, keep // len(scores))
    if isinstance(pattern, Unstructured):
        if group == "row":
            return top_k_per_row(scores, quota(sparsity, scores.shape[1]))
        return largest(scores, keep)
    units = pattern.pool(scores)
    if group == "layer" or isinstance(pattern, Channel) or not isinstance(pattern, Block):
        return pattern.spread(pattern.fill(None, units, keep, scores.shape), scores.shape)
    bands = units.view(-(-len(scores) // pattern.rows), -1)
    return pattern.spread(top_k_per_row(bands, quota(sparsity, bands.shape[1])).flatten(), scores.shape)


def rows_at_once(weight: Tensor, pattern: Pattern, group: Group) -> int:
    """How many rows `choose_mask` may be given at a time, so that scores stay in the caches; all, where all compare.

    >>> rows_at_once(torch.ones(4096, 2048), NM(2, 4), "layer"), rows_at_once(torch.ones(9, 5), Unstructured(), "layer")
    (256, 9)
    """
    if isinstance(pattern, NM | ConstantFanIn) or (group == "row" and isinstance(pattern, Unstructured | Block)):
        step = pattern.rows if isinstance(pattern, Block) else 1
        return max(1, _CACHED // (step * max(1, weight.shape[1]))) * step
    return max(1, len(weight))


def largest(scores: Tensor, k: int) -> Tensor:
    """As `axes.top_k`: exactly the k largest, ties to the lower index; faster where about half is kept.

    A sample brackets the k-th score; what lies within the bracket alone is selected from. scores: finite.

    >>> largest(torch.tensor([[1.0, 3.0], [3.0, 3.0]]), 2)
    tensor([[False,  True],
            [ True, False]])
    """
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return top_k(scores, k)
    flat = scores.detach().reshape(-1).numpy()
    mask = np.zeros(len(flat), dtype=bool)
    if 0 < k < len(flat):
        _select(flat, k, mask)
    elif k:
        mask[:] = True
    return torch.from_numpy(mask).view(scores.shape)


def _select(flat: Any, k: int, mask: Any) -> None:
    """Set `mask` where the k largest are."""
    low, high = _bracket(flat, k)
    above = flat > high
    places = np.flatnonzero((flat >= low) & ~above)
    left = k - int(np.count_nonzero(above))
    if not 0 <= left <= len(places):  # the sample misled
        above, places, left = np.zeros_like(above), np.arange(len(flat)), k
    mask |= above
    if left:
        values = flat[places]
        threshold = np.partition(values, len(values) - left)[len(values) - left]
        mask[places[values > threshold]] = True
        tied = places[values == threshold]
        mask[tied[: left - int(np.count_nonzero(values > threshold))]] = True


def _bracket(flat: Any, k: int) -> tuple[float, float]:
    if len(flat) < _SAMPLED:
        return -math.inf, math.inf
    sample = np.sort(flat[:: len(flat) // _SAMPLE | 1])  # an odd step: no column is favoured
    share = 1 - k / len(flat)
    spread = int(5 * math.sqrt(len(sample) * share * (1 - share))) + 8
    at = int(share * len(sample))
    low = sample[at - spread] if at >= spread else -math.inf
    high = sample[at + spread] if at + spread < len(sample) else math.inf
    return float(low), float(high)
