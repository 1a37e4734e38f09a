"""Runs of the ResNet table: one case, one calibration draw, one JSON file; those that are done are not made again."""

from __future__ import annotations

import base64
import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rarefy.bench.data import Split
from rarefy.bench.environment import source_digest
from rarefy.bench.one_shot import Run, Runs, pruned
from rarefy.bench.seeds import generator
from rarefy.bench.vision.cases import Case
from rarefy.bench.vision.cifar import augmented, load_cifar10
from rarefy.bench.vision.resnet import folded, load_resnet20

__all__ = ["Bench", "Result", "Settings", "Store", "correct_of", "execute", "open_bench", "reestimated"]

TRAINING = 50_000


@dataclass(frozen=True)
class Settings:
    """samples: training images of a calibration draw, for batch-norm statistics; the first `solving` of them are what
    the methods see. draws: of each case. images: of the test set, the first so many, judged once: each draw has a share
    of its own. The first draw is judged with the network's own batch-norm statistics too."""

    samples: int = 512
    solving: int = 128
    images: int = 10_000
    draws: int = 3
    threads: int = 2
    batch: int = 100


class Result(Run):
    """One run. accuracy: shares of test images; None where it was not judged so. seconds: of pruning.

    as_pruned: with the batch-norm statistics of the dense network; reestimated: with those of the calibration images.
    correct: of the re-estimated network, a bit for each test image of the draw's share, base64.
    """

    draw: int
    images: int
    as_pruned: float | None
    reestimated: float
    correct: str


@dataclass
class Bench:
    """A network, images to calibrate with and to judge on, draw by draw. digest: of all of it."""

    model: nn.Module
    calibration: list[Tensor]
    judged: list[Split]
    settings: Settings
    digest: str


def open_bench(folder: Path, settings: Settings) -> Bench:
    """Read the pretrained network and its images. Raises as `load_resnet20` and `load_cifar10`."""
    model = load_resnet20(folder)
    source = generator("vision calibration", 0)
    drawn = torch.randperm(TRAINING, generator=source)[: settings.draws * settings.samples]
    # Augmented: the statistics of plain images are others than those it was trained with, and cost 3 points dense.
    training = augmented(load_cifar10(folder, "train", drawn).inputs, source)
    judged = load_cifar10(folder, "test", torch.arange(settings.images))
    return make_bench(model, list(training.split(settings.samples)), judged, settings)


def make_bench(model: nn.Module, calibration: list[Tensor], judged: Split, settings: Settings) -> Bench:
    """A bench of any network whose batch norms are named as the ResNet's."""
    told = hashlib.sha256(source_digest().encode() + torch.__version__.encode() + repr(settings).encode())
    for tensor in (*model.state_dict().values(), *calibration, judged.inputs, judged.labels):
        told.update(tensor.contiguous().numpy().tobytes())
    shares = [judged.take(index) for index in torch.arange(len(judged)).tensor_split(settings.draws)]
    return Bench(model, calibration, shares, settings, told.hexdigest()[:16])


class Store(Runs[Result]):
    """See `Runs`."""

    kind = Result


def execute(bench: Bench, case: Case | None, draw: int) -> Result:
    """Prune a copy of the network, check it, and judge it; no case: judge it dense."""
    model, images = copy.deepcopy(bench.model), bench.calibration[draw]
    method = None if case is None else case.build()
    done = pruned(model, method, lambda: list(images[: bench.settings.solving].split(64)), draw)
    judged, batch = bench.judged[draw], bench.settings.batch
    own = float(judge(model, judged, batch).float().mean()) if draw == 0 or case is None else None
    right = judge(reestimated(model, images), judged, batch)
    return Result(
        key=bench.digest, variant="dense" if case is None else case.variant,
        pattern="" if case is None else case.pattern, draw=draw, **vars(done),
        images=len(judged), as_pruned=own, reestimated=float(right.float().mean()),
        correct=base64.b64encode(np.packbits(right.numpy()).tobytes()).decode(),
    )  # fmt: skip


def correct_of(result: Result) -> np.ndarray:
    """Whether each test image of the draw's share was told: (images,) bool."""
    packed = np.frombuffer(base64.b64decode(result.correct), np.uint8)
    return np.unpackbits(packed, count=result.images).astype(bool)


@torch.no_grad()
def judge(model: nn.Module, images: Split, batch: int) -> Tensor:
    """Whether each image is told: (images,) bool."""
    fast = folded(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    batches = images.inputs.split(batch)
    told = [fast(x.contiguous(memory_format=torch.channels_last)).argmax(1) for x in batches]
    return torch.cat(told) == images.labels


@torch.no_grad()
def reestimated(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose batch norms hold the mean and variance of these images, from one pass; no weight changes."""
    twin = copy.deepcopy(model)
    norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of this batch alone
        norm.train()
    twin(images)
    for norm in norms:
        norm.eval()
    return twin
