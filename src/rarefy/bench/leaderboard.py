"""From results to tables that may be compared: rows over seeds, paired differences, and what they do not show.

A table holds results of one setting only: the same task, images, versions, code, hardware and threads. A row states
what a comparison stands on, its class labels, site list, exact non-zeros, FLOPs formula and seeds, or is rejected.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rarefy.bench.results import CONTROLS, Control, Result
from rarefy.bench.statistics import Difference, Interval, holm, interval, paired
from rarefy.bench.tasks import TASKS

__all__ = ["Comparison", "Row", "Table", "make_row", "make_tables"]


@dataclass(frozen=True)
class Row:
    """One method (or one control of it) at one sparsity over its seeds. FLOPs are shares of the dense network's.

    Raises ValueError where something that a comparison stands on is missing.
    """

    name: str
    control: Control
    sparsity: float
    accuracy: Interval
    by_seed: Mapping[int, float]
    labels: tuple[str, ...]
    sites: str
    nonzeros: tuple[int, ...]
    formula: str
    prunable: int
    training: float
    inference: float
    bytes: int
    wall_seconds: float
    method: Mapping[str, Any]

    def __post_init__(self) -> None:
        needed = {
            "class labels": self.labels, "site-list hash": self.sites, "exact non-zeros": self.nonzeros,
            "FLOPs formula": self.formula, "seeds": self.by_seed,
        }  # fmt: skip
        missing = [what for what, has in needed.items() if not has]
        if missing:
            raise ValueError(f"{self.name} at {self.sparsity:g} is rejected: it has no {', no '.join(missing)}")

    @property
    def is_plain(self) -> bool:
        return self.control == "none"


@dataclass(frozen=True)
class Comparison:
    """One row over another, seed by seed. p_holm: of the paired t test, corrected for all comparisons of the table."""

    better: tuple[str, Control]
    worse: tuple[str, Control]
    difference: Difference
    p_holm: float


@dataclass(frozen=True)
class Table:
    """Rows at one sparsity in one setting, best first, controls below their method. rejected: what was left out."""

    task: Mapping[str, Any]
    sparsity: float
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    judged: int
    judge: str
    environment: Mapping[str, Any]
    formula_text: str
    rejected: tuple[str, ...] = field(default=())

    def row(self, name: str, control: Control = "none") -> Row | None:
        """The row of that name, if there is one."""
        return next((r for r in self.rows if (r.name, r.control) == (name, control)), None)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; intervals of single seeds are null."""
        return json.loads(json.dumps(asdict(self)).replace("NaN", "null"))


def make_tables(results: Iterable[Result]) -> list[Table]:
    """One table for each setting and sparsity, in the order of sparsity; dense results stand in every table."""
    settings: dict[str, list[Result]] = {}
    for result in results:
        settings.setdefault(_setting(result), []).append(result)
    return [
        _table(found, sparsity)
        for found in settings.values()
        for sparsity in sorted({r.run.sparsity for r in found} - {0.0}) or [0.0]
    ]


def make_row(results: Sequence[Result]) -> Row:
    """The row of results that differ in their seed only. Raises ValueError where they differ in more."""
    first = results[0]
    kind = _kind(first)
    odd = next((r for r in results if _kind(r) != kind), None)
    if odd is not None:
        raise ValueError(
            f"{first.run.name} at {first.run.sparsity:g} is rejected: its seeds ran different methods or networks"
        )
    by_seed = {r.run.seed: r.train.accuracy for r in results}
    if len(by_seed) < len(results):
        raise ValueError(f"{first.run.name} at {first.run.sparsity:g} is rejected: a seed is there twice")
    flops = [r.train.flops for r in results]
    return Row(
        name=first.run.name,
        control=first.run.control,
        sparsity=first.run.sparsity,
        accuracy=interval(list(by_seed.values())),
        by_seed=by_seed,
        labels=tuple(first.train.labels),
        sites=first.train.sites,
        nonzeros=tuple(sorted({r.train.nonzeros for r in results})),
        formula=first.train.flops.formula,
        prunable=first.train.prunable,
        training=_mean(f.training / f.training_dense for f in flops),
        inference=_mean(f.inference / f.inference_dense for f in flops),
        bytes=max(r.train.bytes for r in results),
        wall_seconds=_mean(r.train.wall_seconds for r in results),
        method=first.method,
    )


