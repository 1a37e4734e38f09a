"""What a run cost and what came out of it: exact counts, FLOPs by one convention, bytes, accuracy."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.bench.data import Data
from rarefy.bench.results import Flops, TrainSection
from rarefy.bench.tasks import Task
from rarefy.bench.train import accuracy
from rarefy.core import bits
from rarefy.core.flops import measure
from rarefy.core.ledger import FORMULA, FORMULA_ID
from rarefy.core.sites import find_sites

__all__ = ["Phase", "Trained", "counted_forwards", "dense_phase", "parameters", "phase", "train_section"]

_FORMULA_TEXT = (
    f"{FORMULA}; × batch × steps; before training: f(weights now), × 3 with gradients, per image scored. "
    "Sparse arithmetic is counted, not done: this training ran dense."
)

Dense = Mapping[str, float]
"""Dense forward FLOPs of one image, by weight: what `rarefy.core.flops.measure` returns."""


@dataclass(frozen=True)
class Phase:
    """Some steps of training: under one handle, or dense before there is one. kept: weights, mean over the steps."""

    flops: float
    steps: int
    kept: float


@dataclass(frozen=True)
class Trained:
    """A network after its training. scoring: FLOPs spent on choosing masks before it."""

    model: nn.Module
    sparsity: Any
    phases: Sequence[Phase]
    labels: tuple[str, ...]
    seconds: float
    scoring: float = 0.0

    @property
    def explored(self) -> float:
        """Share of the weights that were ever in use; all of them where some phase was dense."""
        whole = any(phase.kept == sum(self.sparsity.ledger.sizes) for phase in self.phases)
        return 1.0 if whole else self.sparsity.ledger.explored


def dense_phase(model: nn.Module, dense: Dense, steps: int, batch: int) -> Phase:
    """Training without any handle."""
    return Phase(3 * sum(dense.values()) * steps * batch, steps, float(sum(site.numel for site in find_sites(model))))


def phase(sparsity: Any, dense: Dense, batch: int) -> Phase:
    """What the ledger of a handle says about the steps that it has seen."""
    ledger = sparsity.ledger
    return Phase(ledger.training_flops(dense, samples=batch), ledger.steps, ledger.average_parameters())


def parameters(model: nn.Module) -> int:
    """Of all kinds, biases and norms included."""
    return sum(p.numel() for p in model.parameters())


@contextmanager
def counted_forwards(model: nn.Module, dense: Dense) -> Iterator[list[float]]:
    """FLOPs of whatever passes through the model, or a copy of it, in the block; with gradients a pass counts three."""
    spent: list[float] = []

    def hook_for(flops: float) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            share = int(module.weight.detach().count_nonzero()) / module.weight.numel()
            spent.append(len(args[0]) * flops * share * (3 if torch.is_grad_enabled() else 1))

        return hook

    hooks = [
        module.register_forward_pre_hook(hook_for(dense[f"{name}.weight"]))
        for name, module in model.named_modules()
        if f"{name}.weight" in dense
    ]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def train_section(task: Task, trained: Trained, data: Data, masks: str) -> TrainSection:
    """The section of the result file. This is where the test images are looked at."""
    model, sparsity = trained.model, trained.sparsity
    kept = {site.name: int(site.mask.sum()) for site in sparsity.sites}
    prunable, nonzeros = sum(site.numel for site in sparsity.sites), sum(kept.values())
    off = sum(int((~bits.decode(held.keep)).sum()) for held in sparsity.held() if held.keep is not None)
    everything = parameters(model)
    mean_kept = sum(p.kept * p.steps for p in trained.phases) / sum(p.steps for p in trained.phases)
    return TrainSection(
        accuracy=accuracy(model, data.test),
        judged=len(data.test),
        labels=list(trained.labels),
        sites=sparsity.site_hash,
        prunable=prunable,
        nonzeros=nonzeros,
        kept=kept,
        parameters=everything,
        parameters_nonzero=everything - off,
        bytes=4 * (everything - off) + (0 if nonzeros == prunable else -(-prunable // 8)),
        average_parameters=mean_kept,
        explored=trained.explored,
        flip_rate=sparsity.ledger.flip_rate(),
        flops=_flops(task, trained, data.train.inputs[:1]),
        masks=masks,
        train_accuracy=accuracy(model, data.train),
        wall_seconds=trained.seconds,
    )


def _flops(task: Task, trained: Trained, example: Tensor) -> Flops:
    whole = sum(measure(task.build(0), example).values())
    return Flops(
        formula=FORMULA_ID,
        text=_FORMULA_TEXT,
        inference=trained.sparsity.ledger.forward_flops(measure(trained.model, example)),
        inference_dense=whole,
        training=sum(p.flops for p in trained.phases) + trained.scoring,
        training_dense=3 * whole * task.batch * task.steps,
        scoring=trained.scoring,
    )
