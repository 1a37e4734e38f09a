"""How a benchmark begins and ends: what is known of machine, kernels and peers, and the files that it leaves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rarefy.bench.cpu.document import Document, now
from rarefy.bench.cpu.machine import measure_machine, pin
from rarefy.bench.cpu.peers.environments import Peers, peers
from rarefy.bench.cpu.timing import Plan
from rarefy.bench.environment import environment
from rarefy.bench.files import write_whole
from rarefy.core import native

__all__ = ["begin", "finish", "footer", "plan"]


def plan(quick: bool) -> Plan:
    """How long each comparison is measured."""
    return Plan(rounds=7, sample=0.002, budget=1.5, slowest=0.5) if quick else Plan(rounds=21, budget=10.0)


def begin(
    benchmark: Literal["matrices", "models", "training"],
    threads: int,
    quick: bool,
    settings: Mapping[str, int | list[str]],
) -> tuple[Document, Peers]:
    """Pin the process, measure the machine, find the peers: an empty document and the peers."""
    machine = measure_machine(threads, pin(threads))
    found = peers()
    document = Document(
        benchmark=benchmark, quick=quick, when=now(), settings=dict(settings),
        environment=environment(threads=threads, flush_denormal=False),
        kernels=str(native.status().isa or native.status().reason), machine=machine,
        peers=found.versions, missing_peers=found.missing,
    )  # fmt: skip
    return document, found


def footer(document: Document) -> str:
    """Under which conditions the figures were taken."""
    where, limits = document.environment, document.machine
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in limits.peak.items())
    measured = limits.missing or f"{limits.memory:.0f} GB/s read from memory; peaks in GFLOP/s: {peaks}"
    others = ", ".join(f"{name} {version}" for name, version in document.peers.items())
    return (
        f"{where.processor}, {where.threads} threads, last-level cache {limits.cache >> 20} MiB, {measured}. "
        f"rarefy {where.rarefy} (kernels {document.kernels}), torch {where.torch}, {others or 'no peers'}. "
        f"{document.when}{', quick' if document.quick else ''}."
    )


def finish(document: Document, path: Path, tables: str) -> None:
    """Write the document, and beside it the tables as Markdown."""
    document.write(path)
    heading = f"# rarefy on the processor: {document.benchmark}\n\n{footer(document)}\n\n"
    write_whole(path.with_suffix(".md"), (heading + tables + "\n").encode())
