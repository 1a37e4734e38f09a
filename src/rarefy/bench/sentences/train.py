"""From the dense encoder to directories of sparse ones: each sparsity goes on from the one before."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rarefy.bench.sentences.corpus import Sentences
from rarefy.bench.sentences.distil import Progress, Recipe, Run, distil
from rarefy.bench.sentences.encoder import open_encoder, tokens_of
from rarefy.io.collect import collect, stored_as
from rarefy.io.directory import write_model
from rarefy.io.record import CalibrationRecord, read_record
from rarefy.io.shards import Shards

__all__ = ["TEXTS", "distilled", "name_of", "train"]

TEXTS = "sentences.json"


def name_of(sparsity: float) -> str:
    """The folder of a sparsity in OUT.

    >>> name_of(0.9)
    'sparse-90'
    """
    return f"sparse-{100 * sparsity:.4g}"


def distilled(out: Path) -> list[Path]:
    """The directories that are there, the least sparse first."""
    return sorted(out.glob("sparse-*"), key=lambda folder: float(folder.name.removeprefix("sparse-")))


def train(
    source: Path,
    texts: Callable[[], Sentences],
    out: Path,
    minutes: Mapping[float, float],
    recipe: Recipe,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Distil the encoder of `source` and write OUT/sparse-80 and so on. minutes: sparsity → how long.

    What is there already is not made again, and the next sparsity goes on from it. Returns what each took.
    """
    progress(0, 1, "text")
    sentences = _sentences(texts, out)
    dense, tokenizer = open_encoder(source)
    tokens = tokens_of(tokenizer, sentences.train)
    student, before, said = copy.deepcopy(dense.model), 0.0, []
    for sparsity in sorted(minutes):
        folder = out / name_of(sparsity)
        if folder.exists():
            student = open_encoder(folder)[0].model
        else:
            its = dataclasses.replace(recipe, sparsity=sparsity, initial=before, minutes=minutes[sparsity])
            run = distil(dense.model, student, tokens, its, progress)
            _write(source, folder, student, run, its, sentences)
        said.append(dict(read_record(folder).settings))
        before = sparsity
    return said


def _sentences(texts: Callable[[], Sentences], out: Path) -> Sentences:
    """Those that OUT has, else read and written there."""
    path = out / TEXTS
    if not path.is_file():
        texts().save(path)
    return Sentences.load(path)


def _write(source: Path, folder: Path, student: Any, run: Run, recipe: Recipe, sentences: Sentences) -> None:
    """The directory: pruned weights with their record, and the biases and norms that learned with them."""
    saw = CalibrationRecord(sha256=sentences.digest(), settings={"samples": recipe.samples})
    said = {
        "recipe": dataclasses.asdict(recipe), "steps": run.steps, "seconds": round(run.seconds),
        "loss": round(run.loss, 5), "sentences": len(sentences.train),
    }  # fmt: skip
    changes, record = collect(student, run.sparsity, source, calibration=saw, settings=said)
    learned = {f"encoder.{name}": p.detach() for name, p in student.encoder.named_parameters()}
    others = stored_as(student, learned, Shards(source))
    write_model(source, folder, others | changes, record)
