"""Distilling: a pruned copy of the encoder learns, with exact zeros, to give the dense one's states and embeddings.

The copy is pruned by ALPS several times during the first part of the training, along a cubic schedule (Zhu & Gupta,
2017, arXiv:1710.01878) from the share of zeros that it has to the one asked for; in between and afterwards the zeros
are held by the handle. ALPS, because it costs little here and leaves much more: at 80 % in one shot a cosine of 0.78
with the dense embeddings, where SparseGPT leaves 0.62. The loss, on text without labels, is

    L = mean(1 − cos(s, t)) + a · mean over layers of ‖H_s − H_t‖² / ‖H_t‖² + b · KL(softmax(T Tᵀ/τ) ‖ softmax(S Sᵀ/τ))

with embeddings s, t (rows of S, T over a batch, a sentence's likeness to itself left out) and states H of real tokens
after each block. The middle term is SquareHead (Kurtic et al., 2023, arXiv:2310.06927); the last one says which
sentences are near to which, which is what retrieval asks.

Training ends by the clock: the learning rate and the prunings follow the share of the time that has passed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rarefy.bench.seeds import generator
from rarefy.bench.sentences.encoder import batches, padded, pool
from rarefy.core.sparsify import sparsify
from rarefy.core.sparsity import Sparsity
from rarefy.io.prune import chosen_sites
from rarefy.methods import ALPS

__all__ = ["Recipe", "Run", "calibration", "distil", "loss_of", "share_at"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Recipe:
    """sparsity: at the end; initial: the first pruning goes beyond this. minutes: of all, pruning included.

    prunings: how many, evenly over the first `pruning` of the time. hidden, alike: a and b of the loss, temperature: τ.
    samples: sentences to calibrate ALPS with. steps: how many, whatever the clock says.
    """

    sparsity: float = 0.8
    initial: float = 0.0
    minutes: float = 22.0
    steps: int | None = None
    prunings: int = 3
    pruning: float = 0.3
    batch: int = 32
    rate: float = 5e-4
    hidden: float = 1.0
    alike: float = 1.0
    temperature: float = 0.05
    samples: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """A distilled encoder's handle, which has ended, and what it took. loss: mean over the last tenth of the steps."""

    sparsity: Sparsity
    steps: int
    seconds: float
    loss: float


def share_at(recipe: Recipe, index: int) -> float:
    """The share of zeros after pruning number `index`, from 0: cubic, the last one as asked.

    >>> [round(share_at(Recipe(sparsity=0.8, prunings=4), i), 2) for i in range(4)]
    [0.46, 0.7, 0.79, 0.8]
    """
    left = 1 - (index + 1) / recipe.prunings
    return recipe.sparsity + (recipe.initial - recipe.sparsity) * left**3


def calibration(tokens: Sequence[Sequence[int]], samples: int) -> list[dict[str, Tensor]]:
    """The first `samples` sentences as batches for block-wise methods."""
    return [inputs for _, inputs in batches(tokens[:samples], 64)]


