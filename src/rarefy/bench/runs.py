"""What is to be run: a run is a task, a method, a sparsity, a seed and a control; a sweep is a whole comparison."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rarefy.bench.data import Data
from rarefy.bench.environment import Environment
from rarefy.bench.lineup import BASELINES, make_method
from rarefy.bench.results import Control, RunSection, key_of
from rarefy.bench.tasks import Task
from rarefy.core.method import Driver, Method

__all__ = ["Run", "sweep"]

_DENSE_CONTROLS = ("small_dense", "extended")


@dataclass(frozen=True)
class Run:
    """One run. `name` is how tables call the method. A control other than "none" takes a part of the method away."""

    name: str
    task: Task
    method: Method | Driver
    sparsity: float
    seed: int
    control: Control = "none"

    @property
    def steps(self) -> int:
        """Batches of one training."""
        return self.task.steps * (2 if self.control == "extended" else 1)

    @property
    def work(self) -> int:
        """About how many batches the whole run takes, for the progress bar."""
        if not isinstance(self.method, Driver):
            return self.steps
        removed = getattr(self.method, "share", 0.2)  # of the weights that are left, in every round
        return self.steps * (1 + math.ceil(math.log(1 - self.sparsity) / math.log(1 - removed)))

    @property
    def parent(self) -> "Run | None":
        """The run whose final masks this one needs."""
        return replace(self, control="none") if self.control in ("shuffled", "reinitialised") else None

    def section(self, data: Data) -> RunSection:
        """The run section of the result file."""
        return RunSection(
            task=self.task.to_dict(),
            name=self.name,
            sparsity=self.sparsity,
            seed=self.seed,
            control=self.control,
            steps=self.steps,
            judge=self.task.judge,
            data=data.digest,
        )

    def key(self, data: Data, environment: Environment) -> str:
        """Hash of everything that decides the numbers."""
        return key_of(self.section(data), self.method.to_dict(), environment)

    def stem(self, data: Data, environment: Environment) -> str:
        """The name of its file, without suffix."""
        parts = [self.task.name, self.name, *([] if self.control == "none" else [self.control])]
        return "-".join([*parts, f"{self.sparsity:g}", f"seed{self.seed}", self.key(data, environment)])

    def __str__(self) -> str:
        control = "" if self.control == "none" else f" {self.control.replace('_', ' ')}"
        return f"{self.name}{control} at {self.sparsity:g}, seed {self.seed}"


def sweep(
    task: Task,
    methods: Sequence[str],
    sparsities: Sequence[float],
    seeds: int,
    controls: Sequence[Control] = (),
) -> list[Run]:
    """All runs of a comparison, each once, parents before their controls; the baselines are always among them.

    methods: names as `rarefy.bench.lineup` knows them. Raises ValueError for unknown names, and before anything is run
    where a method cannot have one of the sparsities.
    """
    if seeds < 1 or not sparsities:
        raise ValueError(f"a comparison needs at least one seed and one sparsity, got {seeds} and {list(sparsities)}")
    names = list(dict.fromkeys([*BASELINES, *methods]))
    every = [
        run
        for sparsity in dict.fromkeys(sparsities)
        for name in names
        for run in _with_controls(task, name, sparsity, seeds, controls, asked=name in methods)
    ]
    return list(dict.fromkeys(every))


def _with_controls(
    task: Task, name: str, sparsity: float, seeds: int, controls: Sequence[Control], *, asked: bool
) -> Iterable[Run]:
    """The method, then those of its controls that make sense: see `_DENSE_CONTROLS`."""
    dense = name == "dense"
    method = make_method(name, task, sparsity)
    runs = [Run(name, task, method, 0.0 if dense else sparsity, seed) for seed in range(seeds)]
    for control in controls:
        if (control in _DENSE_CONTROLS) if dense else (asked and control != "small_dense"):
            kept = sparsity if control == "small_dense" else runs[0].sparsity
            runs += [replace(run, control=control, sparsity=kept) for run in runs[:seeds]]
    return runs
