"""Matrices with inputs that are correlated, their statistics, and slow readings of the handbook's formulas."""

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

import tiny
from rarefy.axes import Pattern, Unstructured, count
from rarefy.core.capture.statistics import Statistics
from rarefy.methods.one_shot.matrix import Matrix


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(tokens: int, width: int, rank: int = 8, noise: float = 0.3, seed: int = 0) -> Tensor:
    """Low rank plus noise, features of different sizes, float64."""
    g = generator(seed)
    made = torch.randn(tokens, rank, generator=g, dtype=torch.float64) @ torch.randn(
        rank, width, generator=g, dtype=torch.float64
    )
    made += noise * torch.randn(tokens, width, generator=g, dtype=torch.float64)
    return made * (0.5 + torch.rand(width, generator=g, dtype=torch.float64))


def gaussian(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=generator(seed), dtype=torch.float64)


def statistics(x: Tensor, sequences: int = 1) -> Statistics:
    """Of the rows of x, cut into equal sequences."""
    x = x.double()
    within = sum(len(part) * part.var(0, unbiased=len(part) > 1) for part in x.chunk(sequences))
    assert isinstance(within, Tensor)
    return Statistics(len(x), sequences, x.square().sum(0), x.sum(0), within, x.t() @ x)


def matrix(weight: Tensor, x: Tensor, sparsity: float, pattern: Pattern | None = None, **more: Any) -> Matrix:
    """As the block-wise engine makes it for a Linear."""
    pattern = pattern or Unstructured()
    keep = pattern.asked(tuple(weight.shape), sparsity)
    return Matrix("layer", weight, statistics(x), pattern, keep, Fraction(str(sparsity)), **more)


def sequential_obs(
    weight: Tensor, hessian: Tensor, sparsity: float, block: int = 128, group: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, literally: H[j:, j:] is inverted anew at every column j, all in float64.

    Of each block of columns the entries of least w²/[H⁻¹]_jj are dropped; where `group` = (n, m), all but n of each m.
    """
    w, width = weight.double().clone(), weight.shape[1]
    mask = torch.ones_like(weight, dtype=torch.bool)
    done = 0
    for j in range(width):
        inverse = torch.linalg.inv(hessian[j:, j:])
        if group is not None and j % group[1] == 0:
            stop = min(j + group[1], width)
            keep = -(-group[0] * (stop - j) // group[1])
            saliency = w[:, j:stop].square() / diagonals(hessian, j, stop)
            order = saliency.argsort(dim=1, descending=True, stable=True)
            mask[:, j:stop] = torch.zeros_like(saliency).scatter(1, order[:, :keep], 1.0).bool()
        elif group is None and j % block == 0:
            stop = min(j + block, width)
            saliency = (w[:, j:stop].square() / diagonals(hessian, j, stop)).flatten()
            kept = count(sparsity, len(w) * stop)
            order = saliency.argsort(descending=True, stable=True)
            mask[:, j:stop] = torch.zeros_like(saliency).scatter(0, order[: kept - done], 1.0).bool().view(len(w), -1)
            done = kept
        error = torch.where(mask[:, j], 0.0, w[:, j]) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
        w[:, j] = torch.where(mask[:, j], w[:, j], 0.0)
    return mask, w


def diagonals(hessian: Tensor, start: int, stop: int) -> Tensor:
    """[(H[j:, j:])⁻¹]₀₀ of each column of a block."""
    return torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(start, stop)])


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    def block(inside: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(16, inside), nn.ReLU(), nn.Linear(inside, 16))

    return tiny.seeded(lambda: nn.Sequential(block(24), block(32), block(24))).to(dtype)


def batches(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return list(correlated(128, 16).to(dtype).split(32))
