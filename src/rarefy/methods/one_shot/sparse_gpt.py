"""SparseGPT: least-squares pruning, column by column, with one Hessian for all rows.

Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023, arXiv:2301.00774.

    H = (2/tokens)·Σ x xᵀ + λI,  λ = 0.01·mean diag;   H⁻¹ = Uᵀ U,  U upper triangular
    in column order: drop the weights of least w²/U_jj², and let e = (w − q)/U_jj move the columns right by
    −e·U_j

In the code there is no inverse. With H = R Rᵀ, R upper triangular, U = R⁻¹; and with δ = W − Q (dense less final), the
completion of the columns ≥ j that the errors of those before call for has

    δ_j = −Σ_{i<j} δ_i·R_ij / R_jj    (kept: q = w − δ_j)         δ_j = W_j    (dropped: q = 0)

so one Cholesky factorization and one pass over δ replace two factorizations, an inverse and the updates of W. N = R
with its columns divided by R_jj. The pass halves its columns again and again: what the left half hands to the right
half is one matrix product. Scores of a block or group before its turn need the joint completion within it: a small
triangular solve with N.

Deviations from the authors' code: exactly floor((1 − s)·entries so far + ½) are kept after each block of columns; a
block is a whole number of groups; where H is not positive definite, float64 and then 10 times the damping are tried,
with a warning; a weight whose input was always zero is dropped first, keeps its value where it is kept, and has no say
in the mean diagonal. The factor 2/tokens cancels and is left out.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rarefy.axes import NM, Block, Channel, ConstantFanIn, Pattern, Unstructured, value
from rarefy.core.method import register
from rarefy.methods.one_shot.layerwise import Pruner
from rarefy.methods.one_shot.matrix import Matrix, Solved, choose_mask, largest

_LEAF = 8  # columns taken one by one between two matrix products (measured)
_TRIES = 8


@dataclass
class Factor:
    """H + λI = R Rᵀ. unit: N, R with each column divided by its diagonal entry. diagonal: these. dead: never an
    input."""

    unit: Tensor
    diagonal: Tensor
    dead: Tensor


def factorize(hessian: Tensor, damping: float = 0.01, name: str = "the matrix") -> Factor:
    """The factor of a damped Hessian, in its dtype.

    hessian: (in, in), symmetric; not changed. damping: λ as a share of the mean diagonal. name: of the site, for the
    warning that says which damping and dtype it took in the end. Raises ValueError if it is not finite or no damping
    helps.

    >>> factor = factorize(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), damping=0.0)
    >>> 1 / factor.diagonal  # U_jj
    tensor([0.8165, 0.7071])
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.double().sum()) / max(1, int((~dead).sum())) or 1.0
    if not math.isfinite(mean):
        raise ValueError(f"{name!r}: Σ x xᵀ of its inputs is not finite; look for an overflow in the layers before it")
    dtype = hessian.dtype
    for attempt in range(_TRIES):
        share = damping if attempt < 2 else max(damping, 1e-3) * 10 ** (attempt - 1)
        factor = _cholesky(hessian, (dead.double() + share) * mean, dtype)
        if factor is not None:
            if attempt:
                warnings.warn(
                    f"{name!r}: Σ x xᵀ of its inputs is not positive definite in {hessian.dtype} with damping "
                    f"{damping}; solved in {dtype} with damping {share:g}. More calibration tokens help.",
                    stacklevel=2,
                )
            unit, scale = factor
            return Factor(unit.to(hessian.dtype), scale.to(hessian.dtype), dead)
        dtype = torch.float64
    raise ValueError(f"{name!r}: Σ x xᵀ of its inputs is not positive definite with any damping up to {share:g}")


