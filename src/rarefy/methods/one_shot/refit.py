"""Refit: the best weights for a given mask, by least squares on the inputs of each layer.

    min over w on S of (w − w₀) G (w − w₀)ᵀ,  G = Σ x xᵀ + λI,  λ = 0.01·mean diag:   w_S = (G_SS)⁻¹ (G w₀)_S

for every output row with its kept inputs S and its dense weights w₀. The ridge pulls towards w₀, so that the undamped
error never exceeds that of the bare mask: E(w) ≤ E(mask) − λ‖w_S − w₀_S‖², since the mask itself is a candidate.

Few kept weights: G_SS is factorized for each row. Else all rows go through conjugate gradients together: one product of
matrices a step. They start from the mask and only ever descend, so that the bound holds wherever they stop. Inputs of
networks have some large directions and a long tail: the preconditioner is a diagonal plus the `_RANK` largest
directions of G, restricted to the S of each row, which leaves a third of the steps that the diagonal alone takes
(measured).
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rarefy.axes import value
from rarefy.core.method import register
from rarefy.methods.one_shot.layerwise import MethodField, Stage
from rarefy.methods.one_shot.matrix import Matrix, Solved

_EXACT = 0.3  # rows are factorized where their kept weights, cubed, stay below this many times in² (measured),
_SMALL = 64  # and where there are no more inputs than this
_STEPS = 200
_RANK = 32  # of the preconditioner, at most a 32nd of the inputs


def refit(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    damping: float = 0.01,
    *,
    exact: bool | None = None,
    tolerance: float | None = None,
) -> Tensor:
    """The weights on `mask` of least damped error, zero elsewhere.

    weight: dense, (out, in), float32 or float64. mask: bool, (out, in). gram: (in, in), symmetric, of the same dtype,
    not changed. damping: λ as a share of the mean diagonal. exact: factorize each row (True), iterate (False), or what
    is faster. tolerance: of the iteration, the residual's norm over its start (default 1e-3 in float32, 1e-9 in
    float64).

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> refit(torch.tensor([[1.0, 2.0]]), torch.tensor([[False, True]]), gram, damping=0.0)
    tensor([[0.0000, 2.5000]])
    """
    ridge = damping * float(gram.diagonal().double().mean())
    most = int(mask.sum(1).max()) if mask.numel() else 0
    if exact is None:
        exact = most**3 <= _EXACT * weight.shape[1] ** 2 or weight.shape[1] <= _SMALL
    found = _by_rows(weight, mask, gram, ridge, most) if exact else None
    if found is None:
        rank = min(_RANK, len(gram) // 32)
        found = conjugate(weight, mask, gram, ridge, tolerance=tolerance, basis=leading(gram, ridge, rank))
    return found.masked_fill_(~mask, 0.0)


def _by_rows(weight: Tensor, mask: Tensor, gram: Tensor, ridge: float, most: int) -> Tensor | None:
    """δ_S = (G_SS)⁻¹ G_SP w_P for groups of rows, padded with the identity to the longest; None if a factor fails."""
    found = weight.clone()
    moved = weight.masked_fill(mask, 0.0) @ gram
    at_once = max(1, max(1 << 20, len(gram) ** 2) // max(1, most) ** 2)
    for start in range(0, len(weight) if most else 0, at_once):
        rows = slice(start, start + at_once)
        kept = mask[rows]
        order = torch.argsort(kept, dim=1, descending=True, stable=True)[:, :most]
        real = torch.gather(kept, 1, order)
        systems = gram[order[:, :, None], order[:, None, :]]
        systems.mul_(real[:, :, None]).mul_(real[:, None, :])
        systems.diagonal(dim1=1, dim2=2).add_((~real).to(gram.dtype) + ridge)
        factors, info = torch.linalg.cholesky_ex(systems)
        del systems
        if bool(info.any()):
            return None
        right = torch.gather(moved[rows], 1, order).mul_(real)
        delta = torch.cholesky_solve(right[:, :, None], factors)[:, :, 0]
        found[rows].scatter_add_(1, order, delta.mul_(real))
    return found


@dataclass
class Basis:
    """G ≈ diag(rest) + V diag(values) Vᵀ. vectors: V, (in, rank)."""

    rest: Tensor
    vectors: Tensor
    values: Tensor


def leading(gram: Tensor, ridge: float, rank: int) -> Basis:
    """The diagonal of G + ridge·I, and its `rank` largest directions once it is scaled to a unit diagonal.

    Subspace iteration from evenly spaced columns: nothing random.
    """
    diagonal = (gram.diagonal() + ridge).clamp_min(torch.finfo(gram.dtype).tiny)
    if not rank:
        return Basis(diagonal, gram[:, :0], gram.new_zeros(0))
    scale = diagonal.sqrt()[:, None]

    def times(vectors: Tensor) -> Tensor:
        inner = vectors / scale
        return (gram @ inner).add_(inner, alpha=ridge).div_(scale)

    columns = gram[:, :: len(gram) // (rank + 8)][:, : rank + 8] / scale
    for _ in range(3):
        columns = times(torch.linalg.qr(columns)[0])
    columns = torch.linalg.qr(columns)[0]
    values, turn = torch.linalg.eigh(columns.t() @ times(columns))
    columns, values = (columns @ turn)[:, -rank:], values[-rank:].clamp_min(1e-6)
    rest = (1 - (columns.square() * values).sum(1)).clamp_min(1e-2)
    return Basis(rest * diagonal, columns * scale, values)


def conjugate(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    ridge: float,
    *,
    start: Tensor | None = None,
    steps: int = _STEPS,
    tolerance: float | None = None,
    basis: Basis | None = None,
) -> Tensor:
    """Conjugate gradients for all rows at once; rows that have converged drop out.

    start: values on the mask to begin with (default: the dense ones). ridge: λ itself. basis: of the preconditioner
    (default: the diagonal). Others: as for `refit`.
    """
    if tolerance is None:
        tolerance = 1e-3 if weight.dtype == torch.float32 else 1e-9
    basis = leading(gram, ridge, 0) if basis is None else basis
    found = (weight if start is None else start).masked_fill(~mask, 0.0)
    for first in range(0, len(weight), max(1, len(gram))):  # chunks of rows bound the memory
        rows = slice(first, first + len(gram))
        _Rows(weight[rows], mask[rows], gram, ridge, found[rows], basis).descend(steps, tolerance)
    return found


class _Rows:
    """The state of the iteration over the rows that still move: x (values), r (residual), p (direction)."""

    def __init__(self, weight: Tensor, mask: Tensor, gram: Tensor, ridge: float, x: Tensor, basis: Basis) -> None:
        self.gram, self.ridge, self.out = gram, ridge, x
        self.open = mask.to(gram.dtype)
        self.inverse, self.basis = 1 / basis.rest, basis
        self.inner = self._inner()
        self.x = x
        self.r = self._times(weight - x).mul_(self.open)
        self.p = self._preconditioned(self.r, torch.empty_like(self.r))
        self.rz = (self.r * self.p).sum(1)
        self.places: Tensor | None = None

    def _times(self, rows: Tensor) -> Tensor:
        return torch.addmm(rows, rows, self.gram, beta=self.ridge)

    def _inner(self) -> Tensor:
        """(Λ⁻¹ + Vᵀ_S D⁻¹_S V_S)⁻¹ of each row: (rows, rank, rank)."""
        vectors, rank = self.basis.vectors, self.basis.vectors.shape[1]
        if not rank:
            return self.open.new_zeros(len(self.open), 0, 0)
        pairs = (vectors[:, :, None] * (vectors * self.inverse[:, None])[:, None, :]).flatten(1)
        systems = (self.open @ pairs).view(-1, rank, rank)
        systems.diagonal(dim1=1, dim2=2).add_(1 / self.basis.values)
        return torch.linalg.inv(systems)

    def _preconditioned(self, r: Tensor, out: Tensor) -> Tensor:
        """M⁻¹ r with M = D + V Λ Vᵀ restricted to the mask of each row (Woodbury)."""
        torch.mul(r, self.inverse, out=out)
        if self.inner.numel():
            within = torch.bmm(self.inner, (out @ self.basis.vectors)[:, :, None])[:, :, 0]
            out.addcmul_(within @ (self.basis.vectors * self.inverse[:, None]).t(), self.open, value=-1)
        return out

    def descend(self, steps: int, tolerance: float) -> None:
        least = self.rz * tolerance**2
        for _ in range(steps):
            least = self._drop(self.rz > least, least)
            if not len(self.rz):
                return
            self._step()
        self._store()

    def _step(self) -> None:
        q = self._times(self.p).mul_(self.open)
        curvature = torch.einsum("rc,rc->r", self.p, q)
        size = torch.where(curvature > 0, self.rz / curvature, 0.0)[:, None]
        self.x.addcmul_(self.p, size)
        self.r.addcmul_(q, size, value=-1)
        z = self._preconditioned(self.r, q)
        rz = torch.einsum("rc,rc->r", self.r, z)
        turn = torch.where(self.rz > 0, rz / self.rz, 0.0)
        self.p.mul_(turn[:, None]).add_(z)
        self.rz = torch.where(curvature > 0, rz, 0.0)  # a direction without curvature: nothing is left to gain

    def _drop(self, active: Tensor, least: Tensor) -> Tensor:
        """Put aside the rows that have converged, once they are worth it: an eighth, or all."""
        left = int(active.sum())
        if left > len(active) * 7 // 8:
            return least
        self._store()
        places = active.nonzero()[:, 0]
        self.places = places if self.places is None else self.places[places]
        self.x, self.r, self.p = self.x[places], self.r[places], self.p[places]
        self.open, self.rz, self.inner = self.open[places], self.rz[places], self.inner[places]
        return least[places]

    def _store(self) -> None:
        if self.places is not None:
            self.out[self.places] = self.x


@register
@value
class Refit(Stage):
    """Args:
    method: what chooses the mask: a block-wise method such as `Wanda(0.5)`, or one by weights alone, `Magnitude(0.5)`.
    damping: λ as a share of the mean diagonal of Σ x xᵀ.
    Needs `data`. Raises ValueError for methods that need a gradient.

    >>> from rarefy.methods.one_shot.wanda import Wanda
    >>> print(Refit(Wanda(0.5)))
    Refit(method=Wanda(sparsity=0.5))
    """

    method: MethodField
    damping: Annotated[float, Field(ge=0)] = 0.01

    paper = "least squares on a given mask"
    extra_cost = "those of its method; about 30 products of weights with Σ x xᵀ per layer"
    gram = True
    rewrites = True

    def solve(self, matrix: Matrix) -> Solved:
        """The mask of the method, and the weights that go with it."""
        mask = self.first(matrix).mask
        weight = refit(matrix.weight, mask, matrix.gram, self.damping)
        if not math.isfinite(float(weight.sum())):
            raise ValueError(f"{matrix.name!r}: the refit is not finite; a damping above {self.damping} would do")
        return Solved(mask, weight)
