"""DSnoT: exchange pruned and kept weights row by row, without training, so that the expected error shrinks.

Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", 2023, arXiv:2310.08915.

    D_rc = W_rc·μ_c;   ε_r = Σ over pruned c of D_rc;   while |ε_r| is above the threshold:
    ε > 0: grow the pruned weight of largest D/var, drop the kept one of least Wanda score with D < 0;  ε < 0: mirrored
    ε ← ε + D(dropped) − D(grown)

In the code: μ_c = the mean input of a token, times 2048; so the paper's threshold of 0.1, meant for sums over sequences
of 2048 tokens, holds for any length. At most `cycles` weights of each row can move, hence only so many candidates of
each row are ever looked at: four lists, chosen before the loop, which itself works on one number per row. n:m: the
dropped weight is that of least Wanda score in the group of the grown one.

Deviations from the authors' code: an exchange that would turn the sign of ε is not made and ends the row
(theirs: only for n:m, by default); cycles are capped at 5 % of the inputs; a row ends when its candidates of the right
sign are exhausted (theirs goes on, exchanges kept for kept, and loses count). `faithful=True` lifts the first two and
takes μ as the sum over a sequence as it is; row counts stay exact. Attention and MLP alike (theirs skips the MLP).
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rarefy.axes import NM, Block, Channel, Pattern, Unstructured, value
from rarefy.core.capture.statistics import Statistics
from rarefy.core.method import register
from rarefy.methods.one_shot.layerwise import MethodField, Stage
from rarefy.methods.one_shot.matrix import Matrix, Solved
from rarefy.methods.one_shot.wanda import wanda_scores

_SEQUENCE = 2048  # tokens of the sequences that the paper's threshold is meant for


def dsnot(
    weight: Tensor,
    mask: Tensor,
    statistics: Statistics,
    pattern: Pattern | None = None,
    *,
    cycles: int = 50,
    threshold: float = 0.1,
    faithful: bool = False,
    line: int | None = None,
) -> Tensor:
    """A mask with as many weights in each row (each group, for n:m) and less expected error.

    weight: (out, in), floating. mask: bool, the same shape. statistics: of the inputs; its sums, squares and variances.
    pattern: unstructured (also for constant fan-in) or n:m. line: see `Matrix`.
    """
    length = statistics.tokens / max(1, statistics.sequences) if faithful else _SEQUENCE
    mean = statistics.sums / max(1, statistics.tokens) * length
    change = weight.double() * mean
    scores = wanda_scores(weight.double(), statistics.squares)
    if not faithful:
        cycles = min(cycles, max(1, math.ceil(weight.shape[1] / 20)))
    state = _State(mask.clone(), change, torch.where(mask, 0.0, change).sum(1))
    grow = _Growers.of(change, _variance(statistics), mask, cycles)
    keeps_sign = not faithful or isinstance(pattern, NM)
    if isinstance(pattern, NM):
        drop: _Droppers | _GroupDroppers = _GroupDroppers(scores, mask, pattern.m, line or weight.shape[1])
    else:
        drop = _Droppers.of(change, scores, mask, cycles)
    active = state.error.abs() > threshold
    for _ in range(cycles):
        if not bool(active.any()):
            break
        up = state.error > 0
        grown, found = grow.next(up)
        dropped, others = drop.next(up, grown)
        active = active & found & others
        after = state.after(grown, dropped)
        if keeps_sign:
            active = active & (after.sign() == state.error.sign())
        state.exchange(active, grown, dropped, after)
        grow.used(active, up)
        drop.used(active, up, grown, dropped)
        active = active & (state.error.abs() > threshold)
    return state.mask


def _variance(statistics: Statistics) -> Tensor:
    """Of each input; a constant one counts as nearly so, not as infinitely certain."""
    variance = statistics.within / max(1, statistics.tokens)
    most = float(variance.max()) if len(variance) else 0.0
    return variance.clamp_min(1e-12 * most) if most > 0 else torch.ones_like(variance)


@dataclass
class _State:
    mask: Tensor
    change: Tensor  # D
    error: Tensor  # ε, one a row

    def after(self, grown: Tensor, dropped: Tensor) -> Tensor:
        return self.error + self._at(dropped) - self._at(grown)

    def exchange(self, rows: Tensor, grown: Tensor, dropped: Tensor, after: Tensor) -> None:
        where = rows.nonzero()[:, 0]
        self.mask[where, grown[where]] = True
        self.mask[where, dropped[where]] = False
        self.error = torch.where(rows, after, self.error)

    def _at(self, column: Tensor) -> Tensor:
        return self.change.gather(1, column[:, None])[:, 0]


@dataclass
class _List:
    """For each row its candidates in order: columns (out, cycles), how many are real, and how many are used."""

    columns: Tensor
    length: Tensor
    at: Tensor

    @classmethod
    def of(cls, keys: Tensor, candidates: Tensor, cycles: int) -> "_List":
        """Candidates of least key first; ties to the lower index."""
        keys = torch.where(candidates, keys, math.inf)
        columns = _lowest(keys, min(cycles, keys.shape[1]))
        length = candidates.sum(1).clamp_max(columns.shape[1])
        return cls(columns, length, torch.zeros_like(length))

    def next(self) -> tuple[Tensor, Tensor]:
        """The next column of each row, and whether there is one."""
        last = self.columns.shape[1] - 1
        return self.columns.gather(1, self.at.clamp_max(last)[:, None])[:, 0], self.at < self.length


def _lowest(keys: Tensor, n: int) -> Tensor:
    """Columns of the n least keys of each row, ascending, ties among them to the lower index: (out, n)."""
    some = keys.topk(n, dim=1, largest=False).indices.sort(dim=1).values
    return some.gather(1, keys.gather(1, some).sort(dim=1, stable=True).indices)


@dataclass
class _Growers:
    """Pruned weights, of largest D/var first where D > 0, and of least first where D < 0."""

    positive: _List
    negative: _List

    @classmethod
    def of(cls, change: Tensor, variance: Tensor, mask: Tensor, cycles: int) -> "_Growers":
        ratio = change / variance
        return cls(_List.of(-ratio, ~mask & (change > 0), cycles), _List.of(ratio, ~mask & (change < 0), cycles))

    def next(self, up: Tensor) -> tuple[Tensor, Tensor]:
        return _either(up, self.positive.next(), self.negative.next())

    def used(self, rows: Tensor, up: Tensor) -> None:
        self.positive.at += rows & up
        self.negative.at += rows & ~up


@dataclass
class _Droppers:
    """Kept weights of least Wanda score first: with D < 0 for rows whose ε is positive, with D > 0 for the others."""

    negative: _List
    positive: _List

    @classmethod
    def of(cls, change: Tensor, scores: Tensor, mask: Tensor, cycles: int) -> "_Droppers":
        return cls(_List.of(scores, mask & (change < 0), cycles), _List.of(scores, mask & (change > 0), cycles))

    def next(self, up: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        return _either(up, self.negative.next(), self.positive.next())

    def used(self, rows: Tensor, up: Tensor, grown: Tensor, dropped: Tensor) -> None:
        self.negative.at += rows & up
        self.positive.at += rows & ~up


class _GroupDroppers:
    """n:m: the kept weight of least Wanda score in the group of the grown one; none is used twice."""

    def __init__(self, scores: Tensor, mask: Tensor, m: int, line: int) -> None:
        column = torch.arange(scores.shape[1], device=scores.device)
        start = column - column % line % m
        end = torch.minimum(start + m, column - column % line + line)
        places = start[:, None] + torch.arange(m, device=scores.device)
        self.inside = places < end[:, None]
        self.places = places.clamp_max(scores.shape[1] - 1)
        self.scores = torch.where(mask, scores, math.inf)

    def next(self, up: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        places = self.places[grown]
        scores = self.scores.gather(1, places).masked_fill(~self.inside[grown], math.inf)
        least, which = scores.min(1)
        return places.gather(1, which[:, None])[:, 0], least < math.inf

    def used(self, rows: Tensor, up: Tensor, grown: Tensor, dropped: Tensor) -> None:
        where = rows.nonzero()[:, 0]
        self.scores[where, dropped[where]] = math.inf


def _either(up: Tensor, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.where(up, one[0], other[0]), torch.where(up, one[1], other[1])


@register
@value
class DSnoT(Stage):
    """Args:
    method: what chooses the first mask and leaves weights as they are: `Wanda(0.5)`, `Magnitude(0.5)`.
    cycles: most exchanges in a row. threshold: of |ε|, for sequences of 2048 tokens.
    faithful: the published loop, for wide layers: no test of the sign, no cap on cycles, the threshold as it is.
    Needs `data`. Raises ValueError for patterns other than unstructured, constant fan-in and n:m, and for methods that
    update weights: a mask made for other weights is worse than magnitude's.

    >>> from rarefy.methods.one_shot.wanda import Wanda
    >>> print(DSnoT(Wanda(0.5), cycles=20))
    DSnoT(method=Wanda(sparsity=0.5), cycles=20)
    """

    method: MethodField
    cycles: Annotated[int, Field(ge=1)] = 50
    threshold: Annotated[float, Field(ge=0)] = 0.1
    faithful: bool = False

    paper = "Zhang et al. 2023, arXiv:2310.08915"
    extra_cost = "those of its method"

    def __post_init__(self) -> None:
        if isinstance(self.pattern, Block | Channel):
            raise ValueError(
                f"DSnoT exchanges single weights, but {self.method} keeps units of the pattern {self.pattern}; choose "
                "unstructured, constant_fan_in or n:m"
            )
        if getattr(self.method, "rewrites", False):
            raise ValueError(
                f"DSnoT refines a mask, but {self.method} updates weights to go with its own; refine Wanda or "
                "Magnitude, and refit afterwards: Refit(DSnoT(Wanda(0.5)))"
            )

    def solve(self, matrix: Matrix) -> Solved:
        """The refined mask."""
        pattern = matrix.pattern if isinstance(matrix.pattern, NM) else Unstructured()
        refined = dsnot(
            matrix.weight,
            self.first(matrix).mask,
            matrix.statistics,
            pattern,
            cycles=self.cycles,
            threshold=self.threshold,
            faithful=self.faithful,
            line=matrix.line,
        )
        return Solved(refined)
