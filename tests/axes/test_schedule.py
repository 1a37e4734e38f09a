import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.axes.schedule import (
    AtInit,
    Constant,
    Cosine,
    Cubic,
    Every,
    InversePower,
    OneShot,
    average_sparsity,
    parse_drop_fraction,
    parse_every,
    parse_sparsity_schedule,
    resolve,
)
from rarefy.axes.value import from_dict

VALUES = [
    AtInit(),
    OneShot(),
    OneShot(at=0.5),
    Cubic(),
    Cubic(initial=0.5, start=10, end=0.5, every=7),
    Every(),
    Every(interval=25, until=300),
    Constant(0.3),
    Cosine(0.3),
    Cosine(0.5, floor=0.005),
    InversePower(0.5, power=1.5),
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_round_trip(value):
    again = from_dict(json.loads(json.dumps(value.to_dict())))
    assert again == value
    assert again.to_dict() == value.to_dict()


def test_a_step_and_a_fraction_stay_apart():
    step, fraction = Cubic(start=0, end=1, every=1), Cubic(start=0, end=1.0, every=1)
    assert step.window(50) == (0, 1)
    assert fraction.window(50) == (0, 50)
    assert from_dict(json.loads(json.dumps(fraction.to_dict()))).window(50) == (0, 50)


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "step"), [(0.75, 750), (1.0, 1000), (0.0, 0), (1, 1), (750, 750), (0.3333, 333)])
def test_resolve(x, step):
    assert resolve(x, 1000, "end") == step


def test_a_step_needs_no_steps_but_a_fraction_does():
    assert resolve(7, None, "end") == 7
    with pytest.raises(ValueError, match=r"end=0.75 is a fraction of the run's steps.*pass steps="):
        resolve(0.75, None, "end")


@pytest.mark.parametrize("x", [1.5, -0.1, -1, math.nan, math.inf])
def test_resolve_refuses_what_is_no_point_in_time(x):
    with pytest.raises(ValueError, match="until must be"):
        resolve(x, 1000, "until")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cubic(end=1.5),
        lambda: Cubic(start=-1),
        lambda: Cubic(every=0),
        lambda: Cubic(every=2.5),
        lambda: Cubic(initial=1.0),
        lambda: Cubic(start=True),
        lambda: Cubic(start=0.8, end=0.5),
        lambda: Cubic(start=80, end=50),
        lambda: OneShot(at=-3),
        lambda: Every(interval=0),
        lambda: Every(until=2.0),
        lambda: Constant(1.5),
        lambda: Cosine(-0.1),
        lambda: Cosine(0.3, floor=0.4),
        lambda: InversePower(0.3, power=-1),
    ],
)
def test_impossible_schedules_are_refused_when_made(make):
    with pytest.raises(ValueError, match=r"must be|ends before"):
        make()


# --- sparsity over time ----------------------------------------------------------------------------------------------


# s_i = 0, s_f = .9
@pytest.mark.parametrize(
    ("progress", "sparsity"), [(0, 0), (0.1, 0.2439), (0.25, 0.5203), (0.5, 0.7875), (0.75, 0.8859), (1, 0.9)]
)
def test_cubic_vector(progress, sparsity):
    cubic = Cubic(start=200, end=1200)
    assert cubic.sparsity(200 + round(1000 * progress), 0.9, None) == pytest.approx(sparsity, abs=5e-5)


def test_cubic_is_exact_at_its_ends():
    cubic = Cubic(initial=0.3, start=0.25, end=0.75)
    assert [cubic.sparsity(t, 0.95, 100) for t in (0, 24, 25, 75, 76, 100)] == [0.3, 0.3, 0.3, 0.95, 0.95, 0.95]


def test_the_last_update_falls_on_the_end():
    assert [t for t in range(101) if Cubic(start=10, end=35, every=10).due(t, 100)] == [10, 20, 30, 35]
    assert [t for t in range(101) if Cubic(start=10, end=35, every=1000).due(t, 100)] == [10, 35]


def test_an_empty_window_is_one_shot():
    cubic = Cubic(start=30, end=30)
    assert [t for t in range(101) if cubic.due(t, 100)] == [30]
    assert [cubic.sparsity(t, 0.9, 100) for t in (29, 30)] == [0.0, 0.9]


@given(
    initial=st.floats(0, 0.99),
    more=st.floats(0, 1),
    start=st.integers(0, 40),
    length=st.integers(0, 60),
    every=st.integers(1, 70),
)
def test_a_cubic_run_is_monotone_and_arrives(initial, more, start, length, every):
    final = min(0.999, initial + more * (0.999 - initial))
    cubic = Cubic(initial=initial, start=start, end=start + length, every=every)
    run = [cubic.sparsity(t, final, 100) for t in range(101)]
    assert all(initial <= s <= final for s in run)
    assert all(a <= b + 1e-15 for a, b in itertools.pairwise(run))
    due = [t for t in range(101) if cubic.due(t, 100)]
    assert due[-1] == start + length
    assert run[due[-1]] == final


