"""Times of several ways to do one piece of work, interleaved, so that a machine that slows down slows all alike.

`times` compares candidates for a layer by their least disturbed round; `ratios` compares whole models, pair by pair.
Cold means that weights come from memory, as in a model that does not fit the caches: so many copies of each are read in
turn that none of them is still there when it comes again. A single call after the caches were emptied says less: it
finds memory idle, and pays for its start.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Call = Callable[[], object]
Side = tuple[Call, Call]

_ROUNDS = 9
_SAMPLE = 2e-4  # seconds that a sample lasts at least
_BUDGET = 1.0  # seconds for all candidates of one problem, once each has _LEAST samples
_LEAST = 3
_MOST = 100


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios, the 95 % interval of that median, and the median times of both sides in seconds."""

    median: float
    low: float
    high: float
    pairs: int
    first: float
    second: float

    @property
    def loses(self) -> bool:
        """Whether the first is not even 0.97 times the second, beyond doubt."""
        return self.high < 0.97


def times(calls: Mapping[str, Sequence[Call]], *, cold: bool = False) -> dict[str, float]:
    """Seconds of a call, by name of the candidate. cold: each is called on all of its `copies`, one after the other."""
    counts = {name: 1 if cold else _count(each[0]) for name, each in calls.items()}
    best = dict.fromkeys(calls, math.inf)
    begin, names = time.perf_counter(), list(calls)
    for index in range(_ROUNDS):
        if index >= _LEAST and time.perf_counter() - begin > _BUDGET:
            break
        turn = index % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            best[name] = min(best[name], _sample(calls[name], counts[name]))
    return best


def copies(nbytes: int, cold: bool) -> int:
    """Of a weight, to be called in turn: cold as many as take twice what the caches hold, or `_MOST`."""
    return min(_MOST, -(-2 * last_level() // max(1, nbytes))) if cold else 1


def ratios(first: Side, second: Side, *, pairs: int = 15, patience: float = 10.0) -> Ratio:
    """Times of first / second over interleaved pairs, which one begins alternating. A side is (prepare, call): only
    calls are timed.

    Above 1 means that the second is faster. After `patience` seconds a result that every pair so far agrees on, by
    5 % and more, is taken.
    """
    once = [_timed(side, 1) for side in (first, second, first, second)]
    count = max(1, round(1e-3 / max(1e-7, min(once))))
    taken: list[tuple[float, float]] = []
    begin = time.perf_counter()
    for index in range(pairs):
        if index % 2:
            b, a = _timed(second, count), _timed(first, count)
        else:
            a, b = _timed(first, count), _timed(second, count)
        taken.append((a, b))
        if index >= 5 and time.perf_counter() - begin > patience and all(x > 1.05 * y for x, y in taken):
            break
    found = sorted(a / b for a, b in taken)
    low, high = _ranks(len(found))
    return Ratio(
        statistics.median(found), found[low], found[high], len(found),
        statistics.median(a for a, _ in taken), statistics.median(b for _, b in taken),
    )  # fmt: skip


def _timed(side: Side, count: int) -> float:
    prepare, call = side
    prepare()
    return _sample([call], count)


def _sample(calls: Sequence[Call], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        for call in calls:
            call()
    return (time.perf_counter() - begin) / (count * len(calls))


def _count(call: Call) -> int:
    call()
    return max(1, min(1000, math.ceil(_SAMPLE / max(1e-7, _sample([call], 1)))))


def _ranks(count: int) -> tuple[int, int]:
    """Ranks of the sorted ratios that hold their median between them with probability 0.95 at least."""
    rank, below = 0, 0
    for r in range((count + 1) // 2):
        below += math.comb(count, r)
        if 2 * below > 0.05 * 2**count:
            break
        rank = r
    return rank, count - 1 - rank


# --- caches ----------------------------------------------------------------------------------------------------------


@cache
def last_level() -> int:
    """Bytes of the last level of cache."""
    try:
        sizes = [_bytes(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    except (OSError, ValueError):
        sizes = []
    known = os.sysconf_names.get("SC_LEVEL3_CACHE_SIZE") if hasattr(os, "sysconf_names") else None
    if not sizes and known is not None:
        sizes = [os.sysconf(known)]
    return max([*sizes, 0]) or 32 << 20


def _bytes(text: str) -> int:
    number, unit = text.strip()[:-1], text.strip()[-1]
    return int(number) << {"K": 10, "M": 20, "G": 30}[unit]
