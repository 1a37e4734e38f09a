import itertools

import pytest

from rarefy.runtime import cost, measure
from rarefy.runtime.cost import Sizes
from rarefy.runtime.kernels import Algorithm, DType, Form
from rarefy.runtime.ways import TORCH, Way


@pytest.fixture
def now(monkeypatch):
    """A clock that only work moves: `now.advance(seconds)`."""

    class Clock:
        time = 0.0

        def advance(self, seconds):
            self.time += seconds

    clock = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.time)
    return clock


def test_times_are_those_of_the_least_disturbed_round(now):
    noise = itertools.cycle([0.0, 5e-3, 0.0])
    order = []

    def work(name, seconds):
        order.append(name)
        now.advance(seconds + next(noise))

    found = measure.times({"a": [lambda: work("a", 1e-3)], "b": [lambda: work("b", 2e-3)]})
    assert found == pytest.approx({"a": 1e-3, "b": 2e-3})
    assert order.count("a") == order.count("b")
    assert "a" in order[-2:]
    assert "b" in order[-2:]


def test_slow_candidates_are_sampled_less(now):
    calls = []
    measure.times({"a": [lambda: (calls.append(1), now.advance(1.0))]})
    assert len(calls) == 2 + measure._LEAST


def test_cold_copies_are_called_in_turn_and_a_time_is_that_of_one(now):
    order = []

    def work(name, seconds):
        return lambda: (order.append(name), now.advance(seconds))

    found = measure.times({"a": [work("a1", 1e-6), work("a2", 3e-6)], "b": [work("b", 1e-6)]}, cold=True)
    assert found == pytest.approx({"a": 2e-6, "b": 1e-6})
    assert order[:6] == ["a1", "a2", "b", "b", "a1", "a2"]
    assert len(order) == 3 * measure._ROUNDS


def test_copies_together_do_not_fit_the_caches(monkeypatch):
    monkeypatch.setattr(measure, "last_level", lambda: 1000)
    assert [measure.copies(n, True) for n in (1, 300, 2000, 5000)] == [measure._MOST, 7, 1, 1]
    assert measure.copies(1, False) == 1


@pytest.mark.parametrize(("factor", "loses"), [(0.5, True), (0.96, True), (0.98, False), (2.0, False)])
def test_ratios_are_judged_by_their_interval(now, factor, loses):
    shown = []
    first = (lambda: shown.append("first"), lambda: now.advance(1e-3 * factor))
    second = (lambda: shown.append("second"), lambda: now.advance(1e-3))
    found = measure.ratios(first, second)
    assert (found.median, found.pairs, found.loses) == (pytest.approx(factor), 15, loses)
    assert found.low == pytest.approx(factor)
    assert found.first == pytest.approx(1e-3 * factor)
    assert shown.count("first") == shown.count("second") == 17
    assert shown[4:8] == ["first", "second", "second", "first"]  # which one begins alternates


def test_one_disturbed_pair_does_not_lose(now):
    slow = itertools.chain([1.0] * 4, [50.0], itertools.repeat(1.0))
    found = measure.ratios((lambda: None, lambda: now.advance(1.0)), (lambda: None, lambda: now.advance(next(slow))))
    assert not found.loses


def test_a_clear_gain_ends_early_a_loss_does_not(now):
    gain = measure.ratios((lambda: None, lambda: now.advance(9.0)), (lambda: None, lambda: now.advance(3.0)))
    loss = measure.ratios((lambda: None, lambda: now.advance(3.0)), (lambda: None, lambda: now.advance(9.0)))
    assert (gain.pairs, loss.pairs) == (6, 15)
    assert loss.loses


def test_the_last_level_is_some_size():
    assert 1 << 18 <= measure.last_level() <= 1 << 32


def seconds(form, algorithm, *, kept=0.1, tokens=1, block=1, dtype=DType.F32, cold=False, n=1024):
    return cost.seconds(Way(form, algorithm, block), Sizes(n, n, int(kept * n * n), dtype, tokens, 2, cold))


def test_the_cost_model_knows_what_was_measured():
    few, many, expand = Algorithm.FEW, Algorithm.MANY, Algorithm.EXPAND
    # 1024², 90 %, two threads, in µs: 24 (index), 59 (bitmap), 32 (dense) for one token; 186 (index), 29 (dense 1500).
    assert seconds(Form.INDEX16, few) == pytest.approx(24e-6, rel=0.5)
    assert seconds(Form.BITMAP, few) == pytest.approx(59e-6, rel=0.5)
    assert seconds(Form.DENSE, few, kept=1) == pytest.approx(32e-6, rel=0.5)
    assert seconds(Form.INDEX16, many, tokens=128) == pytest.approx(186e-6, rel=0.5)
    assert seconds(Form.INDEX16, many, tokens=512, block=4) < seconds(Form.INDEX16, many, tokens=512)
    assert seconds(Form.BITMAP, expand, kept=0.9, tokens=512) < seconds(Form.BITMAP, many, kept=0.9, tokens=512)
    assert seconds(Form.BITMAP, many, tokens=512) < seconds(Form.BITMAP, expand, tokens=512)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.I8], ids=lambda d: d.name)
def test_costs_grow_with_the_work(dtype):
    for form, algorithm in itertools.product((Form.DENSE, Form.BITMAP, Form.INDEX16), Algorithm):
        if form == Form.INDEX16 and algorithm == Algorithm.EXPAND:
            continue
        costs = [seconds(form, algorithm, tokens=t, dtype=dtype, kept=0.5) for t in (8, 32, 128, 512)]
        assert costs == sorted(costs)
        assert seconds(form, algorithm, dtype=dtype, n=4096, cold=True) >= seconds(form, algorithm, dtype=dtype, n=1024)
    assert seconds(Form.DENSE, TORCH, dtype=dtype) > 0
    assert seconds(Form.BITMAP, Algorithm.MANY, kept=0.0, tokens=64, dtype=dtype) > 0
