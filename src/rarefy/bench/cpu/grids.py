"""Grids of text, on a terminal and as Markdown, and the numbers in them."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rarefy.bench.cpu.document import Comparison, Goal, Row, Timing

__all__ = ["Grid", "duration", "goal_grid", "markdown", "rich_grids", "times_faster"]


@dataclass(frozen=True)
class Grid:
    """A table: its heading, columns and cells. left: how many of the first columns are words, not numbers."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    note: str = ""


def duration(timing: Timing | None) -> str:
    """The median in microseconds, to three digits.

    >>> duration(Timing(minimum=1.0, median=1234.5, low=1.0, high=2.0, rounds=3, calls=1)), duration(None)
    ('1,230', '–')
    """
    return "–" if timing is None else digits(timing.median)


def digits(value: float) -> str:
    """Three digits that matter.

    >>> [digits(x) for x in (0.1234, 12.34, 1234.5)]
    ['0.123', '12.3', '1,230']
    """
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def times_faster(ratio: Comparison | None, interval: bool = False) -> str:
    """How many times faster rarefy is, with the 95 % interval where asked.

    >>> times_faster(Comparison(median=4.0, low=3.9, high=4.2), interval=True)
    '4.00 [3.90, 4.20]'
    """
    if ratio is None:
        return "–"
    return f"{ratio.median:.2f}" + (f" [{ratio.low:.2f}, {ratio.high:.2f}]" if interval else "")


def goal_grid(goals: Sequence[Goal]) -> Grid:
    """One row per goal that was measured: met, or not met with the reason. The note counts the others."""
    judged = [g for g in goals if g.met is not None]
    rows = tuple((g.point, g.goal, g.measured, "met" if g.met else "not met", g.reason) for g in judged)
    heading = f"Goals: {sum(g.met is True for g in judged)} of {len(judged)} measured are met"
    others = len(goals) - len(judged)
    note = f"{others} more goals need rows that this run has not measured." if others else ""
    return Grid(heading, ("goal", "asked", "measured", "", "reason"), rows, left=5, note=note)


def markdown(grids: Sequence[Grid]) -> str:
    """All grids as GitHub Markdown."""
    return "\n".join(_markdown(grid) for grid in grids if grid.rows)


def _markdown(grid: Grid) -> str:
    marks = ["---" if i < grid.left else "---:" for i in range(len(grid.columns))]
    lines = [f"### {grid.heading}", "", _bar(grid.columns), _bar(marks), *map(_bar, grid.rows), ""]
    return "\n".join([*lines, grid.note, ""] if grid.note else lines)


def _bar(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def rich_grids(grids: Sequence[Grid]) -> Group:
    """All grids for a terminal."""
    parts: list[Text | Table] = []
    for grid in grids:
        if not grid.rows:
            continue
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for i, column in enumerate(grid.columns):
            table.add_column(column, justify="left" if i < grid.left else "right", overflow="fold")
        for row in grid.rows:
            table.add_row(*map(Text, row))
        parts += [Text(grid.heading, style="bold"), table, Text(grid.note, style="dim") if grid.note else Text()]
    return Group(*parts)


def left_out(rows: Sequence[Row]) -> Grid:
    """Candidates that were not timed, and why, each reason once."""
    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, reason in row.left_out.items():
            reasons[name, reason] = reasons.get((name, reason), 0) + 1
    cells = tuple((name, reason, str(count)) for (name, reason), count in sorted(reasons.items()))
    return Grid("Left out", ("candidate", "why", "rows"), cells, left=2)
