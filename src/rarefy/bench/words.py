"""What a table shows and what it does not, in sentences."""

from collections.abc import Iterable

from rarefy.bench.leaderboard import Comparison, Row, Table
from rarefy.bench.lineup import title
from rarefy.bench.results import Control

__all__ = ["heading", "row_title", "sentences"]

_CONTROL = {
    "shuffled": "shuffled in layer",
    "reinitialised": "other first weights",
    "extended": "trained twice as long",
    "small_dense": "small dense",
}


def heading(table: Table) -> str:
    """`digits · MLP 64-300-100-10 · 5 % kept (2 510 of 50 200) · 5 seeds · 1 500 steps`."""
    task = table.task
    kept = ""
    budget = _budget(table)
    if budget is not None:
        kept = f"{100 * (1 - table.sparsity):.4g} % kept ({grouped(budget.nonzeros[0])} of {grouped(budget.prunable)})"
    parts = [task["name"], task["network"], kept, _seeds(table), f"{grouped(task['steps'])} steps"]
    if table.judge == "validation":
        parts.append("judged on held-out training images")
    return " · ".join(filter(None, parts))


def row_title(row: Row) -> str:
    """How a row is called in a table: controls stand below their method."""
    return title(row.name) if row.is_plain else f"  {_CONTROL[row.control]}"


def grouped(number: int) -> str:
    """Digits in groups of three, with spaces that do not break."""
    return f"{number:,}".replace(",", "\u202f")


def sentences(table: Table) -> list[str]:
    """Resolved and unresolved differences, the correction for making many, and what the intervals leave out."""
    said = [*_differences(table.comparisons), *_correction(table.comparisons), _images(table)]
    return [*said, *_footing(table), *table.rejected]


def _differences(comparisons: Iterable[Comparison]) -> list[str]:
    shown, hidden = [], []
    for c in comparisons:
        (shown if c.difference.resolved else hidden).append(f"{_pair(c)} {c.difference}")
    said = (
        [f"Resolved, by the 95 % interval of differences seed by seed (points): {'; '.join(shown)}."] if shown else []
    )
    return said + ([f"Not resolved: {'; '.join(hidden)}."] if hidden else [])


def _pair(c: Comparison) -> str:
    (a, control_a), (b, control_b) = c.better, c.worse
    if c.difference.mean < 0:
        return f"{_name(a, control_a)} against {_name(b, control_b)}"
    return f"{_name(a, control_a)} over {_name(b, control_b)}"


def _name(name: str, control: Control) -> str:
    if control == "small_dense":
        return _CONTROL[control]
    return title(name) if control == "none" else f"{title(name)}, {_CONTROL[control]}"


def _correction(comparisons: tuple[Comparison, ...]) -> list[str]:
    alone = [c for c in comparisons if c.difference.resolved]
    if len(comparisons) < 2 or not alone:
        return []
    stay = [_pair(c) for c in alone if c.p_holm < 0.05]
    kept = "all of them stay" if len(stay) == len(alone) else f"these stay: {'; '.join(stay)}" if stay else "none stays"
    chance = 0.05 * len(comparisons)
    return [
        f"{len(comparisons)} comparisons were made; were nothing different, some {chance:.1g} would look resolved by "
        f"chance. Corrected for that (Holm), {kept}."
    ]


def _images(table: Table) -> str:
    which = "test" if table.judge == "test" else "held-out"
    few = " One seed has no interval: give --seeds 5." if any(r.accuracy.half is None for r in table.rows) else ""
    return (
        f"Intervals are over seeds, on the same {grouped(table.judged)} {which} images; one image is "
        f"{100 / table.judged:.2g} points, and other images would move all rows.{few}"
    )


def _footing(table: Table) -> Iterable[str]:
    budget = _budget(table)
    for row in table.rows:
        if budget is None or row.control == "small_dense" or row.name == "dense":
            continue
        if any(abs(n - budget.nonzeros[0]) > 0.01 * budget.nonzeros[0] for n in row.nonzeros):
            yield f"{_name(row.name, row.control)} keeps {_range(row.nonzeros)} weights: not the same budget."
    seeds = {seed for row in table.rows for seed in row.by_seed}
    for row in table.rows:
        if lacking := sorted(seeds - row.by_seed.keys()):
            yield f"{_name(row.name, row.control)} lacks seed {', '.join(map(str, lacking))}."


def _range(numbers: tuple[int, ...]) -> str:
    return grouped(numbers[0]) if len(numbers) == 1 else f"{grouped(numbers[0])}–{grouped(numbers[-1])}"


def _budget(table: Table) -> Row | None:
    """The row whose count the others are held against."""
    return table.row("random") or next((r for r in table.rows if r.name != "dense"), None)


def _seeds(table: Table) -> str:
    count = max((len(row.by_seed) for row in table.rows), default=0)
    return f"{count} seed{'s' * (count != 1)}"
