"""The goals, one row each: what was asked, what was measured, met or not, and why not.

Goals were set for two threads of one processor (AMD Zen 4, AVX-512); elsewhere the rows say what that machine does.
Kernels are judged by their own calls, for single layers are bound by the way to a kernel: the layer's figure stands
beside it. Reasons are few and kept in `reasons.json`, by patterns of points.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from rarefy.bench.cpu.document import LAYER, Goal, Row
from rarefy.bench.cpu.own import AS_LAYER, CHOSEN, DENSE

__all__ = ["geometric_mean", "matrix_goals", "reason", "training_goals"]

_REASONS = Path(__file__).with_name("reasons.json")
_TORCH = {"fp32": "torch fp32", "bf16": "torch bf16", "int8": "torch int8"}
_NOT_MEASURED = "not measured"


@cache
def _reasons() -> dict[str, str]:
    return json.loads(_REASONS.read_text())


def reason(point: str) -> str:
    """Why a goal is not met, where that is known: of the first pattern (as of file names) that fits its point."""
    return next((text for pattern, text in _reasons().items() if fnmatchcase(point, pattern)), "")


def _goal(point: str, text: str, measured: str | None, met: bool | None) -> Goal:
    if measured is None:
        return Goal(point=point, goal=text, measured=_NOT_MEASURED, met=None)
    return Goal(point=point, goal=text, measured=measured, met=met, reason="" if met else reason(point))


def matrix_goals(rows: Sequence[Row]) -> list[Goal]:
    """Points 1 to 4, from the rows of a matrix benchmark."""
    return [*_batch_one(rows), *_floors(rows), *_many(rows), *_never_lose(rows), *_deepsparse(rows)]


# ------------------------------------------------------------------------------------------------ point 1: batch 1


def _batch_one(rows: Sequence[Row]) -> Iterator[Goal]:
    for name, least in (("1024x1024", (8, 14, 18)), ("4096x4096", (20, 45, 80))):
        for dtype, times in zip(_TORCH, least, strict=True):
            point = f"1 hot {name} 90 % {dtype}"
            row = _find(rows, name, 1, "hot", dtype, "unstructured", 0.9)
            yield _at_least(point, f"batch 1, hot: ≥ {times}× torch fp32", row, times, lambda r: ["torch fp32"])
    for sparsity, least in ((0.9, (5.5, 3.0, 2.3)), (0.5, (1.7, 1.5, 1.25))):
        for dtype, times in zip(_TORCH, least, strict=True):
            point = f"1 cold 4096x4096 {100 * sparsity:g} % {dtype}"
            row = _find(rows, "4096x4096", 1, "cold", dtype, "unstructured", sparsity)
            yield _at_least(point, f"batch 1, cold: ≥ {times}× the best dense {dtype}", row, times, _best_kernel)


def _floors(rows: Sequence[Row]) -> Iterator[Goal]:
    """Cold products over the time to read their bytes, the worst of each kind."""
    for sparsity, most in ((0.5, 1.5), (0.7, 1.8), (0.8, 1.8), (0.9, 1.8), (0.95, 1.8)):
        for dtype in _TORCH:
            point = f"1 floor 4096x4096 {100 * sparsity:g} % {dtype}"
            row = _find(rows, "4096x4096", 1, "cold", dtype, "unstructured", sparsity)
            name = None if row is None else _kernel(row)
            floor = None if row is None else row.facts.get("byte floor µs")
            text = f"batch 1, cold: ≤ {most}× the byte floor"
            if row is None or name is None or not isinstance(floor, float):
                yield _goal(point, text, None, None)
                continue
            over = row.times[name].minimum / floor
            yield _goal(point, text, f"{over:.2f}× of {floor:.0f} µs ({_short(name)})", over <= most)


# ------------------------------------------------------------------------------------------ point 2: batch >= 32


def _many(rows: Sequence[Row]) -> Iterator[Goal]:
    for batch in (32, 128, 512):
        for name in ("1024x1024", "4096x4096"):
            yield from _many_of(rows, name, batch)


def _many_of(rows: Sequence[Row], name: str, batch: int) -> Iterator[Goal]:
    where = f"2 {name} batch {batch}"
    for sparsity, times in ((0.8, 4), (0.9, 7)):
        row = _find(rows, name, batch, "hot", "fp32", "unstructured", sparsity)
        share = f"{where} {100 * sparsity:g} % fp32"
        yield _at_least(share, f"unstructured: ≥ {times}× torch fp32", row, times, lambda r: ["torch fp32"])
        yield _share(f"{share} share", "unstructured: ≥ 65 % of the peak", row, 0.65)
    for sparsity, times in ((0.8, 5.5), (0.9, 10)):
        row = _find(rows, name, batch, "hot", "fp32", "4x1", sparsity)
        share = f"{where} 4x1 {100 * sparsity:g} % fp32"
        yield _at_least(share, f"4×1: ≥ {times}× torch fp32", row, times, lambda r: ["torch fp32"])
        yield _share(f"{share} share", "4×1: ≥ 90 % of the peak", row, 0.9)
    for dtype in ("bf16", "int8"):
        row = _find(rows, name, batch, "hot", dtype, "4x1", 0.9)
        yield _at_least(f"{where} 4x1 90 % {dtype}", f"4×1: ≥ 8× dense {dtype}", row, 8, lambda r: [_TORCH[r.dtype]])


def _share(point: str, text: str, row: Row | None, least: float) -> Goal:
    name = None if row is None else _kernel(row)
    share = None if row is None else row.facts.get("share of peak")
    if row is None or name is None or not isinstance(share, float):
        return _goal(point, text, None, None)
    own = row.own() or name
    share *= row.times[own].minimum / row.times[name].minimum  # the fact is of what stands for rarefy
    return _goal(point, text, f"{100 * share:.0f} % ({_short(name)})", share >= least)


# --------------------------------------------------------------------------------------------- point 3: never lose


def _never_lose(rows: Sequence[Row]) -> Iterator[Goal]:
    judged = [row for row in rows if row.section == "matrix" and LAYER in row.times and best_dense(row)]
    text = "the automatic choice: ≥ 0.97× the best dense, in every case"
    if not judged:
        yield _goal("3 never lose", text, None, None)
        yield _goal("3 mean", "geometric mean over all cases ≥ 1", None, None)
    else:
        lost = [row for row in judged if row.ratios[best_dense(row)[0]].high < 0.97]
        worst = min(judged, key=lambda row: row.ratios[best_dense(row)[0]].median)
        ratio = worst.ratios[best_dense(worst)[0]].median
        words = f"{len(lost)} of {len(judged)} cases below 0.97×; the worst {ratio:.2f}× ({_where(worst)})"
        yield _goal("3 never lose", text, words, not lost)
        mean = geometric_mean([row.ratios[best_dense(row)[0]].median for row in judged])
        yield _goal("3 mean", "geometric mean over all cases ≥ 1", f"{mean:.2f}× over {len(judged)} cases", mean >= 1)
    yield _regret([row for row in judged if row.held_out and row.facts.get(CHOSEN) in row.times])


def _regret(held_out: Sequence[Row]) -> Goal:
    """Time of what was chosen over the fastest of all that were measured, dense included; kernels by themselves."""
    text = "held-out shapes: regret of the automatic choice ≤ 5 %"
    if not held_out:
        return _goal("3 regret", text, None, None)
    regrets = [row.times[str(row.facts[CHOSEN])].median / _best_own(row) - 1 for row in held_out]
    mean = geometric_mean([1 + regret for regret in regrets]) - 1
    worst = max(range(len(regrets)), key=regrets.__getitem__)
    words = (
        f"{100 * mean:.1f} % mean over {len(regrets)}, worst {100 * regrets[worst]:.0f} % ({_where(held_out[worst])})"
    )
    return _goal("3 regret", text, words, mean <= 0.05)


def _best_own(row: Row) -> float:
    """The fastest that pack could have chosen."""
    could = [*row.kernels(), *(n for n in (_TORCH[row.dtype], f"{DENSE}{row.dtype}") if n in row.times)]
    return min(row.times[name].median for name in could)


# ---------------------------------------------------------------------------------------------- point 4: DeepSparse


def _deepsparse(rows: Sequence[Row]) -> Iterator[Goal]:
    both = [row for row in rows if row.section == "chain" and "DeepSparse" in row.ratios and row.own() == LAYER]
    text = "≥ DeepSparse 1.8.0, bias and ReLU included, in every fp32 case"
    if not both:
        yield _goal("4 DeepSparse", text, None, None)
        return
    lost = [row for row in both if row.ratios["DeepSparse"].high < 1]
    worst = min(both, key=lambda row: row.ratios["DeepSparse"].median)
    words = (
        f"slower in {len(lost)} of {len(both)}; the least {worst.ratios['DeepSparse'].median:.2f}× ({_where(worst)})"
    )
    yield _goal("4 DeepSparse", text, words, not lost)


# ------------------------------------------------------------------------------------------------ point 5: training


def training_goals(rows: Sequence[Row]) -> list[Goal]:
    """Point 5, from the rows of a training benchmark."""
    goals = []
    for name, asked in (
        ("3072-4096-4096-10", ((0.9, 7), (0.95, 10), (0.99, 14), (0.99, 25))),
        ("784-1000-1000-10", ((0.9, 3.5), (0.95, 4.5), (0.99, 8))),
    ):
        for sparsity, times in asked:
            row = _find(rows, name, 128, "hot", "fp32", "unstructured", sparsity)
            stretch = " (stretch)" if times == 25 else ""
            point = f"5 {name} {100 * sparsity:g} %{stretch}"
            goals.append(
                _at_least(point, f"a step: ≥ {times}× torch fp32{stretch}", row, times, lambda r: ["torch fp32"])
            )
    both = [row for row in rows if row.section == "training" and "sparseprop" in row.ratios]
    goals.append(_worst("5 sparseprop", "a step: ≥ 2× sparseprop everywhere", both, 2))
    held = [(row, float(row.facts["bytes per non-zero"])) for row in rows if "bytes per non-zero" in row.facts]
    text = "memory of weights, gradients, momentum and indices: ≤ 24 bytes per non-zero, plus ≤ 1 of pointers"
    most = max(held, key=lambda pair: pair[1], default=None)
    goals.append(
        _goal("5 memory", text, None, None)
        if most is None
        else _goal("5 memory", text, f"{most[1]:.1f} at most ({_where(most[0])})", most[1] <= 25)
    )
    return goals


def _worst(point: str, text: str, rows: Sequence[Row], least: float) -> Goal:
    if not rows:
        return _goal(point, text, None, None)
    worst = min(rows, key=lambda row: row.ratios["sparseprop"].median)
    ratio = worst.ratios["sparseprop"].median
    return _goal(point, text, f"{ratio:.2f}× at least ({_where(worst)})", ratio >= least)


# ----------------------------------------------------------------------------------------------------- shared pieces


def best_dense(row: Row) -> list[str]:
    """The fastest dense of the row's dtype that this library can call, torch's or its own; empty for none.

    Its own as what stands for rarefy is called: as a layer where that is one.
    """
    layer = f"{DENSE}{row.dtype}{AS_LAYER}"
    return _faster_dense(row, layer) if row.own() == LAYER and layer in row.times else _best_kernel(row)


def _best_kernel(row: Row) -> list[str]:
    """The fastest dense, torch's or this library's kernel by itself."""
    return _faster_dense(row, f"{DENSE}{row.dtype}")


def _faster_dense(row: Row, own: str) -> list[str]:
    """The faster of torch's dense and this library's of that name, as far as they were measured."""
    found = [name for name in (_TORCH[row.dtype], own) if name in row.times]
    return sorted(found, key=lambda name: row.times[name].median)[:1]


def geometric_mean(values: Sequence[float]) -> float:
    """The mean for ratios.

    >>> geometric_mean([0.5, 2.0])
    1.0
    """
    return math.exp(sum(map(math.log, values)) / len(values))


def _at_least(point: str, text: str, row: Row | None, least: float, over: Callable[[Row], Sequence[str]]) -> Goal:
    """The kernel's ratio, judged, with the layer's beside it."""
    name = None if row is None else (_kernel(row) or row.own())
    others = [] if row is None else [other for other in over(row) if other in row.times]
    if row is None or name is None or not others:
        return _goal(point, text, None, None)
    other = row.times[others[0]].minimum
    ratio = other / row.times[name].minimum
    words = f"{ratio:.1f}× ({_short(name)}, {row.times[name].minimum:.3g} µs, over {others[0]})"
    if LAYER in row.times and name != LAYER:
        words += f"; as a layer {other / row.times[LAYER].minimum:.1f}×"
    return _goal(point, text, words, ratio >= least)


def _kernel(row: Row) -> str | None:
    return min(row.kernels(), key=lambda name: row.times[name].minimum, default=None)


def _short(name: str) -> str:
    return name.removeprefix("kernel ")


def _where(row: Row) -> str:
    pattern = "" if row.pattern == "unstructured" else f"{row.pattern} "
    return f"{row.name} batch {row.batch} {row.dtype} {pattern}{100 * row.sparsity:g} % {row.regime}"


def _find(
    rows: Sequence[Row], name: str, batch: int, regime: str, dtype: str, pattern: str, sparsity: float
) -> Row | None:
    key = (name, batch, regime, dtype, pattern, sparsity)
    return next(
        (
            r
            for r in rows
            if (r.name, r.batch, r.regime, r.dtype, r.pattern, r.sparsity) == key and r.section != "chain"
        ),
        None,
    )