def _setting(result: Result) -> str:
    parts = [result.run.task, result.run.data, result.environment.decisive()]
    return json.dumps(parts, sort_keys=True)


def _kind(result: Result) -> list[Any]:
    train = result.train
    return [result.method, train.labels, train.sites, train.prunable, train.flops.formula, train.flops.text]


def _table(results: Sequence[Result], sparsity: float) -> Table:
    groups: dict[tuple[str, Control], list[Result]] = {}
    for result in results:
        if result.run.sparsity in (0.0, sparsity):
            groups.setdefault((result.run.name, result.run.control), []).append(result)
    rows: list[Row] = []
    rejected: list[str] = []
    for group in groups.values():
        try:
            rows.append(make_row(group))
        except ValueError as error:
            rejected.append(str(error))
    rows, strangers = _same_footing(rows)
    first = results[0]
    return Table(
        task=_task(first),
        sparsity=sparsity,
        rows=tuple(_ordered(rows)),
        comparisons=tuple(_comparisons(rows, resolution=100 / first.train.judged)),
        judged=first.train.judged,
        judge=first.run.judge,
        environment=first.environment.model_dump(),
        formula_text=first.train.flops.text,
        rejected=(*rejected, *strangers),
    )


def _same_footing(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """Rows with the site list and the formula of the first; a small dense network may have other sites."""
    if not rows:
        return [], []
    sites, formula = next((r.sites for r in rows if r.control != "small_dense"), rows[0].sites), rows[0].formula
    fit = [r for r in rows if r.formula == formula and (r.sites == sites or r.control == "small_dense")]
    return fit, [f"{r.name} is rejected: other prunable tensors or another FLOPs formula" for r in rows if r not in fit]


def _ordered(rows: list[Row]) -> list[Row]:
    """Best first; the controls of a method below it."""
    order = ("none", *CONTROLS)
    best = {r.name: -r.accuracy.mean for r in rows if r.is_plain}
    return sorted(rows, key=lambda r: (best.get(r.name, 0.0), r.name, order.index(r.control)))


def _comparisons(rows: list[Row], resolution: float) -> list[Comparison]:
    """All against random masks; the best against dense; neighbours; all against small dense and their own controls."""
    ordered = _ordered(rows)
    plain = [r for r in ordered if r.is_plain]
    sparse = [r for r in plain if r.name != "dense"]
    random = [r for r in sparse if r.name == "random"]
    dense = [r for r in plain if r.name == "dense"]
    pairs = [(r, base) for base in random for r in sparse if r is not base]
    pairs += [(whole, sparse[0]) for whole in dense if sparse]
    pairs += [(a, b) for a, b in itertools.pairwise(sparse) if not {a.name, b.name} & {"random"}]
    small = [r for r in ordered if r.control == "small_dense"]
    pairs += [(r, b) for b in small for r in sparse]
    pairs += [(a, b) for a in plain for b in ordered if b.name == a.name and not b.is_plain and b not in small]
    shared = [(a, b) for a, b in pairs if a.by_seed.keys() & b.by_seed.keys()]
    differences = [paired(a.by_seed, b.by_seed, resolution) for a, b in shared]
    corrected = holm([d.p for d in differences])
    return [
        Comparison((a.name, a.control), (b.name, b.control), d, p)
        for (a, b), d, p in zip(shared, differences, corrected, strict=True)
    ]


def _task(result: Result) -> dict[str, Any]:
    """The task's fields with the names that people know it by."""
    known = next((t for t in TASKS.values() if t.__name__ == result.run.task.get("kind")), None)
    name, network = (known.name, known.network) if known else (str(result.run.task.get("kind")), "")
    return {**result.run.task, "name": name, "network": network, "steps": result.run.task.get("steps", 0)}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
