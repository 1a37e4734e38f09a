"""Schedules: when do masks change, how sparse are they by then, and what share of weights moves?

Three kinds of values. A *sparsity schedule* (`AtInit`, `OneShot`, `Cubic`) says when the masks are made sparser and how
sparse. `Every` says when weights are dropped and grown at equal sparsity. A *drop fraction* (`Constant`, `Cosine`,
`InversePower`) says what share of the kept weights is exchanged then.

A point in time is an `Interval`: an int is a step, a float a fraction of `steps`, the optimizer steps of the run.
"""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from rarefy.axes.shorthand import parse_named
from rarefy.axes.value import Share, Value, value


def _interval(x: int | float) -> int | float:
    if isinstance(x, float) and not 0 <= x <= 1:
        raise ValueError("must be a fraction in [0, 1]")
    if x < 0:
        raise ValueError("must be a step ≥ 0")
    return x


Interval = Annotated[int | float, AfterValidator(_interval)]
"""A point in time: an int ≥ 0 is a step, a float in [0, 1] a fraction of the run's steps."""

Period = Annotated[int, Field(ge=1)]
Part = Annotated[float, Field(ge=0, le=1)]


def resolve(x: int | float, steps: int | None, what: str) -> int:
    """The step that `x` means: itself if an int, round(x·steps) if a float.

    what: the name of x in an error. Raises ValueError for a float without `steps`, or out of range.

    >>> resolve(0.75, 1000, "end"), resolve(300, None, "end")
    (750, 300)
    """
    try:
        _interval(x)
    except ValueError as error:
        raise ValueError(f"{what} {error}, got {x!r}") from None
    if not isinstance(x, float):
        return x
    if steps is None:
        raise ValueError(
            f"{what}={x} is a fraction of the run's steps, which are not known; pass steps= or give a step"
        )
    return round(x * steps)


# --- sparsity over time ----------------------------------------------------------------------------------------------


class SparsitySchedule(Value):
    """How sparse the masks are at each step."""

    def due(self, step: int, steps: int | None) -> bool:
        """Whether the masks change at `step`."""
        raise NotImplementedError

    def sparsity(self, step: int, final: float, steps: int | None) -> float:
        """The sparsity asked for at `step`, on the way to `final`."""
        raise NotImplementedError


@value
class OneShot(SparsitySchedule):
    """Dense before the step `at`, the final sparsity from then on.

    >>> OneShot(at=0.5).sparsity(499, 0.9, 1000), OneShot(at=0.5).sparsity(500, 0.9, 1000)
    (0.0, 0.9)
    """

    at: Interval = 0

    def due(self, step: int, steps: int | None) -> bool:
        """Whether the masks change at `step`."""
        return step == resolve(self.at, steps, "at")

    def sparsity(self, step: int, final: float, steps: int | None) -> float:
        """0 before `at`, then `final`."""
        return final if step >= resolve(self.at, steps, "at") else 0.0


@value
class AtInit(SparsitySchedule):
    """The final sparsity from the start.

    >>> AtInit().due(0, None), AtInit().due(1, None)
    (True, False)
    """

    def due(self, step: int, steps: int | None) -> bool:
        """Whether the masks change at `step`."""
        return step == 0

    def sparsity(self, step: int, final: float, steps: int | None) -> float:
        """Always `final`."""
        return final


@value
class Cubic(SparsitySchedule):
    """Fast at first, slowly at last: s(t) = s_f + (s_i − s_f)·(1 − (t − t₀)/(t₁ − t₀))³ from t₀ to t₁.

    Zhu & Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878.

    initial: s_i, the sparsity before and at the start. start, end: t₀ and t₁, end ≥ start. every: steps between two
    updates, counted from the start; the last falls on the end, whatever `every` is, so that s_f is reached.
    At t₀ itself s = s_i (in jaxpruner the first update already prunes).
    Raises ValueError if the end lies before the start or after the run, or if the final sparsity is below `initial`.

    >>> [round(Cubic(start=0, end=100).sparsity(t, 0.9, None), 4) for t in (0, 10, 25, 50, 75, 100)]
    [0.0, 0.2439, 0.5203, 0.7875, 0.8859, 0.9]
    >>> [t for t in range(100) if Cubic(start=10, end=35, every=10).due(t, None)]
    [10, 20, 30, 35]
    """

    initial: Share = 0.0
    start: Interval = 0.0
    end: Interval = 0.75
    every: Period = 100

    def __post_init__(self) -> None:
        if isinstance(self.start, float) == isinstance(self.end, float) and self.end < self.start:
            raise ValueError(f"ends before it starts; choose an end of at least {self.start}")

    def window(self, steps: int | None) -> tuple[int, int]:
        """(start, end) in steps."""
        start, end = resolve(self.start, steps, "start"), resolve(self.end, steps, "end")
        if end < start:
            raise ValueError(f"{self} ends at step {end}, before its start at {start}; choose end ≥ start")
        if steps is not None and end > steps:
            raise ValueError(
                f"{self} ends at step {end}, after the run of {steps} steps, and would not reach its sparsity; "
                f"choose an end of at most {steps}, or a fraction"
            )
        return start, end

    def due(self, step: int, steps: int | None) -> bool:
        """Whether the masks change at `step`."""
        start, end = self.window(steps)
        return step == end or (start <= step < end and (step - start) % self.every == 0)

    def sparsity(self, step: int, final: float, steps: int | None) -> float:
        """The sparsity asked for at `step`: `initial` up to the start, `final` from the end on."""
        self._check_final(final)
        start, end = self.window(steps)
        if step >= end:
            return final
        if step <= start:
            return self.initial
        left = 1 - (step - start) / (end - start)
        return final + (self.initial - final) * left**3

    def _check_final(self, final: float) -> None:
        if final < self.initial:
            raise ValueError(
                f"{self} cannot end at sparsity {final}: it starts at {self.initial}, and masks only get sparser; "
                f"choose initial ≤ {final}"
            )


