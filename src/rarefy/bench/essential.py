"""The plot of essential sparsity: quality against the share of zeros, and where it turns down, one HTML page."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rarefy.bench.files import write_whole
from rarefy.methods.iterative.essential_sparsity import Essential

__all__ = ["essential_figure", "write_essential"]

_COLOURS = ("#636efa", "#ef553b", "#00a97a", "#ab63fa", "#ffa15a", "#19a7c4", "#c83e74", "#6f8f1f")


def essential_figure(found: Mapping[str, Essential], metric: str = "metric", *, log: bool = False) -> Any:
    """A plotly figure: a curve for each name, over the zeros that were achieved; a diamond marks the knee, a dotted
    line what the tolerance allows, and a dotted upright the most zeros within it.

    metric: what the y axis says. log: its scale, for perplexities. Raises ValueError for no sweep,
    ModuleNotFoundError without plotly.
    """
    if not found:
        raise ValueError("there is no sweep to plot: EssentialSparsity(...).run(model, evaluate) makes one")
    try:
        from plotly import graph_objects as go
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the plot needs plotly: pip install 'rarefy[bench]'") from error
    figure = go.Figure()
    for number, (name, each) in enumerate(found.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        x, y = [100 * point.achieved for point in each.points], [point.metric for point in each.points]
        at = {point.sparsity: place for place, point in enumerate(each.points)}
        figure.add_scatter(
            x=x, y=y, mode="lines+markers", name=name, line={"color": colour},
            customdata=[[100 * point.sparsity, 100 * point.least_density] for point in each.points],
            hovertemplate="%{x:.1f} % zeros (%{customdata[0]:.0f} % asked)<br>%{y:.4g}<br>emptiest layer keeps "
            "%{customdata[1]:.1f} %",
        )  # fmt: skip
        figure.add_scatter(
            x=[x[at[each.knee]]], y=[y[at[each.knee]]], mode="markers", name=f"{name}: knee, {100 * each.knee:g} %",
            marker={"symbol": "diamond", "size": 13, "color": colour},
        )  # fmt: skip
        sign = -1 if each.by.better == "higher" else 1
        allowed = y[0] + sign * each.by.tolerance * abs(y[0])
        figure.add_scatter(
            x=[x[0], x[at[each.tolerated]], x[at[each.tolerated]]], y=[allowed, allowed, y[at[each.tolerated]]],
            mode="lines", line={"color": colour, "dash": "dot", "width": 1.5},
            name=f"{name}: {100 * each.by.tolerance:g} % worse, {100 * each.tolerated:g} %",
        )  # fmt: skip
    figure.update_layout(
        xaxis={"title": "zeros in the pruned layers, %", "range": [0, 100]},
        yaxis={"title": metric, "type": "log" if log else "linear"},
        template="plotly_white", height=520, margin={"t": 30},
    )  # fmt: skip
    return figure


def write_essential(
    found: Mapping[str, Essential], path: Path, metric: str = "metric", title: str = "", *, log: bool = False
) -> None:
    """Write the figure as one page that needs nothing beside itself, with a table of its points."""
    plot = essential_figure(found, metric, log=log).to_html(full_html=False, include_plotlyjs="inline")
    heading = escape(title or "Essential sparsity")
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{heading}</title></head>'
        '<body style="font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto">'
        f"<h1>{heading}</h1>{plot}{''.join(_table(name, each, metric) for name, each in found.items())}</body></html>\n"
    )
    write_whole(path, page.encode())


def _table(name: str, found: Essential, metric: str) -> str:
    rows = "".join(
        f"<tr><td>{100 * p.sparsity:g} %</td><td>{100 * p.achieved:.2f} %</td><td>{100 * p.least_density:.2f} %</td>"
        f"<td>{p.metric:.4g}</td></tr>"
        for p in found.points
    )
    head = "".join(f"<th>{text}</th>" for text in ("asked", "zeros", "emptiest layer keeps", escape(metric)))
    said = (
        f"At most {100 * found.by.tolerance:g} % worse than dense: up to {100 * found.tolerated:g} %. Knee (farthest "
        f"from the chord): {100 * found.knee:g} %."
    )
    return f"<h2>{escape(name)}</h2><p>{said}</p><table cellpadding=6><tr align=left>{head}</tr>{rows}</table>"
