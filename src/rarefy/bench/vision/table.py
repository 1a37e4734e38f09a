"""The ResNet table: accuracy of every method at every sparsity, and which differences are resolved.

Two methods are compared image by image after the same calibration draws, batch norms re-estimated. A difference is
called resolved when it is so over test images, corrected for the number of comparisons, and over calibration draws,
each with test images of its own (would it hold with other images, in training and test?).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from rarefy.bench.cpu.grids import Grid, digits
from rarefy.bench.one_shot import Cells
from rarefy.bench.statistics import Difference, holm, interval, paired
from rarefy.bench.vision.cases import REFITTED
from rarefy.bench.vision.runs import Result, correct_of

__all__ = ["Compared", "Table", "compare", "grids", "sentences"]

LEVEL = 0.05


@dataclass(frozen=True)
class Table(Cells):
    """Results by row and pattern, in order of calibration draws. dense: of the network as it was."""

    dense: Sequence[Result]
    results: Mapping[tuple[str, str], Sequence[Result]]


def grids(table: Table) -> list[Grid]:
    """With re-estimated batch norms, and without."""
    draws, first = len(table.dense), table.dense[0].images
    notes = (
        f"Each calibration draw is judged on a share of its own of the {sum(run.images for run in table.dense):,} test "
        f"images. Mean ± 95 % interval of the {draws} draws: of calibration and test images together; the differences "
        "below are paired, and finer. s: seconds of pruning, the median of a row's runs, without the statistics.",
        f"The first calibration draw alone, on its {first:,} images. The means and variances are those of the dense "
        "network's activations, which the pruned network no longer has; weights are the same as above.",
    )
    return [
        _grid(table, "Accuracy %, batch-norm statistics re-estimated on the calibration images", notes[0], True),
        _grid(table, "Accuracy %, as pruned: batch-norm statistics of the dense network", notes[1], False),
    ]


def _grid(table: Table, heading: str, note: str, again: bool) -> Grid:
    rows = [("dense", *(_cell(table.dense, again) for _ in table.patterns), *(("–",) if again else ()))]
    for variant in table.variants:
        its = [table.results.get((variant, pattern), ()) for pattern in table.patterns]
        seconds = digits(median(run.seconds for runs in its for run in runs))
        rows.append((variant, *(_cell(runs, again) for runs in its), *((seconds,) if again else ())))
    return Grid(heading, ("method", *table.patterns, *(("s",) if again else ())), tuple(rows), note=note)


def _cell(runs: Sequence[Result], again: bool) -> str:
    found = [run.reestimated for run in runs] if again else [run.as_pruned or 0.0 for run in runs[:1]]
    if not found:
        return "–"
    told = interval([100 * x for x in found])
    return f"{told.mean:.2f}" + ("" if told.half is None else f" ± {told.half:.2f}")


# -------------------------------------------------------------------------------------------------------- differences


@dataclass(frozen=True)
class Compared:
    """One cell against another. images: the difference in points over test images, p corrected; draws: over draws."""

    title: str
    where: str
    images: Difference
    draws: Difference | None

    @property
    def resolved(self) -> bool:
        """Over images and over calibration draws."""
        return self.images.p < LEVEL and (self.draws is None or self.draws.resolved)


_Cell = tuple[str, str]


def compare(table: Table) -> list[Compared]:
    """All comparisons that the table can make, with p values corrected for their number."""
    found = [_compared(table, *each) for each in _pairs(table)]
    adjusted = holm([each.images.p for each in found])
    return [replace(each, images=replace(each.images, p=p)) for each, p in zip(found, adjusted, strict=True)]


def _pairs(table: Table) -> Iterator[tuple[str, str, _Cell, _Cell]]:
    """(title, where, one cell, the other)."""
    for one, other in _variants():
        for pattern in table.patterns:
            cells = (one, pattern), (other, pattern)
            if all(cell in table.results for cell in cells):
                yield f"{one} over {other}", f"at {pattern}", *cells


def _variants() -> Iterator[tuple[str, str]]:
    yield from (("Magnitude, global", "Magnitude"), ("Magnitude, ERK", "Magnitude"))
    yield from (("Wanda", "Magnitude"), ("SparseGPT", "Magnitude"), ("SparseGPT", "Wanda"))
    yield from (("DSnoT(Wanda)", "Wanda"), ("ALPS", "SparseGPT"))
    yield from ((f"{method} + refit", method) for method in REFITTED)


def _compared(table: Table, title: str, where: str, one: _Cell, other: _Cell) -> Compared:
    a, b = table.results[one], table.results[other]
    images = paired(_by_image(a), _by_image(b))
    draws = paired(_by_draw(a), _by_draw(b), resolution=100 / a[0].images) if len(a) > 1 else None
    return Compared(title, where, images, draws)


def _by_image(runs: Sequence[Result]) -> dict[int, float]:
    """100 for each image that is told, 0 for the others."""
    return dict(enumerate((100.0 * np.concatenate([correct_of(run) for run in runs])).tolist()))


def _by_draw(runs: Sequence[Result]) -> dict[int, float]:
    return {run.draw: 100 * run.reestimated for run in runs}


def sentences(compared: Sequence[Compared]) -> list[str]:
    """One for each pair of rows, in points of accuracy: what is resolved and what is not."""
    titles = dict.fromkeys(each.title for each in compared)
    return [_sentence(title, [each for each in compared if each.title == title]) for title in titles]


def _sentence(title: str, its: Sequence[Compared]) -> str:
    kinds = {"resolved": [x for x in its if x.resolved], "not resolved": [x for x in its if not x.resolved]}
    parts = [
        f"{name}: {', '.join(f'{x.images.mean:+.2f} {x.where}' for x in kind)}" for name, kind in kinds.items() if kind
    ]
    return f"{title}: {'; '.join(parts)}."
