"""One HTML page that needs nothing beside itself: accuracy against density and training FLOPs, and the tables."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rarefy.bench.files import write_whole
from rarefy.bench.leaderboard import Row, Table
from rarefy.bench.tables import COLUMNS, cells, footer
from rarefy.bench.words import heading, row_title, sentences

__all__ = ["html_page", "write_report"]

_AXES = {
    "density": "share of weights kept (log scale)",
    "training": "training FLOPs, as a share of dense (log scale)",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .9rem .15rem 0; text-align: left; border-bottom: 1px solid #eee; }
td:nth-child(n+2):nth-child(-n+5), th:nth-child(n+2):nth-child(-n+5) { text-align: right; }
.control td { color: #777; }
.note { color: #666; font-size: .85rem; }
"""


def write_report(tables: Sequence[Table], path: Path) -> None:
    """Write the page. Raises ValueError where there is no table, ModuleNotFoundError without plotly."""
    write_whole(path, html_page(tables).encode())


def html_page(tables: Sequence[Table]) -> str:
    """The page, plotly's script included once."""
    if not any(table.rows for table in tables):
        raise ValueError("there is no result to report on: `rarefy bench digits --out DIR` makes some")
    settings: dict[str, list[Table]] = {}
    for table in tables:
        settings.setdefault(repr((table.task, table.environment)), []).append(table)
    parts = [_setting(found, first=i == 0) for i, found in enumerate(settings.values())]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Sparse networks, compared</title>'
        f"<style>{_STYLE}</style></head><body><h1>Sparse networks, compared</h1>{''.join(parts)}</body></html>\n"
    )


_COLOURS = 10  # of the template, before they come again
_SYMBOLS = ("circle", "diamond", "x", "square")  # one for each time they come


def _setting(tables: Sequence[Table], *, first: bool) -> str:
    task = tables[0].task
    title = escape(f"{task['name']} · {task['network']}")
    figures = "".join(_figure(tables, axis, script=first and axis == "density") for axis in _AXES)
    return f"<h2>{title}</h2>{figures}{''.join(map(_table, tables))}"


def _figure(tables: Sequence[Table], axis: str, *, script: bool) -> str:
    try:
        from plotly import graph_objects as go
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the report needs plotly: pip install 'rarefy[bench]'") from error
    figure = go.Figure()
    for number, (title, rows) in enumerate(_lines(tables).items()):
        rows = sorted(rows, key=lambda row: _place(row, axis))
        figure.add_trace(
            go.Scatter(
                x=[_place(row, axis) for row in rows],
                y=[row.accuracy.mean for row in rows],
                error_y={"array": [row.accuracy.half or 0 for row in rows], "width": 3},
                mode="lines+markers",
                marker={"symbol": _SYMBOLS[number // _COLOURS % len(_SYMBOLS)], "size": 8},
                name=title.strip(),
            )
        )
    figure.update_layout(
        xaxis={"title": _AXES[axis], "type": "log"},
        yaxis={"title": f"{tables[0].judge} accuracy %, 95 % interval over seeds"},
        template="plotly_white",
        height=460,
        margin={"t": 30},
    )
    return figure.to_html(full_html=False, include_plotlyjs="inline" if script else False)


def _lines(tables: Sequence[Table]) -> dict[str, list[Row]]:
    """Rows of one method or control, over all sparsities."""
    lines: dict[str, list[Row]] = {}
    for table in tables:
        for row in table.rows:
            parent = table.row(row.name)
            title = row_title(row) if row.is_plain or parent is None else f"{row_title(parent)},{row_title(row)[1:]}"
            found = lines.setdefault(title, [])
            if row not in found:  # dense stands in every table
                found.append(row)
    return lines


def _place(row: Row, axis: str) -> Any:
    return row.training if axis == "training" else row.nonzeros[-1] / row.prunable


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "".join(_line(row) for row in table.rows)
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(table))
    return (
        f"<h3>{escape(heading(table))}</h3><table><tr>{head}</tr>{body}</table>"
        f'<ul>{said}</ul><p class="note">{escape(footer(table))}</p>'
    )


def _line(row: Row) -> str:
    cls = "" if row.is_plain else ' class="control"'
    return f"<tr{cls}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row)) + "</tr>"
