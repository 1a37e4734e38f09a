"""Make a sweep's runs one after another, so that none disturbs another's time; go on where an earlier try stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from rarefy.bench.environment import Environment, environment
from rarefy.bench.execute import execute
from rarefy.bench.results import Result
from rarefy.bench.runs import Run
from rarefy.bench.store import Store

__all__ = ["Outcome", "Reporter", "run_all", "settings"]


class Reporter:
    """Is told how a sweep goes on, and keeps it to itself; `rarefy.bench.progress` shows it."""

    def plan(self, work: int) -> None:
        """So many batches are to come."""

    def start(self, run: Run) -> None:
        """This run begins."""

    def tick(self, batches: int) -> None:
        """So many more batches are done."""

    def note(self, text: str) -> None:
        """Something that a person should read."""


@dataclass
class Outcome:
    """Results in the order of the runs; how many were made now and not read; and which runs raised what."""

    results: list[Result] = field(default_factory=list)
    made: int = 0
    failures: list[str] = field(default_factory=list)


def run_all(runs: list[Run], store: Store, reporter: Reporter | None = None) -> Outcome:
    """Make all runs that are not in the store yet. A run that raises is reported, and the others go on.

    Killed at any moment, every finished run stays; the next call makes the rest.
    """
    reporter = reporter or Reporter()
    outcome = Outcome()
    pending = store.pending(runs)
    _tell(store, reporter)
    reporter.plan(sum(run.work for run in pending))
    for run in pending:
        reporter.start(run)
        try:
            _make(run, store, reporter)
            outcome.made += 1
        except (ValueError, RuntimeError) as error:
            outcome.failures.append(f"{run}: {' '.join(str(error).split())}")
            reporter.note(outcome.failures[-1])
    outcome.results = [result for run in runs if (result := store.find(run)) is not None]
    return outcome


@contextmanager
def settings(threads: int) -> Iterator[Environment]:
    """Run the block with so many threads and with denormal numbers flushed to zero; both are as before afterwards.

    Weights of dead units decay until they are denormal, where arithmetic is many times slower. Raises ValueError for
    fewer threads than one.
    """
    if threads < 1:
        raise ValueError(f"--threads {threads}: at least one thread is needed")
    before, flushed = torch.get_num_threads(), _flushes()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        yield environment(threads=threads, flush_denormal=_flushes())
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(flushed)


def _make(run: Run, store: Store, reporter: Reporter) -> None:
    parent = store.masks(run.parent) if run.parent is not None else None
    result, masks = execute(run, store.data, store.environment, parent=parent, tick=reporter.tick)
    store.save(run, result, masks)


def _tell(store: Store, reporter: Reporter) -> None:
    for problem in dict.fromkeys(store.problems):
        reporter.note(problem)
    store.problems.clear()


def _flushes() -> bool:
    """Whether denormal results become zero now."""
    return float(torch.tensor(3e-308, dtype=torch.float64) / 4) == 0.0
