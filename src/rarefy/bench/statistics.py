"""Means with 95 % intervals over seeds, paired differences, and a correction for many comparisons.

Seeds are shared by all methods (same first weights, same order of images), so two methods are compared seed by seed.
The intervals tell how much the accuracy moves from seed to seed; they do not tell how much it would move with other
test images.

>>> str(interval([97.5, 98.1, 97.8]))
'97.8 ± 0.7'
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Difference", "Interval", "holm", "interval", "paired"]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """mean ± half, the 95 % interval of Student's t; half is None for a single value."""

    mean: float
    half: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.half is None else f" ± {self.half:.1f}")


@dataclass(frozen=True)
class Difference:
    """Mean difference over `count` shared seeds, its 95 % interval (NaN for one seed), and p of the paired t test."""

    mean: float
    low: float
    high: float
    p: float
    count: int

    @property
    def resolved(self) -> bool:
        """Whether the 95 % interval leaves out 0. False for a single seed."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        bounds = "" if math.isnan(self.low) else f" [{self.low:.1f}, {self.high:.1f}]"
        return f"{self.mean:+.1f}{bounds}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of independent values. Raises ValueError for no values and for NaN or infinity."""
    x = np.asarray(values, dtype=np.float64)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"an interval needs finite values, got {list(values)}")
    if len(x) == 1:
        return Interval(float(x[0]), None, 1)
    return Interval(float(x.mean()), float(_quantile(len(x)) * x.std(ddof=1) / math.sqrt(len(x))), len(x))


def paired(a: Mapping[int, float], b: Mapping[int, float], resolution: float = 0.0) -> Difference:
    """a − b over the seeds that both have. Raises ValueError where they share none.

    resolution: the smallest step that a value can make. The interval reaches at least as far to either side: three
    seeds that happen to differ by one image each must not pass for certainty.

    >>> paired({0: 3.0, 1: 4.0, 2: 5.0}, {0: 2.0, 1: 2.5, 2: 4.0}).resolved
    True
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError(f"a paired difference needs a shared seed; the seeds are {sorted(a)} and {sorted(b)}")
    x = np.array([a[seed] - b[seed] for seed in seeds], dtype=np.float64)
    mean, count = float(x.mean()), len(x)
    if count == 1:
        return Difference(mean, math.nan, math.nan, 1.0, 1)
    quantile = _quantile(count)
    error = max(float(x.std(ddof=1)) / math.sqrt(count), resolution * (1 + 1e-9) / quantile)
    half = quantile * error
    return Difference(mean, mean - half, mean + half, _p_value(mean, error, count), count)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for being `len(p_values)` comparisons (Holm, 1979): below .05 is resolved all together.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _p_value(mean: float, error: float, count: int) -> float:
    from scipy import stats

    if error == 0:  # the same difference at every seed
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, count - 1))


def _quantile(count: int) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
