"""Runs of the ResNet table: one case, one calibration draw, one JSON file; those that are done are not made again."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from rarefy.bench.data import Split
from rarefy.bench.environment import source_digest
from rarefy.bench.files import write_whole
from rarefy.bench.seeds import generator
from rarefy.bench.vision.cases import Case
from rarefy.bench.vision.cifar import augmented, load_cifar10
from rarefy.bench.vision.resnet import folded, load_resnet20
from rarefy.core.check import check
from rarefy.core.sparsify import sparsify
from rarefy.io.prune import chosen_sites

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


class Result(BaseModel):
    """One run. accuracy: shares of test images; None where it was not judged so. seconds: of pruning.

    as_pruned: with the batch-norm statistics of the dense network; reestimated: with those of the calibration images.
    correct: of the re-estimated network, a bit for each test image of the draw's share, base64.
    """

    model_config = ConfigDict(extra="forbid")

    key: str
    variant: str
    pattern: str
    draw: int
    method: dict[str, Any]
    kept: int
    total: int
    images: int
    as_pruned: float | None
    reestimated: float
    correct: str
    seconds: float
    warnings: list[str]


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


@dataclass
class Store:
    """Results in a folder. problems: files that should be results, and why not."""

    folder: Path
    digest: str
    problems: list[str]

    def path(self, case: Case | None, draw: int) -> Path:
        """Where a run's result belongs; no case: the dense model."""
        name = "dense" if case is None else f"{case.variant} {case.pattern}"
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return self.folder / f"{plain}-{draw}-{self.digest[:8]}.json"

    def find(self, case: Case | None, draw: int) -> Result | None:
        """The result, if it is there and whole."""
        path = self.path(case, draw)
        if not path.exists():
            return None
        try:
            found = Result.model_validate_json(path.read_bytes())
        except ValueError as error:
            self.problems.append(f"{path.name} is not a whole result ({str(error).splitlines()[0]}); it is run again")
            return None
        return found if found.key == self.digest else None

    def save(self, case: Case | None, result: Result) -> None:
        """The whole file or nothing."""
        write_whole(self.path(case, result.draw), (json.dumps(result.model_dump()) + "\n").encode())


def execute(bench: Bench, case: Case | None, draw: int) -> Result:
    """Prune a copy of the network, check it, and judge it; no case: judge it dense."""
    model, images = copy.deepcopy(bench.model), bench.calibration[draw]
    method: dict[str, Any] = {}
    said: list[str] = []
    kept = total = sum(p.numel() for p in model.parameters())
    begin = time.perf_counter()
    if case is not None:
        chosen = case.build()
        data = list(images[: bench.settings.solving].split(64)) if "data" in chosen.needs else None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sparsity = sparsify(model, chosen, data=data, only=chosen_sites(model), seed=draw)
        check(model, sparsity)
        said, method = sorted({str(each.message) for each in caught}), chosen.to_dict()
        kept, total = sum(sparsity.kept(s) for s in sparsity.sites), sum(s.numel for s in sparsity.sites)
    seconds = 0.0 if case is None else time.perf_counter() - begin
    judged, batch = bench.judged[draw], bench.settings.batch
    own = float(judge(model, judged, batch).float().mean()) if draw == 0 or case is None else None
    right = judge(reestimated(model, images), judged, batch)
    return Result(
        key=bench.digest, variant="dense" if case is None else case.variant,
        pattern="" if case is None else case.pattern, draw=draw, method=method, kept=kept, total=total,
        images=len(judged), as_pruned=own, reestimated=float(right.float().mean()),
        correct=base64.b64encode(np.packbits(right.numpy()).tobytes()).decode(), seconds=seconds, warnings=said,
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
