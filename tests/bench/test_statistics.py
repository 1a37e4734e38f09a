import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rarefy.bench.statistics import Interval, holm, interval, paired

values = st.lists(st.floats(0, 100).map(lambda x: round(x, 3)), min_size=2, max_size=12)


@given(values)
def test_intervals_are_those_of_student(x):
    found = interval(x)
    error = float(np.std(x, ddof=1)) / math.sqrt(len(x))
    assert found.mean == pytest.approx(np.mean(x))
    assert found.half is not None
    if error > 1e-9:
        low, high = stats.t.interval(0.95, len(x) - 1, loc=np.mean(x), scale=error)
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_an_interval_by_hand():
    # 1 2 3: mean 2, deviation 1, t(2) = 4.3027: 4.3027 / √3 = 2.4842
    assert interval([1.0, 2.0, 3.0]).half == pytest.approx(2.4842, abs=1e-4)
    assert str(interval([1.0, 2.0, 3.0])) == "2.0 ± 2.5"


def test_one_value_has_no_interval():
    assert interval([97.0]) == Interval(97.0, None, 1)
    assert str(interval([97.0])) == "97.0"


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_no_interval_of_nothing_or_of_what_is_not_finite(bad):
    with pytest.raises(ValueError, match="finite values"):
        interval(bad)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=10))
def test_paired_differences_are_those_of_scipy(pairs):
    a, b = ({seed: round(p[i], 2) for seed, p in enumerate(pairs)} for i in (0, 1))
    found = paired(a, b)
    if np.std([a[s] - b[s] for s in a]) < 1e-6:
        return
    expected = stats.ttest_rel(list(a.values()), list(b.values()))
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    assert found.p == pytest.approx(expected.pvalue, abs=1e-9)
    assert found.resolved == (found.low > 0 or found.high < 0)


def test_pairing_sees_what_seeds_hide():
    """Each seed gains exactly 1, though seeds differ by 10."""
    a, b = {0: 51.0, 1: 61.1, 2: 71.0}, {0: 50.0, 1: 60.0, 2: 70.0}
    assert paired(a, b).resolved
    assert interval(list(a.values())).half > 10  # pyright: ignore


def test_only_shared_seeds_count():
    assert paired({0: 1.0, 1: 2.0, 5: 99.0}, {0: 0.0, 1: 1.5}).count == 2
    with pytest.raises(ValueError, match="needs a shared seed"):
        paired({0: 1.0}, {1: 1.0})


def test_one_seed_resolves_nothing():
    found = paired({0: 99.0}, {0: 1.0})
    assert not found.resolved
    assert found.p == 1
    assert str(found) == "+98.0"


def test_equal_differences_are_no_certainty():
    """Three seeds that each differ by the same one image of 597: the deviation is 0, the interval is not."""
    one = 100 / 597
    a, b = dict.fromkeys(range(3), 97.0 + one), dict.fromkeys(range(3), 97.0)
    assert paired(a, b).resolved
    assert not paired(a, b, resolution=one).resolved
    assert paired(dict.fromkeys(range(3), 97.0 + 2 * one), b, resolution=one).resolved


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=9))
def test_holm_keeps_the_order_and_never_makes_p_smaller(p):
    adjusted = holm(p)
    assert all(q >= x for q, x in zip(adjusted, p, strict=True))
    assert [q for _, q in sorted(zip(p, adjusted, strict=True))] == sorted(adjusted)
