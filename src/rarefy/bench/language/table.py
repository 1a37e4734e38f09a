"""The language table: perplexity of every method at every sparsity, and which differences are resolved.

Two methods are compared on the same held-out windows after the same calibration draws. A difference is called resolved
when it is so over windows (would it hold on other text?), corrected for the number of comparisons, and over calibration
draws (would it hold with other calibration text?), where there is more than one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rarefy.bench.cpu.grids import Grid, digits
from rarefy.bench.language.runs import Result
from rarefy.bench.one_shot import METHODS, Cells
from rarefy.bench.statistics import Difference, holm, interval, paired

__all__ = ["Compared", "Table", "compare", "grid", "sentences"]

LEVEL = 0.05
WANTED = ("lower", "higher")


@dataclass(frozen=True)
class Table(Cells):
    """Results by row and pattern, in order of calibration draws. dense: of the model as it was."""

    dense: Result
    results: Mapping[tuple[str, str], Sequence[Result]]


def grid(table: Table) -> Grid:
    """Perplexities, mean ± 95 % interval over calibration draws; seconds and memory are medians of a row's runs."""
    dense = table.dense
    rows = [("dense", *("" for _ in table.patterns), "", "")]
    rows[0] = ("dense", _value(dense.perplexity), *("" for _ in table.patterns[1:]), "–", "–")
    for variant in table.variants:
        its = [table.results.get((variant, pattern), ()) for pattern in table.patterns]
        runs = [run for each in its for run in each]
        cost = (digits(median(r.seconds for r in runs)), digits(max(r.peak for r in runs) / 1e6))
        rows.append((variant, *map(_cell, its), *cost))
    bounds = "" if dense.low is None or dense.high is None else f" [{_value(dense.low)}, {_value(dense.high)}]"
    note = (
        f"Dense: {_value(dense.perplexity)}{bounds} over {len(dense.nll)} held-out windows (95 % interval), top-1 "
        f"{100 * dense.top1:.1f} %. ±: 95 % interval over calibration draws; none for one draw, or for a method that "
        "reads no data. Seconds: of pruning, the median of a row's runs. MB: what pruning added to the resident set at "
        "most, over a row's runs. OWL with n:m: n varies from block to block, and is as asked on average."
    )
    return Grid("Perplexity on held-out source code", ("method", *table.patterns, "s", "MB"), tuple(rows), note=note)


def _cell(runs: Sequence[Result]) -> str:
    if not runs:
        return "–"
    found = interval([run.perplexity for run in runs])
    return _value(found.mean) + ("" if found.half is None else f" ± {_value(found.half)}")


def _value(x: float) -> str:
    return digits(x) if x >= 100 else f"{x:.2f}"


# -------------------------------------------------------------------------------------------------------- differences


@dataclass(frozen=True)
class Compared:
    """One cell against another. change: of the perplexity, in %. p: over windows, corrected. draws: the difference over
    calibration draws, None for a single one."""

    title: str
    expected: str
    where: str
    change: float
    windows: Difference
    draws: Difference | None
    p: float = 1.0

    @property
    def resolved(self) -> bool:
        """Over windows and over calibration draws."""
        return self.p < LEVEL and (self.draws is None or self.draws.resolved)


def compare(table: Table) -> list[Compared]:
    """All comparisons that the table can make, with p values corrected for their number."""
    found = [_compared(table, *each) for each in _pairs(table)]
    adjusted = holm([each.windows.p for each in found])
    return [Compared(**{**each.__dict__, "p": p}) for each, p in zip(found, adjusted, strict=True)]


_Cell = tuple[str, str]


def _pairs(table: Table) -> Iterator[tuple[str, str, str, _Cell, _Cell]]:
    """(title, what is expected, where, one cell, the other)."""
    for one, other, expected in _variants():
        for pattern in table.patterns:
            cells = (one, pattern), (other, pattern)
            if all(cell in table.results for cell in cells):
                yield f"{one} against {other}", expected, f"at {pattern}", *cells
    for first, second in (("4:8", "50 %"), ("2:4", "4:8"), ("2:4", "50 %")):
        for method in METHODS:
            cells = (method, first), (method, second)
            if all(cell in table.results for cell in cells):
                yield f"{first} against {second}", "higher", f"with {method}", *cells


def _variants() -> Iterator[tuple[str, str, str]]:
    """What the literature and small models of this kind say: "lower", "higher", or "" where they do not agree."""
    yield "Wanda", "Magnitude", ""
    yield "SparseGPT", "Magnitude", "lower"
    yield "SparseGPT", "Wanda", "lower"
    yield "DSnoT(Wanda)", "Wanda", ""
    yield "ALPS", "SparseGPT", "lower"
    yield "Wanda + refit", "SparseGPT", "lower"
    yield "Magnitude + refit", "SparseGPT", "lower"
    for method in METHODS:
        yield f"{method} + refit", method, "" if method == "ALPS" else "lower"
    for method in METHODS:
        yield f"{method} + OWL", method, ""


def _compared(table: Table, title: str, expected: str, where: str, one: _Cell, other: _Cell) -> Compared:
    a, b = table.results[one], table.results[other]
    windows = paired(_by_window(a), _by_window(b))
    count = max(len(a), len(b))
    draws = paired(_by_draw(a, count), _by_draw(b, count)) if count > 1 else None
    return Compared(title, expected, where, 100 * (math.exp(windows.mean) - 1), windows, draws)


def _by_window(runs: Sequence[Result]) -> dict[int, float]:
    """Mean over draws, window by window."""
    return {i: sum(each) / len(each) for i, each in enumerate(zip(*(run.nll for run in runs), strict=True))}


def _by_draw(runs: Sequence[Result], count: int) -> dict[int, float]:
    """Mean over windows, draw by draw; what reads no data is the same for all."""
    means = [sum(run.nll) / len(run.nll) for run in runs]
    return dict(enumerate(means * count if len(means) == 1 else means))


def sentences(compared: Sequence[Compared]) -> list[str]:
    """One for each pair of methods: what is resolved and what is not, and whether it is what was expected."""
    titles = dict.fromkeys(each.title for each in compared)
    return [_sentence(title, [each for each in compared if each.title == title]) for title in titles]


def _sentence(title: str, its: Sequence[Compared]) -> str:
    resolved = [each for each in its if each.resolved]
    others = [each for each in its if not each.resolved]
    parts = [f"resolved: {_listed(resolved)}"] if resolved else []
    parts += [f"not resolved: {_listed(others)}"] if others else []
    return f"{title}: {'; '.join(parts)}.{_verdict(its[0].expected, resolved)}"


def _listed(its: Sequence[Compared]) -> str:
    return ", ".join(f"{each.change:+.1f} % {each.where}" for each in its)


def _verdict(expected: str, resolved: Sequence[Compared]) -> str:
    if not expected:
        return " Nothing was expected: small models and large ones differ here."
    against = [each.where for each in resolved if (each.change < 0) != (expected == "lower")]
    if against:
        return f" Expected {expected}, and it is not {', '.join(against)}."
    return f" Expected {expected}: {'as found' if resolved else 'not shown here'}."