def distil(
    teacher: nn.Module, student: nn.Module, tokens: Sequence[Sequence[int]], recipe: Recipe, progress: Progress
) -> Run:
    """Train `student` (a BERT, changed in place) towards `teacher` on the tokens of sentences, in their order."""
    names, data = chosen_sites(student), calibration(tokens, recipe.samples)
    student.requires_grad_(False)
    trained = _trained(student)
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    begun = time.monotonic()
    sparsity = _pruned(student, None, share_at(recipe, 0), names, data, optimizer)
    pruned, losses, source = 1, [], _batches(tokens, recipe)
    for step in itertools.count():
        passed = _passed(recipe, step, begun)
        if pruned < recipe.prunings and passed >= recipe.pruning * pruned / recipe.prunings:
            sparsity = _pruned(student, sparsity, share_at(recipe, pruned), names, data, optimizer)
            pruned += 1
        elif passed >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * _warm(passed)
        losses.append(_step(teacher, student, next(source), recipe, optimizer))
        progress(int(1000 * min(passed, 1)), 1000, f"{recipe.sparsity:.0%}, step {step}, loss {losses[-1]:.3f}")
    sparsity.end()
    student.requires_grad_(False)
    last = losses[-max(1, len(losses) // 10) :]
    return Run(sparsity, len(losses), time.monotonic() - begun, sum(last) / max(1, len(last)))


def _passed(recipe: Recipe, step: int, begun: float) -> float:
    """The share of the training that is over, by steps where they are given, else by the clock."""
    if recipe.steps is not None:
        return step / max(1, recipe.steps) if recipe.steps else 1.0
    return (time.monotonic() - begun) / max(60 * recipe.minutes, 1e-9)


def _warm(passed: float) -> float:
    """The learning rate as a share of its peak: a warm-up over 3 % of the time, then a cosine to 0."""
    return min(1.0, (passed + 2e-3) / 0.03) * (0.5 + 0.5 * math.cos(math.pi * min(passed, 1.0)))


def _step(teacher: Any, student: Any, inputs: dict[str, Tensor], recipe: Recipe, optimizer: Any) -> float:
    loss = loss_of(teacher, student, inputs, recipe)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    return loss.item()


def _trained(student: Any) -> list[nn.Parameter]:
    """All parameters of the blocks; embeddings stay the teacher's."""
    found = list(student.encoder.parameters())
    for parameter in found:
        parameter.requires_grad_(True)
    return found


def _pruned(
    student: nn.Module, before: Sparsity | None, share: float, names: list[str], data: Any, optimizer: Any
) -> Sparsity:
    """Pruned again, weights that were zero included in the choice, with the optimizer attached."""
    if before is not None:
        before.end()
    with torch.no_grad():
        sparsity = sparsify(student, ALPS(sparsity=share), data=data, only=names)
    return sparsity.attach(optimizer)


def _batches(tokens: Sequence[Sequence[int]], recipe: Recipe) -> Iterator[dict[str, Tensor]]:
    """Batches of sentences of like length, for ever; each pass over the sentences has an order of its own."""
    source = generator("sentences batches", recipe.seed)
    many = 32 * recipe.batch
    while True:
        order = torch.randperm(len(tokens), generator=source).tolist()
        for begin in range(0, len(order), many):
            pool = sorted(order[begin : begin + many], key=lambda i: len(tokens[i]))
            found = [pool[i : i + recipe.batch] for i in range(0, len(pool), recipe.batch)]
            for i in torch.randperm(len(found), generator=source).tolist():
                yield padded([tokens[j] for j in found[i]])


def loss_of(teacher: nn.Module, student: nn.Module, inputs: dict[str, Tensor], recipe: Recipe) -> Tensor:
    """L of a batch; matrices in bfloat16."""
    mask = inputs["attention_mask"]
    # At so few tokens attention in single products takes a small part of what the fused one takes, backward above all.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():
            wanted = teacher(**inputs, output_hidden_states=True).hidden_states
        found = student(**inputs, output_hidden_states=True).hidden_states
    real = mask.bool()
    apart = [_apart(s[real], t[real]) for s, t in zip(found[1:], wanted[1:], strict=True)]
    s, t = pool(found[-1].float(), mask), pool(wanted[-1].float(), mask)
    loss = (1 - (s * t).sum(1)).mean() + recipe.hidden * torch.stack(apart).mean()
    return loss + recipe.alike * _unlike(s, t, recipe.temperature)


def _apart(found: Tensor, wanted: Tensor) -> Tensor:
    """‖found − wanted‖² / ‖wanted‖²."""
    wanted = wanted.float()
    return (found.float() - wanted).square().sum() / wanted.square().sum()


def _unlike(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """The mean over sentences of KL(teacher's ‖ student's) distribution over the others; 0 for a single sentence."""
    count = len(s)
    if count < 2:
        return s.new_zeros(())
    others = ~torch.eye(count, dtype=torch.bool)
    mine, theirs = ((x @ x.T / temperature)[others].view(count, count - 1).log_softmax(1) for x in (s, t))
    return F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
