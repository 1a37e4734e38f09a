"""What a table shows and what it does not, in sentences."""

from collections.abc import Iterable

from rarefy.bench.leaderboard import Comparison, Row, Table
from rarefy.bench.lineup import title

__all__ = ["heading", "row_title", "sentences"]

_ITS_CONTROL = {
    "none": "",
    "shuffled": "its mask shuffled in layer",
    "reinitialised": "its mask with other first weights",
    "extended": "itself trained twice as long",
    "small_dense": "a small dense network",
}
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
    said = [*_over_random(table), *_others(table), *_correction(table), _images(table)]
    return [*said, *_footing(table), *table.rejected]


def _over_random(table: Table) -> Iterable[str]:
    found = [c for c in table.comparisons if c.worse == ("random", "none")]
    shown = [f"{_name(c)} {c.difference}" for c in found if c.difference.resolved]
    hidden = [f"{_name(c)} {c.difference}" for c in found if not c.difference.resolved]
    if shown:
        yield f"Over {title('random')}, in points, seed by seed, with 95 % interval: {'; '.join(shown)}."
    if hidden:
        yield f"Not resolved by {_seeds(table)} over {title('random')}: {'; '.join(hidden)}."


def _others(table: Table) -> Iterable[str]:
    """Neighbours in the table and the best against dense; then methods against their controls."""
    for control, lead in ((False, "In the table"), (True, "Against controls")):
        found = [c for c in table.comparisons if c.worse != ("random", "none") and (c.worse[1] != "none") == control]
        shown = [f"{_pair(c)} {c.difference}" for c in found if c.difference.resolved]
        hidden = [_pair(c) for c in found if not c.difference.resolved]
        if shown:
            yield f"{lead}: {'; '.join(shown)}."
        if hidden:
            yield f"{lead}, not resolved by {_seeds(table)}: {'; '.join(hidden)}."


def _pair(c: Comparison) -> str:
    worse, control = c.worse
    return f"{_name(c)} over {_ITS_CONTROL[control] or title(worse)}"


def _name(c: Comparison) -> str:
    return title(c.better[0])


def _row_name(row: Row) -> str:
    if row.control == "small_dense":
        return _CONTROL[row.control]
    return title(row.name) if row.is_plain else f"{title(row.name)}, {_CONTROL[row.control]},"


def _correction(table: Table) -> Iterable[str]:
    alone = [c for c in table.comparisons if c.difference.resolved]
    if len(table.comparisons) < 2 or not alone:
        return
    stay = [_pair(c) for c in alone if c.p_holm < 0.05]
    kept = f"these stay resolved: {'; '.join(stay)}" if stay else "none of them stays resolved"
    yield (
        f"These are {len(table.comparisons)} comparisons, and {0.05 * len(table.comparisons):.1f} would look resolved "
        f"if nothing differed. Corrected for that (Holm), {'all stay resolved' if len(stay) == len(alone) else kept}."
    )


def _images(table: Table) -> str:
    which = "test" if table.judge == "test" else "held-out"
    few = " One seed has no interval: give --seeds 5." if any(r.accuracy.half is None for r in table.rows) else ""
    return (
        f"Intervals are over seeds, on the same {grouped(table.judged)} {which} images, which other images would move; "
        f"those of differences reach at least one image ({100 / table.judged:.2g} points) to either side.{few}"
    )


def _footing(table: Table) -> Iterable[str]:
    budget = _budget(table)
    for row in table.rows:
        if budget is None or row.control == "small_dense" or row.name == "dense":
            continue
        if any(abs(n - budget.nonzeros[0]) > 0.01 * budget.nonzeros[0] for n in row.nonzeros):
            yield f"{_row_name(row)} keeps {_range(row.nonzeros)} weights: not the same budget."
    seeds = {seed for row in table.rows for seed in row.by_seed}
    for row in table.rows:
        if lacking := sorted(seeds - row.by_seed.keys()):
            yield f"{_row_name(row)} lacks seed {', '.join(map(str, lacking))}."


def _range(numbers: tuple[int, ...]) -> str:
    return grouped(numbers[0]) if len(numbers) == 1 else f"{grouped(numbers[0])}–{grouped(numbers[-1])}"


def _budget(table: Table) -> Row | None:
    """The row whose count the others are held against."""
    return table.row("random") or next((r for r in table.rows if r.name != "dense"), None)


def _seeds(table: Table) -> str:
    count = max((len(row.by_seed) for row in table.rows), default=0)
    return f"{count} seed{'s' * (count != 1)}"