def _cholesky(hessian: Tensor, added: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """N and the diagonal of R: the factor of the matrix read backwards is R read backwards."""
    flipped = hessian.flip(0, 1).to(dtype)
    flipped.diagonal().add_(added.flip(0))
    lower, info = torch.linalg.cholesky_ex(flipped)
    del flipped
    upper = lower.flip(0, 1)
    diagonal = upper.diagonal().clone()
    if int(info) or not bool(torch.isfinite(diagonal).all()) or not bool((diagonal > 0).all()):
        return None
    return upper.div_(diagonal), diagonal


def sparse_gpt(
    weight: Tensor,
    hessian: Tensor | Factor,
    pattern: Pattern,
    keep: int = 0,
    sparsity: Fraction | None = None,
    *,
    mask: Tensor | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    line: int | None = None,
    name: str = "the matrix",
) -> tuple[Tensor, Tensor]:
    """Mask and updated weight, (out, in) both.

    weight: (out, in), float32 or float64; not changed. hessian: (in, in), Σ x xᵀ times any positive number, or its
    factor, of the same dtype. keep: units of the pattern to keep in all; sparsity: the exact share of units to drop
    that the counts after each block of columns follow (default: what `keep` says). Both are ignored by n:m, and where a
    mask is given: then weights are updated only. line: see `Matrix`.

    >>> from rarefy.axes import Unstructured
    >>> hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> sparse_gpt(torch.tensor([[1.0, 2.0]]), hessian, Unstructured(), keep=1, damping=0.0)
    (tensor([[False,  True]]), tensor([[0.0000, 2.5000]]))
    """
    factor = hessian if isinstance(hessian, Factor) else factorize(hessian, damping, name)
    if mask is None and isinstance(pattern, Channel):  # a row lies in every block of columns: by w H wᵀ, before
        scores = (weight @ factor.unit).mul_(factor.diagonal).square_()
        mask = choose_mask(scores, pattern, keep, Fraction(0))
    sweep = _Sweep(weight, factor, pattern, _counts(weight, pattern, keep, sparsity), mask, line)
    if mask is not None:
        sweep.given(_cuts(0, weight.shape[1], block_size))
    else:
        sweep.choosing(_aligned(weight.shape[1], block_size, pattern, line))
    return sweep.mask, torch.sub(weight, sweep.delta.t()).masked_fill_(~sweep.mask, 0.0)


class _Sweep:
    """The pass over δ, columns first: delta (in, out). Its row j holds −Σ_{i<j} δ_i N_ij so far until its turn."""

    def __init__(
        self,
        weight: Tensor,
        factor: Factor,
        pattern: Pattern,
        counts: Callable[[int], int],
        mask: Tensor | None,
        line: int | None,
    ) -> None:
        self.weight, self.factor, self.pattern, self.counts = weight, factor, pattern, counts
        self.line = line or weight.shape[1]
        self.delta = weight.new_zeros(weight.shape[1], weight.shape[0])
        self.mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device) if mask is None else mask

    def given(self, cuts: list[int]) -> None:
        self._halve(cuts, self._block_given)

    def choosing(self, cuts: list[int]) -> None:
        self._halve(cuts, self._block_in_groups if isinstance(self.pattern, NM) else self._block)

    def _halve(self, cuts: list[int], visit: Callable[[int, int], None]) -> None:
        """Visit the pieces between the cuts in order; each half's errors reach the next half by one product."""
        if len(cuts) < 3:
            if len(cuts) == 2:
                visit(cuts[0], cuts[1])
            return
        middle = len(cuts) // 2
        start, half, stop = cuts[0], cuts[middle], cuts[-1]
        self._halve(cuts[: middle + 1], visit)
        self.delta[half:stop].addmm_(self.factor.unit[start:half, half:stop].t(), self.delta[start:half], alpha=-1)
        self._halve(cuts[middle:], visit)

    def _block_given(self, start: int, stop: int) -> None:
        self._columns_of(start, stop)

    def _block(self, start: int, stop: int) -> None:
        """Choose among all units of these columns, then go through them."""
        scores = self._scores(self._transposed(start, stop), start, stop).t()
        count = self.counts(stop) - self.counts(start)
        self.mask[:, start:stop] = _within(scores, self.pattern, count)
        self._columns_of(start, stop)

    def _columns_of(self, start: int, stop: int) -> None:
        weights = self._transposed(start, stop)
        kept = self.mask[:, start:stop].t().contiguous()
        self._halve(_cuts(start, stop, _LEAF), lambda a, b: self._columns(a, b, weights, kept, start))

    def _block_in_groups(self, start: int, stop: int) -> None:
        """n:m: each group chooses in its turn, by the weights as they are then."""
        weights = self._transposed(start, stop)
        kept = torch.empty(weights.shape, dtype=torch.bool, device=weights.device)

        def group(a: int, b: int) -> None:
            scores = self._scores(weights[a - start : b - start], a, b)
            assert isinstance(self.pattern, NM)
            kept[a - start : b - start] = _best_rows(scores, -(-self.pattern.n * (b - a) // self.pattern.m))
            self._columns(a, b, weights, kept, start)

        assert isinstance(self.pattern, NM)
        self._halve(_groups(start, stop, self.pattern.m, self.line), group)
        self.mask[:, start:stop] = kept.t()

    def _columns(self, first: int, last: int, weights: Tensor, kept: Tensor, start: int) -> None:
        """Columns one by one. weights, kept: of the columns from `start` on, columns first."""
        delta, unit = self.delta, self.factor.unit
        for j in range(first, last):
            row = delta[j]
            if j > first:
                row.addmv_(delta[first:j].t(), unit[first:j, j], alpha=-1)
            torch.where(kept[j - start], row, weights[j - start], out=row)

    def _scores(self, weights: Tensor, start: int, stop: int) -> Tensor:
        """w²/U_jj² of the weights as completed for the errors before `start`: (columns, out)."""
        unit = self.factor.unit[start:stop, start:stop].t()
        moved = torch.linalg.solve_triangular(unit, self.delta[start:stop], upper=False, unitriangular=True)
        scores = torch.sub(weights, moved, out=moved).mul_(self.factor.diagonal[start:stop, None]).square_()
        dead = self.factor.dead[start:stop]
        return scores.masked_fill_(dead[:, None], 0.0) if bool(dead.any()) else scores

    def _transposed(self, start: int, stop: int) -> Tensor:
        return self.weight[:, start:stop].t().contiguous()


def _within(scores: Tensor, pattern: Pattern, count: int) -> Tensor:
    scores = scores.contiguous()
    if isinstance(pattern, Unstructured):
        return largest(scores, count)
    return choose_mask(scores, pattern, count, Fraction(0))


def _best_rows(scores: Tensor, n: int) -> Tensor:
    """The n largest of each column of (m, out), ties to the lower index: those that fewer than n others beat."""
    m = len(scores)
    if m > 32:
        return NM(n, m).project(scores.t().contiguous(), 0).t()
    beaten = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
    for later in range(1, m):
        wins = scores[later] > scores[:later]  # only a larger score beats an earlier one
        beaten[:later] += wins
        beaten[later] += (later - wins.sum(0)).to(torch.uint8)
    return beaten < n


def _counts(weight: Tensor, pattern: Pattern, keep: int, sparsity: Fraction | None) -> Callable[[int], int]:
    """Units kept in the columns before `column`: floor((1 − s)·units so far + ½), all of `keep` at the end."""
    if isinstance(pattern, NM | Channel):
        return lambda column: 0
    out, width = weight.shape
    if isinstance(pattern, ConstantFanIn):
        fan_in = Fraction(keep // out, width)
        return lambda column: out * math.floor(fan_in * column + Fraction(1, 2))
    rows, tile = (-(-out // pattern.rows), pattern.columns) if isinstance(pattern, Block) else (out, 1)
    share = Fraction(keep, rows * -(-width // tile)) if sparsity is None else 1 - sparsity

    def count(column: int) -> int:
        return keep if column == width else min(keep, math.floor(share * rows * (column // tile) + Fraction(1, 2)))

    return count


def _aligned(width: int, block_size: int, pattern: Pattern, line: int | None) -> list[int]:
    """Cuts between blocks of columns, at multiples of a group or tile."""
    if isinstance(pattern, NM):
        starts = _groups(0, width, pattern.m, line or width)
        cuts = [0]
        for cut in starts[1:]:
            if cut - cuts[-1] >= block_size or cut == width:
                cuts.append(cut)
        return cuts
    tile = pattern.columns if isinstance(pattern, Block) else 1
    cuts = _cuts(0, width, -(-block_size // tile) * tile)
    if len(cuts) > 2 and width - cuts[-2] < tile:  # less than one tile is left: it joins the block before
        del cuts[-2]
    return cuts


def _groups(start: int, stop: int, m: int, line: int) -> list[int]:
    """Starts of the groups of m within lines of so many columns, and the end; start and stop are among them."""
    first = start - start % line
    cuts = [cut for at in range(first, stop, line) for cut in range(at, min(at + line, stop), m) if cut >= start]
    return [*cuts, stop]


def _cuts(start: int, stop: int, size: int) -> list[int]:
    return [*range(start, stop, size), stop]


@register
@value
class SparseGPT(Pruner):
    """Args:
    block_size: columns among which weights are compared; rounded up to whole groups or tiles.
    damping: λ as a share of the mean diagonal of H.
    See `Pruner` for the others. Needs `data`.

    >>> SparseGPT(pattern="2:4").block_size
    128
    """

    block_size: Annotated[int, Field(ge=1)] = 128
    damping: Annotated[float, Field(ge=0)] = 0.01

    paper = "Frantar & Alistarh 2023, arXiv:2301.00774"
    extra_cost = "two forward passes over the calibration data, in³ + out·in² operations per layer"
    gram = True
    rewrites = True

    def solve(self, matrix: Matrix) -> Solved:
        """Mask and updated weights."""
        shared, key = matrix.shared, f"factor {self.damping}"
        factor = shared.get(key)
        if factor is None:
            factor = shared[key] = factorize(matrix.gram, self.damping, matrix.name)
        arguments = {"block_size": self.block_size, "line": matrix.line, "name": matrix.name}
        return Solved(*sparse_gpt(matrix.weight, factor, matrix.pattern, matrix.keep, matrix.sparsity, **arguments))
