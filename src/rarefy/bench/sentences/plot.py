"""A picture as SVG, written by hand: recall against latency, a panel for each shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from rarefy.bench.cpu.document import LAYER
from rarefy.bench.sentences.documents import Document, Engine
from rarefy.bench.sentences.engines import DENSE
from rarefy.bench.sentences.table import shapes_of

__all__ = ["svg"]

Place = Callable[[float, float], tuple[float, float]]

WIDE, HIGH, LEFT, TOP, GAP = 430, 300, 60, 40, 50
CEILING = 1.14  # of recall: the names of engines that lose nothing stand above 1
_STYLE = "text{font:11px system-ui,sans-serif;fill:#222}.t{font-weight:600;font-size:12px}.a{fill:#666}"
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def svg(document: Document) -> str:
    """The picture: milliseconds on a logarithmic axis, recall@10 upwards, the better the further up and left."""
    shown = [each for each in document.engines if each.quality is not None and each.times]
    shapes = [shape for shape in shapes_of(document) if any(shape in each.times for each in shown)]
    colours = {m: _COLOURS[i % len(_COLOURS)] for i, m in enumerate(dict.fromkeys(each.model for each in shown))}
    across = min(2, max(1, len(shapes)))
    rows = -(-len(shapes) // across)
    width, height = LEFT + across * (WIDE + GAP), TOP + rows * (HIGH + 2 * GAP) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f'<style>{_STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for index, shape in enumerate(shapes):
        x, y = LEFT + index % across * (WIDE + GAP), TOP + index // across * (HIGH + 2 * GAP)
        parts += [f'<g transform="translate({x},{y})">', *_panel(shape, shown, colours), "</g>"]
    for index, (model, colour) in enumerate(colours.items()):
        at = LEFT + index * 130
        parts.append(f'<circle cx="{at}" cy="{height - 12}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{at + 9}" y="{height - 8}">{escape(model)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(shape: str, shown: Sequence[Engine], colours: dict[str, str]) -> Iterator[str]:
    points = [
        (each, each.times[shape].median / 1000, each.quality.recall)
        for each in shown
        if shape in each.times and each.quality
    ]
    batch, tokens = shape.split("×")
    yield f'<text class="t" x="0" y="-14">batch {batch}, {tokens} tokens</text>'
    low, high = (math.log10(f(ms for _, ms, _ in points)) for f in (min, max))
    low, high = low - 0.05, high + 0.15
    floor = min(0.9, min(recall for *_, recall in points) - 0.05)

    def place(ms: float, recall: float) -> tuple[float, float]:
        return (math.log10(ms) - low) / (high - low) * WIDE, (CEILING - recall) / (CEILING - floor) * HIGH

    yield from _axes(place, low, high, floor)
    for each, ms, recall in sorted(points, key=lambda point: -point[2]):
        x, y = place(ms, recall)
        colour = colours[each.model]
        filled = colour if each.model != DENSE else "#fff"
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{filled}" stroke="{colour}" stroke-width="2"/>'
        turned = f"rotate(-35 {x:.1f} {y:.1f})"  # points of one model lie side by side: so do their names
        yield f'<text x="{x + 7:.1f}" y="{y + 3:.1f}" transform="{turned}">{escape(_named(each))}</text>'


def _named(each: Engine) -> str:
    """Sparse models run on packed layers alone, so that their values say enough."""
    return each.engine if each.model == DENSE else each.engine.removeprefix(f"{LAYER} ")


def _axes(place: Place, low: float, high: float, floor: float) -> Iterator[str]:
    yield f'<path d="M0 0V{HIGH}H{WIDE}" fill="none" stroke="#888"/>'
    for tenth in range(11):
        if tenth / 10 >= floor:
            _, y = place(10**low, tenth / 10)
            yield f'<path d="M0 {y:.1f}H{WIDE}" stroke="#e5e5e5"/>'
            yield f'<text class="a" x="-26" y="{y + 4:.1f}">{tenth / 10:.1f}</text>'
    for power in range(-3, 5):
        for digit in (1, 2, 5):
            ms = digit * 10.0**power
            if low <= math.log10(ms) <= high:
                x, _ = place(ms, floor)
                yield f'<path d="M{x:.1f} {HIGH}v4" stroke="#888"/>'
                yield f'<text class="a" x="{x - 8:.1f}" y="{HIGH + 16}">{ms:g}</text>'
    yield f'<text class="a" x="{WIDE / 2 - 60}" y="{HIGH + 32}">milliseconds a call (log scale)</text>'
    yield f'<text class="a" transform="translate(-40 {HIGH / 2 + 30}) rotate(-90)">recall@10</text>'
