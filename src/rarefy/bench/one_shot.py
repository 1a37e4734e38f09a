"""What the tables of pruning without training share: methods, patterns in words, one pruning, and runs in a folder."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, ConfigDict
from torch import nn

from rarefy.bench.files import write_whole
from rarefy.core.check import check
from rarefy.core.method import Method
from rarefy.core.sparsify import sparsify
from rarefy.io.prune import chosen_sites
from rarefy.methods import ALPS, DSnoT, Magnitude, SparseGPT, Wanda

__all__ = ["METHODS", "Cells", "Pruning", "Run", "Runs", "asked", "pruned"]

METHODS: dict[str, Callable[[dict[str, Any]], Method]] = {
    "Magnitude": lambda named: Magnitude(**named),
    "Wanda": lambda named: Wanda(**named),
    "SparseGPT": lambda named: SparseGPT(**named),
    "DSnoT(Wanda)": lambda named: DSnoT(Wanda(**named)),
    "ALPS": lambda named: ALPS(**named),
}


def asked(pattern: str) -> dict[str, Any]:
    """What a column asks of a method. pattern: "50 %" (unstructured) or n:m, n kept.

    >>> asked("70 %"), asked("2:4")
    ({'sparsity': 0.7, 'pattern': 'unstructured'}, {'sparsity': None, 'pattern': '2:4'})
    """
    if ":" in pattern:
        return {"sparsity": None, "pattern": pattern}
    return {"sparsity": float(pattern.removesuffix(" %")) / 100, "pattern": "unstructured"}


@dataclass(frozen=True)
class Pruning:
    """What a method did: itself as a value, weights kept of those there were in what it pruned, its warnings, and the
    seconds that the pruning took (of the data and of the check nothing)."""

    method: dict[str, Any]
    kept: int
    total: int
    warnings: list[str]
    seconds: float


def pruned(model: nn.Module, method: Method | None, data: Callable[[], Any], seed: int) -> Pruning:
    """Prune a model in place, and check it. method None: it stays dense. data: makes batches, where any are needed."""
    if method is None:
        count = sum(p.numel() for p in model.parameters())
        return Pruning({}, count, count, [], 0.0)
    given = data() if "data" in method.needs else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        begin = time.perf_counter()
        sparsity = sparsify(model, method, data=given, only=chosen_sites(model), seed=seed)
        seconds = time.perf_counter() - begin
    check(model, sparsity)
    kept, total = sum(sparsity.kept(s) for s in sparsity.sites), sum(s.numel for s in sparsity.sites)
    return Pruning(method.to_dict(), kept, total, sorted({str(each.message) for each in caught}), seconds)


@runtime_checkable
class Named(Protocol):
    """A case: its row, and its column."""

    @property
    def variant(self) -> str: ...

    @property
    def pattern(self) -> str: ...


class Run(BaseModel):
    """One run of the bench whose digest is `key`. seconds: of pruning. Its method and counts: see `Pruning`."""

    model_config = ConfigDict(extra="forbid")

    key: str
    variant: str
    pattern: str
    method: dict[str, Any]
    kept: int
    total: int
    seconds: float
    warnings: list[str]


R = TypeVar("R", bound=Run)


@dataclass
class Runs(Generic[R]):
    """Results in a folder, a file for each case and calibration draw; no case is the dense model. A subclass names
    their `kind`. problems: files that should be results, and why not."""

    kind: ClassVar[type[Run]]

    folder: Path
    digest: str
    problems: list[str]

    def path(self, case: Named | None, draw: int) -> Path:
        """Where a run's result belongs."""
        name = "dense" if case is None else f"{case.variant} {case.pattern}"
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return self.folder / f"{plain}-{draw}-{self.digest[:8]}.json"

    def find(self, case: Named | None, draw: int) -> R | None:
        """The result, if it is there and whole."""
        path = self.path(case, draw)
        if not path.exists():
            return None
        try:
            found: Any = self.kind.model_validate_json(path.read_bytes())
        except ValueError as error:
            self.problems.append(f"{path.name} is not a whole result ({str(error).splitlines()[0]}); it is run again")
            return None
        return found if found.key == self.digest else None

    def save(self, case: Named | None, draw: int, result: R) -> None:
        """The whole file or nothing."""
        write_whole(self.path(case, draw), (result.model_dump_json() + "\n").encode())

    def found(self, case: Named | None, draw: int, make: Callable[[], R]) -> R:
        """The result that is there, else the one that `make` returns, which is kept."""
        result = self.find(case, draw)
        if result is None:
            result = make()
            self.save(case, draw, result)
        return result


class Cells:
    """A table whose `results` lie by row and column."""

    results: Mapping[tuple[str, str], Sequence[Any]]

    @property
    def variants(self) -> list[str]:
        """The rows, in order."""
        return list(dict.fromkeys(variant for variant, _ in self.results))

    @property
    def patterns(self) -> list[str]:
        """The columns, in order."""
        return list(dict.fromkeys(pattern for _, pattern in self.results))
