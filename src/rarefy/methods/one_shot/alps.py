"""ALPS: the support of a layer by ADMM, its weights by conjugate gradients.

Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", 2024,
arXiv:2406.07831.

    min ‖X(B − W)‖²  with at most k non-zeros;   A = the damped XᵀX scaled to a unit diagonal, B₀ = W·n, n = √diag
    B = (A + ρI)⁻¹(A B₀ − V + ρD);   D = top-k of B + V/ρ;   V ← V + ρ(B − D);   ρ follows how much the support moves

In the code rows are outputs, so that products with A stand on the right; top-k is over the whole layer (n:m: in each
group); A = Q Λ Qᵀ is decomposed once for all matrices that read the same inputs, and (A + ρI)⁻¹ is formed from it when
ρ changes: then a step is one product of matrices. Finally B is projected and refitted by 10 steps of conjugate
gradients.

Deviation from the authors' code: the start support (Wanda's over the layer, where XᵀX is diagonal) is refitted too, and
kept where its error is lower.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rarefy.axes import value
from rarefy.core.method import register
from rarefy.methods.one_shot.layerwise import Pruner
from rarefy.methods.one_shot.matrix import Matrix, Solved, choose_mask, layer_error
from rarefy.methods.one_shot.refit import conjugate

_HIGHEST = 1e6  # of ρ


@dataclass
class Scaled:
    """A = Q Λ Qᵀ, the damped Σ x xᵀ scaled to a unit diagonal; norms: the scale n of each input."""

    matrix: Tensor
    values: Tensor
    vectors: Tensor
    norms: Tensor


def scale(gram: Tensor, damping: float = 0.01, name: str = "the matrix") -> Scaled:
    """gram: (in, in), Σ x xᵀ; not changed. damping: as a share of the mean diagonal. Raises ValueError unless finite.

    >>> scale(torch.tensor([[4.0, 0.0], [0.0, 16.0]]), damping=0.0).norms
    tensor([2., 4.])
    """
    mean = float(gram.diagonal().double().mean())
    if not math.isfinite(mean):
        raise ValueError(f"{name!r}: Σ x xᵀ of its inputs is not finite; look for an overflow in the layers before it")
    matrix = gram.clone()
    diagonal = matrix.diagonal()
    diagonal.add_(damping * mean)
    diagonal.masked_fill_(diagonal <= 0, mean or 1.0)
    norms = diagonal.sqrt()
    matrix.div_(norms).div_(norms[:, None])
    values, vectors = torch.linalg.eigh(matrix)
    return Scaled(matrix, values.clamp_min(0), vectors, norms)


def alps(
    weight: Tensor,
    gram: Tensor | Scaled,
    choose: Callable[[Tensor], Tensor],
    *,
    damping: float = 0.01,
    rho: float = 0.1,
    iterations: int = 300,
) -> tuple[Tensor, Tensor]:
    """Mask and weights, (out, in) both.

    weight: (out, in), float32 or float64; not changed. gram: Σ x xᵀ of the same dtype, or what `scale` makes of it.
    choose: scores ≥ 0 of the weight's shape → the mask that keeps the best; as many as were asked for.

    >>> from rarefy.axes import top_k
    >>> alps(torch.tensor([[3.0, -1.0]]), torch.eye(2), lambda scores: top_k(scores, 1))[0]
    tensor([[ True, False]])
    """
    scaled = gram if isinstance(gram, Scaled) else scale(gram, damping)
    dense = weight * scaled.norms
    start = choose(dense.abs())
    found = _admm(dense, scaled, choose, start, rho, iterations)
    mask = choose(found.abs())
    best = _refitted(dense, mask, scaled.matrix, found)
    if not torch.equal(mask, start):
        plain = _refitted(dense, start, scaled.matrix, dense)
        if not layer_error(dense, best, scaled.matrix) < layer_error(dense, plain, scaled.matrix):
            mask, best = start, plain
    return mask, best.div_(scaled.norms).masked_fill_(~mask, 0.0)


def _refitted(dense: Tensor, mask: Tensor, matrix: Tensor, values: Tensor) -> Tensor:
    return conjugate(dense, mask, matrix, 0.0, start=values, steps=10, tolerance=1e-4)


def _admm(
    dense: Tensor, scaled: Scaled, choose: Callable[[Tensor], Tensor], start: Tensor, rho: float, iterations: int
) -> Tensor:
    """B at the end; D and V are the loop's own."""
    target = dense @ scaled.matrix
    d, v, before = dense * start, torch.zeros_like(dense), start
    kept = max(1, int(start.sum()))
    penalty = _Penalty(rho)
    solve = _solver(scaled, rho, len(dense))
    b = dense
    for i in range(1, iterations + 1):
        b = solve(torch.sub(target, v).add_(d, alpha=penalty.rho))
        z = torch.add(b, v, alpha=1 / penalty.rho)
        support = choose(z.abs())
        d = z.masked_fill_(~support, 0.0)
        v.add_(b, alpha=penalty.rho).sub_(d, alpha=penalty.rho)
        if i % 3:
            continue
        changed = int((support != before).sum())
        before, old = support, penalty.rho
        if penalty.restarts(changed, kept):
            d, v, before = dense * start, torch.zeros_like(dense), start
        if penalty.stop or (i > 30 and changed / kept < 3e-4):
            break
        if penalty.rho != old:
            solve = _solver(scaled, penalty.rho, len(dense))
    return b


