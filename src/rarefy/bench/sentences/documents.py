"""The results document: what was pruned how, what it costs in quality, and how fast each engine runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rarefy.bench.cpu.document import Comparison, Timing
from rarefy.bench.environment import Environment
from rarefy.bench.files import write_whole
from rarefy.bench.sentences.judge import Quality

__all__ = ["Distilled", "Document", "Engine", "OneShot", "read_document"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OneShot(_Model):
    """An encoder pruned without training. seconds, warnings: of pruning."""

    method: str
    pattern: str
    kept: int
    total: int
    seconds: float
    warnings: list[str] = []
    quality: Quality


class Distilled(_Model):
    """An encoder that was distilled. kept, total: of the pruned weights. training: recipe, steps, seconds."""

    name: str
    kept: int
    total: int
    quality: dict[str, Quality]
    training: dict[str, Any]


class Engine(_Model):
    """A model run by an engine. times: by shape, "batch×tokens", microseconds per call; speedup: over torch fp32 with
    the dense model, in the same rounds. choice: what pack chose, by shape. left_out: why there is nothing."""

    model: str
    engine: str
    sparsity: float
    quality: Quality | None = None
    bytes: int | None = None
    times: dict[str, Timing] = {}
    speedup: dict[str, Comparison] = {}
    choice: dict[str, str] = {}
    left_out: str | None = None


class Document(_Model):
    """All of it. corpus: sha256 of the text. texts: sentences and queries that are judged; compared: the same of
    engines and of one-shot pruning, which are judged on fewer. dense: the dense model judged by itself. peers:
    versions."""

    schema_version: Literal[1] = 1
    when: str
    environment: Environment
    kernels: str
    corpus: str
    texts: dict[str, list[int]]
    compared: dict[str, tuple[int, int]] = {}
    peers: dict[str, str] = {}
    dense: dict[str, Quality] = {}
    one_shot: list[OneShot] = []
    distilled: list[Distilled] = []
    engines: list[Engine] = []

    def write(self, path: Path) -> None:
        """The whole document or nothing."""
        write_whole(path, (self.model_dump_json(indent=1) + "\n").encode())

    def engine(self, model: str, engine: str, sparsity: float) -> Engine:
        """The entry of a model and an engine, made where there is none."""
        for each in self.engines:
            if (each.model, each.engine) == (model, engine):
                return each
        self.engines.append(Engine(model=model, engine=engine, sparsity=sparsity))
        return self.engines[-1]


def read_document(path: Path, fresh: Document) -> Document:
    """What an earlier part of the same benchmark wrote to `path`, brought up to date; `fresh` where there is none, or
    one of other text or another machine."""
    try:
        found = Document.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return fresh
    same = (found.corpus, found.texts, found.environment.rarefy, found.environment.processor)
    if same != (fresh.corpus, fresh.texts, fresh.environment.rarefy, fresh.environment.processor):
        return fresh
    return found.model_copy(update={"when": fresh.when, "environment": fresh.environment, "peers": fresh.peers})