def test_a_window_out_of_the_run_is_refused():
    with pytest.raises(ValueError, match="after the run of 100 steps"):
        Cubic(start=0, end=101).due(0, 100)
    with pytest.raises(ValueError, match="before its start"):
        Cubic(start=80, end=0.5).due(0, 100)


def test_masks_do_not_get_denser():
    with pytest.raises(ValueError, match=r"starts at 0\.8"):
        Cubic(initial=0.8).sparsity(0, 0.5, 100)


def test_one_shot_and_at_init():
    assert [t for t in range(11) if OneShot(at=0.3).due(t, 10)] == [3]
    assert [OneShot(at=3).sparsity(t, 0.9, None) for t in (0, 2, 3, 4)] == [0.0, 0.0, 0.9, 0.9]
    assert [t for t in range(11) if AtInit().due(t, None)] == [0]
    assert AtInit().sparsity(0, 0.9, None) == OneShot().sparsity(0, 0.9, None) == 0.9


def test_average_sparsity_vectors():
    cubic = Cubic(start=0.25, end=0.75)
    assert average_sparsity(cubic, 0.5, 1000) == pytest.approx(0.625 * 0.5)
    assert 1 - average_sparsity(cubic, 0.5, 1000) == pytest.approx(0.6875)
    assert 1 - average_sparsity(cubic, 0.8, 1000) == pytest.approx(0.5)


@given(initial=st.floats(0, 0.5), final=st.floats(0.5, 0.99), start=st.integers(0, 100), length=st.integers(0, 100))
def test_average_sparsity_is_the_mean_over_the_run(initial, final, start, length):
    cubic, steps = Cubic(initial=initial, start=start, end=start + length), 200
    run = [cubic.sparsity(t, final, steps) for t in range(steps + 1)]
    trapezoid = sum((a + b) / 2 for a, b in itertools.pairwise(run)) / steps
    assert average_sparsity(cubic, final, steps) == pytest.approx(trapezoid, abs=5e-3)


# --- drop and grow ---------------------------------------------------------------------------------------------------


def test_every():
    assert [t for t in range(1001) if Every(interval=250).due(t, 1000)] == [250, 500]  # not 0, not 750 = until
    assert [t for t in range(1001) if Every(interval=250, until=1.0).due(t, 1000)] == [250, 500, 750]
    assert [t for t in range(1001) if Every(interval=250, until=501).due(t, None)] == [250, 500]


# α = .3 at t/T = 0, ⅓, ½, ⅔, 1
@pytest.mark.parametrize(("step", "share"), [(0, 0.3), (20, 0.225), (30, 0.15), (40, 0.075), (60, 0.0), (90, 0.0)])
def test_cosine_vector(step, share):
    assert Cosine(0.3).at(step, 60) == pytest.approx(share, abs=1e-15)


def test_cosine_with_a_floor():
    assert Cosine(0.5, floor=0.005).at(0, 100) == pytest.approx(0.5)
    assert Cosine(0.5, floor=0.005).at(50, 100) == pytest.approx(0.2525)
    assert Cosine(0.5, floor=0.005).at(100, 100) == 0.005


def test_inverse_power():
    assert [InversePower(0.5).at(t, 100) for t in (0, 50, 100, 200)] == [0.5, 0.0625, 0.0, 0.0]
    assert InversePower(0.5, power=1).at(25, 100) == 0.375


@pytest.mark.parametrize("drop", [Constant(0.3), Cosine(0.3), Cosine(0.3, 0.1), InversePower(0.3)], ids=str)
def test_drop_fractions_only_fall(drop):
    run = [drop.at(t, 75) for t in range(101)]
    assert run[0] == pytest.approx(0.3)
    assert all(0 <= b <= a <= 0.3 for a, b in itertools.pairwise(run))
    assert math.isfinite(drop.at(0, 0))


# --- shorthand -------------------------------------------------------------------------------------------------------


def test_shorthand():
    assert parse_sparsity_schedule("cubic") == Cubic()
    assert parse_sparsity_schedule("one_shot") == OneShot()
    assert parse_sparsity_schedule("at_init") == AtInit()
    assert parse_sparsity_schedule(Cubic(every=3).to_dict()) == Cubic(every=3)
    assert parse_every(50) == Every(50)
    assert parse_every(Every(7).to_dict()) == Every(7)
    assert parse_drop_fraction(0.3) == Constant(0.3)
    assert parse_drop_fraction(1) == Constant(1.0)
    assert parse_drop_fraction(Cosine(0.3)) == Cosine(0.3)


@pytest.mark.parametrize(
    ("parse", "x", "message"),
    [
        (parse_sparsity_schedule, "cubik", "did you mean 'cubic'"),
        (parse_sparsity_schedule, Every(), "is not a sparsity schedule"),
        (parse_every, True, "is not an Every"),
        (parse_every, Constant(0.1), "is not an Every"),
        (parse_drop_fraction, "cosine", "is not a Constant, Cosine or InversePower"),
        (parse_drop_fraction, True, "is not a Constant"),
        (parse_drop_fraction, 1.5, "must be at most 1"),
    ],
)
def test_what_is_no_schedule_is_refused(parse, x, message):
    with pytest.raises(ValueError, match=message):
        parse(x)
