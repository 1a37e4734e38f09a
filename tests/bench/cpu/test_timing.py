import itertools
import math

import pytest

from rarefy.bench.cpu.timing import Local, Plan, Samples, interval_ranks, measure, paired_ratio


class Clock:
    """A clock that moves only when something takes time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, seconds: float):
        def call() -> None:
            self.now += seconds
            self.log.append(name)

        return Local((call,), clock=self)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_seconds_per_call_are_exact_whatever_the_number_of_calls():
    clock = Clock()
    candidates = {"a": clock.taking("a", 0.001), "b": clock.taking("b", 0.25)}
    samples, left_out = measure(candidates, Plan(rounds=4, sample=0.01), clock=clock, sleep=clock.sleep)
    assert left_out == {}
    assert samples["a"].calls == 10
    assert samples["b"].calls == 1
    assert samples["a"].seconds == pytest.approx([0.001] * 4)
    assert samples["b"].seconds == pytest.approx([0.25] * 4)


def test_rounds_are_interleaved_and_begin_in_turn():
    clock = Clock()
    candidates = {name: clock.taking(name, 1.0) for name in "abc"}
    measure(candidates, Plan(rounds=3, sample=0.5, budget=math.inf), clock=clock, sleep=clock.sleep)
    visits = [name for name, _ in itertools.groupby(clock.log[6:])]  # after two calls each that tell how long they take
    assert visits == list("abcbcacab")


def test_a_slow_candidate_is_left_out_and_named():
    clock = Clock()
    candidates = {"fast": clock.taking("fast", 0.1), "slow": clock.taking("slow", 9.0)}
    samples, left_out = measure(candidates, Plan(rounds=2, slowest=2.0), clock=clock, sleep=clock.sleep)
    assert list(samples) == ["fast"]
    assert left_out == {"slow": "a call takes 9.0 s, more than 2 s"}
    assert clock.log.count("slow") == 1


def test_the_budget_ends_the_rounds_but_never_before_the_least_number():
    clock = Clock()
    plan = Plan(rounds=50, sample=0.5, budget=5.0, least=3, settle=0.0)
    samples, _ = measure({"a": clock.taking("a", 1.0)}, plan, clock=clock, sleep=clock.sleep)
    assert len(samples["a"].seconds) == 3  # a round takes 2 s: one call to warm up, one timed
    clock = Clock()
    samples, _ = measure({"a": clock.taking("a", 0.5)}, plan, clock=clock, sleep=clock.sleep)
    assert len(samples["a"].seconds) == 6


def test_copies_take_turns_and_go_on_where_they_stopped():
    seen: list[int] = []
    local = Local([lambda i=i: seen.append(i) for i in range(3)])
    local.seconds(2)
    local.seconds(5)
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_a_ratio_pairs_the_rounds_and_is_not_moved_by_one_disturbed_round():
    a = Samples(tuple(2.0 * (1 + i) for i in range(15)), 1)
    b = Samples((1000.0, *(1.0 * (1 + i) for i in range(1, 15))), 1)
    ratio = paired_ratio(a, b)
    assert (ratio.median, ratio.low, ratio.high, ratio.count) == (2.0, 2.0, 2.0, 15)
    assert not ratio.loses()
    assert paired_ratio(b, a).loses()


def test_a_ratio_needs_a_round():
    with pytest.raises(ValueError, match="a round that both candidates have"):
        paired_ratio(Samples((), 1), Samples((1.0,), 1))


@pytest.mark.parametrize("count", range(6, 60))
def test_the_interval_covers_the_median_in_95_percent_and_no_narrower_one_does(count):
    low, high = interval_ranks(count)
    assert high == count - 1 - low

    def coverage(rank: int) -> float:
        return 1 - 2 * sum(math.comb(count, i) for i in range(rank + 1)) / 2**count

    assert coverage(low) >= 0.95 > coverage(low + 1)


def test_quartiles_of_one_round_are_that_round():
    assert Samples((3.0,), 1).quartiles == (3.0, 3.0)
    assert Samples((1.0, 2.0, 3.0, 4.0, 5.0), 1).quartiles == (2.0, 4.0)
