"""The one training loop of the benchmark: every method, every baseline and every control runs through it."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rarefy.bench.data import Split
from rarefy.bench.seeds import generator
from rarefy.bench.tasks import Task

__all__ = ["Batch", "Tick", "Training", "accuracy", "balanced", "batches", "loss"]

Batch = tuple[Tensor, Tensor]
Tick = Callable[[int], Any]
"""Is told how many steps were made since the last call."""

_TICK = 25


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy of a batch (inputs, labels)."""
    inputs, labels = batch
    return functional.cross_entropy(model(inputs), labels)


def batches(split: Split, size: int, seed: int) -> Iterator[Batch]:
    """Batches without end: a new order in every epoch, the incomplete last batch left out.

    One seed gives all methods the same images in the same order. Raises ValueError for a size above the data's.
    """
    if size > len(split):
        raise ValueError(f"a batch of {size} needs as many training images; there are {len(split)}")
    source = generator("order", seed)
    while True:
        order = torch.randperm(len(split), generator=source)
        for index in order[: len(order) // size * size].split(size):
            yield split.inputs[index], split.labels[index]


def balanced(split: Split, per_class: int, seed: int) -> Batch:
    """One batch of `per_class` training images of every class, for scores that need gradients."""
    order = torch.randperm(len(split), generator=generator("scored images", seed))
    labels = split.labels[order]
    chosen = torch.cat([order[labels == c][:per_class] for c in labels.unique()])
    return split.inputs[chosen], split.labels[chosen]


class Training:
    """One run of `steps` batches; it may stop on the way, so that something can happen to the network, and go on."""

    def __init__(self, model: nn.Module, split: Split, task: Task, *, seed: int, steps: int, tick: Tick):
        self.model, self.task, self.steps, self.tick = model, task, steps, tick
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=task.rate, momentum=task.momentum, weight_decay=task.weight_decay
        )
        self.done = 0
        self.seconds = 0.0
        self._batches = batches(split, task.batch, seed)

    def advance(self, until: int) -> None:
        """Train until `until` batches have been seen."""
        begin, told = time.perf_counter(), self.done
        self.model.train()
        while self.done < until:
            self._step(next(self._batches))
            if self.done - told == _TICK:
                self.tick(_TICK)
                told = self.done
        self.tick(self.done - told)
        self.seconds += time.perf_counter() - begin

    def _step(self, batch: Batch) -> None:
        rate = self.task.rate * (1 + math.cos(math.pi * self.done / self.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss(self.model, batch).backward()
        self.optimizer.step()
        self.done += 1


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Percent of images whose label has the largest output, in evaluation mode; the mode is then as before."""
    mode = model.training
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(*_chunks(split), strict=True))
    model.train(mode)
    return 100 * right / len(split)


def _chunks(split: Split) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return split.inputs.split(1000), split.labels.split(1000)