@dataclass
class _Penalty:
    """ρ: it grows the faster the more the support moves. moving: whether it ever moved enough."""

    rho: float
    moving: bool = False
    stop: bool = False

    def restarts(self, changed: int, kept: int) -> bool:
        """Take note of how many entries entered or left the support in three steps; whether to begin anew."""
        restart = False
        if changed / kept > 0.005:
            self.rho *= 1.3 if changed / kept > 0.1 else 1.2
            self.moving = True
        elif self.moving:
            self.rho *= 1.1 if changed else 1.0
            self.stop = not changed
        else:
            self.rho /= 5
            restart = changed > 0
        self.rho = min(self.rho, _HIGHEST)
        return restart


def _solver(scaled: Scaled, rho: float, rows: int) -> Callable[[Tensor], Tensor]:
    """Right-hand sides (rows, in) ↦ their product with (A + ρI)⁻¹."""
    divided = scaled.vectors / (scaled.values + rho)
    if 3 * rows > len(scaled.matrix):  # it serves three steps or more: form the inverse
        inverse = divided @ scaled.vectors.t()
        return lambda right: right @ inverse
    return lambda right: (right @ divided) @ scaled.vectors.t()


@register
@value
class ALPS(Pruner):
    """Args:
    damping: as a share of the mean diagonal of Σ x xᵀ. rho: the first penalty. iterations: the most.
    See `Pruner` for the others. Needs `data`.

    >>> ALPS(0.7).rho
    0.1
    """

    damping: Annotated[float, Field(ge=0)] = 0.01
    rho: Annotated[float, Field(gt=0)] = 0.1
    iterations: Annotated[int, Field(ge=1)] = 300

    paper = "Meng et al. 2024, arXiv:2406.07831"
    extra_cost = "up to 300 products of weights with Σ x xᵀ per layer, and its eigenvectors"
    gram = True
    rewrites = True

    def solve(self, matrix: Matrix) -> Solved:
        """Mask and weights."""
        shared, key = matrix.shared, f"scaled {self.damping}"
        scaled = shared.get(key)
        if scaled is None:
            scaled = shared[key] = scale(matrix.gram, self.damping, matrix.name)

        def choose(scores: Tensor) -> Tensor:
            return choose_mask(scores, matrix.pattern, matrix.keep, matrix.sparsity, "layer", matrix.line)

        return Solved(*alps(matrix.weight, scaled, choose, rho=self.rho, iterations=self.iterations))
