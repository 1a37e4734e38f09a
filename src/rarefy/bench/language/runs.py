"""Runs of the language table: one case, one calibration draw, one JSON file; those that are done are not made again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rarefy.bench.environment import source_digest
from rarefy.bench.language.cases import Case
from rarefy.bench.language.corpus import Corpus
from rarefy.bench.memory import high_water, reset_high_water
from rarefy.bench.one_shot import Run, Runs, pruned
from rarefy.bench.perplexity import perplexity
from rarefy.bench.seeds import generator
from rarefy.io.calibration import encode
from rarefy.io.directory import read_model
from rarefy.io.pretrained import context_length, read_config, read_tokenizer

__all__ = ["Bench", "Result", "Settings", "Store", "execute", "open_bench"]


@dataclass(frozen=True)
class Settings:
    """Windows: `length` tokens each, `samples` to calibrate with, `windows` to judge on. characters: of the training
    text at most, None for all of it."""

    length: int = 256
    samples: int = 16
    windows: int = 64
    seeds: int = 3
    characters: int | None = None
    threads: int = 2


class Result(Run):
    """One run. seconds: of pruning; peak: bytes that pruning added to what was resident with the model, at most.

    perplexity, low, high: on the held-out windows, with the 95 % interval over them; nll: of each window, nats a token.
    """

    seed: int
    perplexity: float
    low: float | None
    high: float | None
    top1: float
    nll: list[float]
    peak: int


@dataclass
class Bench:
    """A model directory and the tokens that it is calibrated and judged with. digest: of all of it."""

    folder: Path
    settings: Settings
    training: Tensor
    judged: Tensor
    digest: str

    def calibration(self, seed: int) -> list[dict[str, Tensor]]:
        """Windows [4, length] drawn from the training text: of few batches the walk repeats much to prove itself."""
        length = self.settings.length
        source = generator("language calibration", seed)
        first = torch.randint(len(self.training) - length + 1, (self.settings.samples, 1), generator=source)
        return [{"input_ids": rows} for rows in self.training[first + torch.arange(length)].split(4)]


def open_bench(folder: Path, corpus: Corpus, settings: Settings) -> Bench:
    """Read and tokenise. Raises ValueError for texts shorter than a window, and for windows beyond the context."""
    context = context_length(read_config(folder))
    if context is not None and settings.length > context:
        raise ValueError(f"windows of {settings.length} tokens are longer than the context of {folder}: {context}")
    tokenizer = read_tokenizer(folder)
    training = encode(tokenizer, corpus.text("train")[: settings.characters])
    if len(training) < settings.length:
        raise ValueError(f"the training text holds {len(training)} tokens, fewer than one window of {settings.length}")
    judged = _judged(encode(tokenizer, corpus.text("judged")[: settings.characters]), settings)
    told = hashlib.sha256(source_digest().encode() + torch.__version__.encode())
    told.update(json.dumps([settings.length, settings.samples, settings.windows, settings.threads]).encode())
    for path in sorted(folder.glob("*.safetensors")):
        told.update(path.read_bytes())
    told.update(training.numpy().tobytes() + judged.numpy().tobytes())
    return Bench(folder, settings, training, judged, told.hexdigest()[:16])


def _judged(ids: Tensor, settings: Settings) -> Tensor:
    """Windows [windows, length] that do not overlap, evenly from all of the held-out text."""
    found = len(ids) // settings.length
    if not found:
        raise ValueError(f"the held-out text holds {len(ids)} tokens, fewer than one window of {settings.length}")
    rows = ids[: found * settings.length].view(found, settings.length)
    wanted = min(found, settings.windows)
    return rows[torch.arange(wanted) * found // wanted]


class Store(Runs[Result]):
    """See `Runs`."""

    kind = Result


def execute(bench: Bench, case: Case | None, seed: int) -> Result:
    """Prune a fresh copy of the model, check it, and judge it; no case: judge it dense."""
    model = read_model(bench.folder).eval()
    before = reset_high_water()
    done = pruned(model, None if case is None else case.build(), lambda: bench.calibration(seed), seed)
    peak = high_water() - before
    found = perplexity(model, bench.judged, batch=16)
    return Result(
        key=bench.digest, variant="dense" if case is None else case.variant,
        pattern="" if case is None else case.pattern, seed=seed, **vars(done),
        perplexity=found.value, low=found.low, high=found.high, top1=found.top1, nll=list(found.nll_per_window),
        peak=0 if case is None else peak,
    )  # fmt: skip