def average_sparsity(cubic: Cubic, final: float, steps: int) -> float:
    """The mean over the run of a cubic schedule's s(t), in closed form: inside the window it is s_f·¾ + s_i·¼.

    The average parameter count of Jin et al., "The Journey Matters", 2025, arXiv:2501.12486, is N·(1 − this).
    It is the integral of the formula, not of the staircase that updates every so many steps make of it; the ledger
    counts that one.

    >>> average_sparsity(Cubic(start=0.25, end=0.75), final=0.5, steps=1000)
    0.3125
    """
    if steps < 1:
        raise ValueError(f"average_sparsity: steps={steps}; a run has at least one step")
    cubic.sparsity(0, final, steps)  # raises unless the schedule can end there
    start, end = cubic.window(steps)
    inside = cubic.initial / 4 + final * 3 / 4
    return (start * cubic.initial + (end - start) * inside + (steps - end) * final) / steps


# --- drop and grow ---------------------------------------------------------------------------------------------------


@value
class Every(Value):
    """Every `interval` steps, after step 0 and before `until`.

    RigL (Evci et al. 2020, arXiv:1911.11134): every 100 steps up to three quarters of the run. `until=1.0` never stops.

    >>> [t for t in range(1000) if Every(interval=250).due(t, 1000)]
    [250, 500]
    """

    interval: Period = 100
    until: Interval = 0.75

    def due(self, step: int, steps: int | None) -> bool:
        """Whether weights are dropped and grown at `step`."""
        return step > 0 and step % self.interval == 0 and step < resolve(self.until, steps, "until")


class DropFraction(Value):
    """What share of a layer's kept weights is dropped, and as many grown, at an update."""

    def at(self, step: int, until: int) -> float:
        """The share at `step`, where updates stop at the step `until`."""
        raise NotImplementedError


@value
class Constant(DropFraction):
    """The same share at every update."""

    fraction: Part

    def at(self, step: int, until: int) -> float:
        """The share at `step`."""
        return self.fraction


@value
class Cosine(DropFraction):
    """α(t) = floor + (α − floor)/2·(1 + cos(πt/T)), T = `until`: from α to the floor, and the floor from T on.

    With floor=0 RigL's (Evci et al. 2020, arXiv:1911.11134). The ITOP and GraNet code anneals to a floor of 0.005.

    >>> [round(Cosine(0.3).at(t, 60), 3) for t in (0, 20, 30, 40, 60)]
    [0.3, 0.225, 0.15, 0.075, 0.0]
    """

    fraction: Part
    floor: Part = 0.0

    def __post_init__(self) -> None:
        if self.floor > self.fraction:
            raise ValueError(f"floor must be at most fraction={self.fraction}, got {self.floor}")

    def at(self, step: int, until: int) -> float:
        """The share at `step`."""
        if step >= until:
            return self.floor
        return self.floor + (self.fraction - self.floor) / 2 * (1 + math.cos(math.pi * _done(step, until)))


@value
class InversePower(DropFraction):
    """α(t) = α·(1 − t/T)ᵏ, T = `until`, k = `power`; 0 from T on.

    >>> InversePower(0.5, power=2).at(50, 100)
    0.125
    """

    fraction: Part
    power: Annotated[float, Field(ge=0)] = 3

    def at(self, step: int, until: int) -> float:
        """The share at `step`."""
        return 0.0 if step >= until else self.fraction * (1 - _done(step, until)) ** self.power


def _done(step: int, until: int) -> float:
    return max(0, step) / until


# --- shorthand -------------------------------------------------------------------------------------------------------


def parse_sparsity_schedule(x: object) -> SparsitySchedule:
    """ "cubic", "one_shot", "at_init", a sparsity schedule or the dict of one. Raises ValueError for anything else."""
    names = {"cubic": Cubic, "one_shot": OneShot, "at_init": AtInit}
    return parse_named(x, SparsitySchedule, names, "a sparsity schedule")


def parse_every(x: object) -> Every:
    """An `Every`, the dict of one, or an int: its interval. Raises ValueError for anything else.

    >>> parse_every(50)
    Every(interval=50, until=0.75)
    """
    if isinstance(x, int) and not isinstance(x, bool):
        return Every(x)
    return parse_named(x, Every, {"every": Every}, "an Every, or an int of steps")


def parse_drop_fraction(x: object) -> DropFraction:
    """A drop fraction, the dict of one, or a number: a constant share. Raises ValueError for anything else.

    >>> parse_drop_fraction(0.3)
    Constant(fraction=0.3)
    """
    if isinstance(x, int | float) and not isinstance(x, bool):
        return Constant(x)
    return parse_named(x, DropFraction, {}, "a Constant, Cosine or InversePower, or a number (a constant share)")


SparsityScheduleField = Annotated[Any, BeforeValidator(parse_sparsity_schedule)]
EveryField = Annotated[Any, BeforeValidator(parse_every)]
DropFractionField = Annotated[Any, BeforeValidator(parse_drop_fraction)]
