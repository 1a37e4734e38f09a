"""The tables that people look at: on a terminal with rich, and as Markdown."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from rarefy.bench.leaderboard import Row, Table
from rarefy.bench.words import grouped, heading, row_title, sentences

__all__ = ["footer", "markdown", "rich_table"]

COLUMNS = ("method", "accuracy %", "non-zeros", "training FLOPs", "inference FLOPs", "kind")


def cells(row: Row) -> tuple[str, ...]:
    """The text of a row's columns."""
    nonzeros = "–".join(grouped(n) for n in dict.fromkeys((row.nonzeros[0], row.nonzeros[-1])))
    kind = "–" if row.name == "dense" else ", ".join(row.labels)
    base = "  ← neutral baseline" if row.name == "random" and row.is_plain else ""
    return row_title(row), str(row.accuracy), nonzeros, f"{row.training:.3f}×", f"{row.inference:.3f}×", kind + base


def footer(table: Table) -> str:
    """The conventions that the numbers follow, with what is needed to compare them with others."""
    sites = next((row.sites for row in table.rows if row.control != "small_dense"), "none")
    where = table.environment
    return (
        f"FLOPs: {table.rows[0].formula if table.rows else 'none'}: {table.formula_text} "
        f"Prunable tensors: {sites}. rarefy {where['rarefy']} (code {where['code']}), torch {where['torch']}, "
        f"{where['processor']}, {where['threads']} thread{'s' * (where['threads'] != 1)}."
    )


def rich_table(table: Table) -> Group:
    """The table with its heading above it, and below it what it shows in words."""
    grid = RichTable(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for name in COLUMNS:
        grid.add_column(name, justify="left" if name in ("method", "kind") else "right", overflow="fold")
    for row in table.rows:
        grid.add_row(*map(Text, cells(row)), style="" if row.is_plain else "dim")
    said = [Text(sentence) for sentence in sentences(table)]
    return Group(Text(heading(table), style="bold"), grid, Text(), *said, Text(footer(table), style="dim"))


def markdown(tables: Sequence[Table]) -> str:
    """All tables as GitHub Markdown, with the sentences as lists."""
    return "\n".join(_markdown(table) for table in tables)


def _markdown(table: Table) -> str:
    lines = [f"### {heading(table)}", "", _bar(COLUMNS), _bar(["---", "---:", "---:", "---:", "---:", "---"])]
    lines += [_bar(cells(row)) for row in table.rows]
    lines += ["", *(f"- {sentence}" for sentence in sentences(table)), "", footer(table), ""]
    return "\n".join(lines)


def _bar(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("  ", "&emsp;", 1) for text in texts) + " |"
