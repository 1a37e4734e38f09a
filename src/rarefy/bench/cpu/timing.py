"""Times of several candidates for one piece of work, interleaved, so that a machine that slows down slows all alike.

A round runs every candidate once, in an order that turns from round to round; a sample is the mean over enough calls
to last a few milliseconds. Two candidates are compared by the ratios of their samples of the same rounds. The interval
of the median ratio is of order statistics: it asks nothing of the distribution, and a few disturbed rounds of a busy
machine do not move it.

>>> paired_ratio(Samples((2.0, 4.0, 6.0), 1), Samples((1.0, 2.0, 2.0), 1)).median
2.0
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

__all__ = ["Candidate", "Local", "Plan", "Ratio", "Samples", "interval_ranks", "measure", "paired_ratio"]

Clock = Callable[[], float]


@runtime_checkable
class Candidate(Protocol):
    """Something to be timed: in this process (`Local`) or in another, which then takes the time itself."""

    def seconds(self, calls: int) -> float:
        """Do the work `calls` times, one after the other; the seconds that it took in all."""
        ...


@dataclass
class Local:
    """Calls of this process. With several, each works on its own copy of the weights, and they take turns.

    >>> Local((lambda: None,), clock=iter([1.0, 3.5]).__next__).seconds(2)
    2.5
    """

    calls: Sequence[Callable[[], object]]
    clock: Clock = time.perf_counter
    _next: int = field(default=0, repr=False)

    def seconds(self, calls: int) -> float:
        """Seconds of `calls` calls; the next time goes on with the copy after the last one used."""
        chosen = [self.calls[(self._next + i) % len(self.calls)] for i in range(calls)]
        self._next = (self._next + calls) % len(self.calls)
        begin = self.clock()
        for call in chosen:
            call()
        return self.clock() - begin


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    rounds: samples per candidate. sample: seconds that one sample lasts at least, unless a single call is longer.
    budget: seconds for all candidates together, after which no round begins, but never fewer than `least` rounds.
    slowest: a candidate whose single call takes longer than this many seconds is left out.
    settle: seconds of rest before each sample, so that another library's threads have stopped spinning.
    """

    rounds: int = 15
    sample: float = 0.004
    budget: float = 60.0
    least: int = 3
    slowest: float = 2.0
    settle: float = 0.002


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one value per round, each the mean over `calls` calls."""

    seconds: tuple[float, ...]
    calls: int

    @property
    def minimum(self) -> float:
        """The least disturbed round."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The usual round."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile over rounds; a single round is both."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios of `count` rounds, with the 95 % interval of that median (the whole range below 6)."""

    median: float
    low: float
    high: float
    count: int

    def loses(self, least: float = 0.97) -> bool:
        """Whether the interval lies wholly below `least`."""
        return self.high < least


def measure(
    candidates: Mapping[str, Candidate],
    plan: Plan,
    *,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Samples of every candidate that is fast enough, and why the others were left out, both by name."""
    counts, left_out = _counts(candidates, plan)
    times: dict[str, list[float]] = {name: [] for name in counts}
    names, begin = list(counts), clock()
    for index in range(plan.rounds):
        if index >= plan.least and clock() - begin > plan.budget:
            break
        turn = index % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            sleep(plan.settle)
            # What ran in between has taken the caches: the first calls bring weights (hot) and code (cold) back.
            candidates[name].seconds(1 + counts[name] // 8)
            times[name].append(candidates[name].seconds(counts[name]) / counts[name])
    return {name: Samples(tuple(taken), counts[name]) for name, taken in times.items() if taken}, left_out


def _counts(candidates: Mapping[str, Candidate], plan: Plan) -> tuple[dict[str, int], dict[str, str]]:
    """Calls per sample, and the candidates that are too slow to be measured."""
    counts: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name, candidate in candidates.items():
        first = candidate.seconds(1)
        once = min(first, candidate.seconds(1)) if first <= 4 * plan.slowest else first
        if once > plan.slowest:
            left_out[name] = f"a call takes {once:.1f} s, more than {plan.slowest:g} s"
        else:
            counts[name] = max(1, min(10_000, math.ceil(plan.sample / max(once, 1e-7))))
    return counts, left_out


def paired_ratio(a: Samples, b: Samples) -> Ratio:
    """a / b over rounds that both have. Raises ValueError where they share none."""
    ratios = sorted(x / y for x, y in zip(a.seconds, b.seconds, strict=False))
    if not ratios:
        raise ValueError("a ratio needs a round that both candidates have; at least one of them has none")
    low, high = interval_ranks(len(ratios))
    return Ratio(statistics.median(ratios), ratios[low], ratios[high], len(ratios))


def interval_ranks(count: int, level: float = 0.95) -> tuple[int, int]:
    """Ranks (from 0) of the sorted values that hold the median between them with probability `level` at least.

    >>> interval_ranks(15)
    (3, 11)
    """
    rank, below = 0, 0
    for r in range((count + 1) // 2):
        below += math.comb(count, r)
        if 2 * below > (1 - level) * 2**count:
            break
        rank = r
    return rank, count - 1 - rank
