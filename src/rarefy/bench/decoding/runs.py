"""The settings of the decode table: llama.cpp first, then torch and packed, interleaved."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from rarefy.bench.cpu.cases import Zeros
from rarefy.bench.cpu.peers import llama
from rarefy.bench.cpu.peers.environments import Peers
from rarefy.bench.cpu.timing import Local, Plan, measure
from rarefy.bench.decode import Decoding, Timed, decode_speed
from rarefy.bench.decoding.shape import Shape, make_llama, thin

__all__ = ["ZEROS", "Decode", "Setting", "measure_all", "steps"]

DENSE = Zeros("unstructured", 0.0)
ZEROS = (Zeros("unstructured", 0.5), Zeros("unstructured", 0.7), Zeros("4x1", 0.9))
KINDS = {"bf16": ("BF16",), "int8": ("Q8_0", "Q4_0")}


@dataclass(frozen=True)
class Decode:
    """How it is measured. prompt: tokens before; tokens: generated after the first; rounds: of each measurement."""

    shape: Shape = field(default_factory=Shape)
    prompt: int = 16
    tokens: int = 16
    rounds: int = 5
    threads: int = 2
    values: tuple[str, ...] = ("bf16", "int8")


class Setting(BaseModel):
    """One setting. Seconds per token: `total` of generate, end to end, `inside` in the packed layers alone.

    dense: torch's bf16, in the rounds of this setting. ratio, low, high: dense / packed of generate. Our dense kernels
    are the packed side of the setting without zeros.
    """

    model_config = ConfigDict(extra="forbid")

    values: str
    pattern: str
    sparsity: float
    kept: int
    weights: int
    total_dense: float
    total_packed: float
    inside_dense: float | None
    inside_packed: float | None
    ratio: float
    low: float
    high: float
    bytes_dense: int
    bytes_packed: int
    packed_layers: int
    choices: dict[str, int]
    reverted: bool
    rounds: int


def steps(plan: Decode) -> int:
    """How often `say` is called."""
    return len(plan.values) * (len(ZEROS) + 1) + sum(len(KINDS[values]) for values in plan.values)


def measure_all(
    plan: Decode, peers: Peers, say: Callable[[str], object]
) -> tuple[list[Setting], dict[str, float], dict[str, str]]:
    """All settings; llama.cpp's seconds per token by type; and why there are none of the others."""
    seconds: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for kind, found in _llama(plan, peers, say):  # first, while nothing else is in memory
        (seconds if isinstance(found, float) else reasons)[kind] = found  # pyright: ignore[reportArgumentType]
    settings = list(_settings(plan, say))
    return settings, seconds, reasons


def _settings(plan: Decode, say: Callable[[str], object]) -> Iterator[Setting]:
    for values in plan.values:
        for zeros in (DENSE, *ZEROS):
            say(f"{values}, {'dense' if zeros is DENSE else zeros}")
            model = make_llama(plan.shape)
            kept, weights = thin(model, zeros)
            found = decode_speed(
                model, prompt=plan.prompt, tokens=plan.tokens, rounds=plan.rounds, threads=plan.threads,
                quantize="int8" if values == "int8" else None,
            )  # fmt: skip
            yield _setting(values, zeros, kept, weights, found)
            del model
            gc.collect()


def _setting(values: str, zeros: Zeros, kept: int, weights: int, found: Decoding) -> Setting:
    rows: Mapping[str, Timed] = {row.name.strip(): row for row in found.rows if row.unit == "token"}
    total, inside = rows["generate, end to end"], rows.get("inside packed layers")
    choices: dict[str, int] = {}
    for row in found.report.rows:
        choices[row.choice] = choices.get(row.choice, 0) + 1
    return Setting(
        values=values, pattern=zeros.pattern, sparsity=zeros.sparsity, kept=kept, weights=weights,
        total_dense=total.dense, total_packed=total.packed,
        inside_dense=inside.dense if inside else None, inside_packed=inside.packed if inside else None,
        ratio=total.ratio, low=total.low, high=total.high, bytes_dense=found.bytes_dense,
        bytes_packed=found.bytes_packed, packed_layers=found.packed_layers, choices=choices,
        reverted=bool(found.report.reverted), rounds=total.rounds,
    )  # fmt: skip


def _llama(plan: Decode, peers: Peers, say: Callable[[str], object]) -> Iterator[tuple[str, Any]]:
    for kind in (kind for values in plan.values for kind in KINDS[values]):
        say(f"llama.cpp {kind}")
        reason = peers.missing.get("llama-cpp-python") or peers.missing.get("gguf")
        yield kind, reason if reason is not None else _one_llama(plan, kind)


def _one_llama(plan: Decode, kind: str) -> float | str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = llama.write_gguf(Path(folder) / f"{kind}.gguf", kind, plan.shape)
            decoder = llama.Decoder(path, plan.threads, behind=plan.prompt, prompt=plan.prompt)
        except (RuntimeError, ValueError) as error:
            return str(error)
        with decoder:
            rounds = Plan(rounds=3 * plan.rounds, budget=20.0, slowest=5.0)
            samples, slow = measure({kind: Local(decoder.calls(1))}, rounds)
    return samples[kind].median if kind in samples else slow[kind]
