"""Wanda and SparseGPT as one would write them down from their formulas: what rarefy's are measured against.

Every sequence goes through the block by itself. Each Linear adds up statistics of its own inputs, as running means over
sequences, in the block's dtype:

    Wanda: n² ← mean of Σ_t x_c² ;  drop, in each row, those of least |W|·√n²
    SparseGPT: H ← mean of 2·X Xᵀ ;  H⁻¹ = Uᵀ U by Cholesky, inverse, Cholesky ;  blocks of 128 columns, one by one

Then the block runs again, pruned, for the inputs of the next. Counts are exact and those of rarefy, so that masks can
be compared: floor((1 − s)·n + ½) kept of n, in each row (Wanda), after each block of columns (SparseGPT).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.bench.pruning.blocks import Model

__all__ = ["COLUMNS", "Judged", "quota", "reference_block", "sparse_gpt", "wanda"]

COLUMNS = 128
"""Columns among which SparseGPT compares weights."""


def quota(sparsity: float, count: int) -> int:
    """floor((1 − s)·n + ½).

    >>> quota(0.5, 7)
    4
    """
    return math.floor((1 - sparsity) * count + 0.5)


@dataclass
class Judged:
    """How far a given mask is from the choice by score. wrong: entries on the wrong side of the bound between kept and
    dropped. gap: their largest distance from it, relative to it."""

    wrong: int = 0
    gap: float = 0.0

    def add(self, scores: Tensor, kept: Tensor) -> None:
        """One group of scores, [entries], of which `kept` are kept; the bound lies between the k-th and the next."""
        k = int(kept.sum())
        if not 0 < k < len(scores):
            return
        order = scores.double().sort(descending=True).values
        bound = float(order[k - 1 : k + 1].mean())
        wrong = torch.where(kept, scores < order[k - 1], scores > order[k])
        self.wrong += int(wrong.sum())
        if bool(wrong.any()):
            self.gap = max(self.gap, float((scores[wrong].double() - bound).abs().max()) / max(bound, 1e-300))


class _Norms:
    def __init__(self, linear: nn.Linear) -> None:
        self.mean, self.count = torch.zeros(linear.in_features, dtype=linear.weight.dtype), 0

    def add(self, x: Tensor) -> None:
        """x: (1, tokens, in)."""
        flat = x.reshape(-1, x.shape[-1]).t()
        self.mean *= self.count / (self.count + 1)
        self.count += 1
        self.mean += torch.norm(flat, p=2, dim=1) ** 2 / self.count


class _Hessian:
    def __init__(self, linear: nn.Linear) -> None:
        width = linear.in_features
        self.mean, self.count = torch.zeros(width, width, dtype=linear.weight.dtype), 0

    def add(self, x: Tensor) -> None:
        """x: (1, tokens, in)."""
        self.mean *= self.count / (self.count + 1)
        self.count += 1
        flat = math.sqrt(2 / self.count) * x.reshape(-1, x.shape[-1])
        self.mean += flat.t().matmul(flat)


def wanda(weight: Tensor, squares: Tensor, sparsity: float) -> Tensor:
    """The mask of a matrix (out, in), from the squared norms (in,) of its inputs."""
    scores = weight.abs() * squares.sqrt()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    return mask.scatter_(1, order[:, : quota(sparsity, weight.shape[1])], True)


def sparse_gpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    damping: float = 0.01,
    given: Tensor | None = None,
    judged: Judged | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask and updated weights of a matrix (out, in), from the Hessian (in, in) of its inputs.

    given: a mask that is taken instead of the choice; `judged` then tells how far it is from the choice by the scores
    that this algorithm has at that point.
    """
    weight, hessian = weight.clone(), hessian.clone()
    rows, columns = weight.shape
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    mask = torch.ones_like(weight, dtype=torch.bool)
    kept = 0
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        w, u = weight[:, start:stop].clone(), upper[start:stop, start:stop]
        scores = (w.square() / u.diagonal().square()).flatten()
        most = quota(sparsity, rows * stop) - kept
        chosen = _choice(scores, most) if given is None else given[:, start:stop].flatten()
        if judged is not None:
            judged.add(scores, chosen)
        kept += int(chosen.sum())
        chosen = chosen.view_as(w)
        final, errors = torch.zeros_like(w), torch.zeros_like(w)
        for i in range(stop - start):
            column = w[:, i]
            final[:, i] = torch.where(chosen[:, i], column, 0.0)
            error = (column - final[:, i]) / u[i, i]
            w[:, i:] -= error[:, None] @ u[i, i:][None]
            errors[:, i] = error
        mask[:, start:stop], weight[:, start:stop] = chosen, final
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return mask, weight


def _choice(scores: Tensor, keep: int) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[torch.sort(scores, descending=True, stable=True).indices[:keep]] = True
    return mask


def reference_block(
    model: Model, batches: Sequence[Tensor], method: str, sparsity: float, keep: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Prune the model's block in place.

    Returns times: begin, after the first run of all sequences, after the solver, after the second run; and, where
    `keep`, what each Linear added up of its inputs, by name.
    """
    calls = [model.call(ids) for ids in batches]
    inputs = torch.cat([hidden for hidden, _ in calls])
    named = calls[0][1]
    del calls
    outputs = torch.zeros_like(inputs)
    linears = {name: each for name, each in model.block.named_modules() if isinstance(each, nn.Linear)}
    with torch.no_grad():
        marks = [time.perf_counter()]
        seen: dict[str, Any] = {n: (_Norms if method == "Wanda" else _Hessian)(each) for n, each in linears.items()}
        hooks = [each.register_forward_hook(_hook(seen[name])) for name, each in linears.items()]
        for i in range(len(inputs)):
            outputs[i] = _output(model.block(inputs[i : i + 1], **named))
        for hook in hooks:
            hook.remove()
        marks.append(time.perf_counter())
        for name, linear in linears.items():
            _prune(linear, seen[name].mean, method, sparsity)
            if not keep:
                del seen[name]
        marks.append(time.perf_counter())
        for i in range(len(inputs)):
            outputs[i] = _output(model.block(inputs[i : i + 1], **named))
        marks.append(time.perf_counter())
    return marks, {name: each.mean for name, each in seen.items()}


def _prune(linear: nn.Linear, mean: Tensor, method: str, sparsity: float) -> None:
    weight = linear.weight.data
    if method == "Wanda":
        weight.masked_fill_(~wanda(weight, mean, sparsity), 0.0)
    else:
        weight.copy_(sparse_gpt(weight, mean, sparsity)[1])


def _hook(seen: Any) -> Callable[..., None]:
    return lambda _module, args, _output: seen.add(args[0].detach())


def _output(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found.squeeze(0)
