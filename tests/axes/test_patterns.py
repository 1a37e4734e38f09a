"""Every pattern obeys the same laws; then vectors that a reader can check by hand."""

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.axes.pattern import (
    NM,
    Block,
    Channel,
    ConstantFanIn,
    Pattern,
    PatternField,
    Pool,
    Unstructured,
    parse_pattern,
)
from rarefy.axes.value import Value, from_dict, value

SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
nm = st.integers(1, 9).flatmap(lambda m: st.builds(NM, st.integers(1, m), st.just(m)))
patterns = st.one_of(
    nm,
    st.builds(Block, st.integers(1, 3), st.integers(1, 4)),
    st.sampled_from([Unstructured(), ConstantFanIn(), Channel()]),
)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Canonical weights of Linear and conv shapes, with few or many ties and both zeros."""
    shape = draw(st.lists(st.integers(1, 11), min_size=2, max_size=2))
    shape += draw(st.sampled_from([[], [], [2], [3, 2]]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.sampled_from([1, 3, 1000]))
    made = torch.randint(-levels, levels + 1, shape, generator=generator) / 8
    made = torch.where(torch.rand(shape, generator=generator) < 0.2, -0.0, made)
    return made.to(draw(st.sampled_from(DTYPES)))


cases = st.tuples(patterns, weights(), st.floats(0, 1))


def budget(pattern: Pattern, weight: Tensor, sparsity: float) -> int:
    """A number of units that the pattern can keep of this weight."""
    assume(pattern.fits(weight.shape) is None)
    return pattern.asked(weight.shape, sparsity)


def groups_of(pattern: Pattern, shape: tuple[int, ...], k: int) -> list[tuple[list[int], int]]:
    """The units that share a quota, and the quota: an independent, slow reading of each pattern's definition."""
    if isinstance(pattern, NM):
        rows = [list(range(start, start + shape[1])) for start in range(0, math.prod(shape), shape[1])]
        cut = [row[i : i + pattern.m] for row in rows for i in range(0, len(row), pattern.m)]
        return [(group, math.ceil(pattern.n * len(group) / pattern.m)) for group in cut]
    if isinstance(pattern, ConstantFanIn):
        fan_in = math.prod(shape[1:])
        return [(list(range(r * fan_in, (r + 1) * fan_in)), k // shape[0]) for r in range(shape[0])]
    return [(list(range(pattern.units(shape))), k)]


def reference(groups: list[tuple[list[int], int]], scores: list[float], keep: list[bool]) -> list[bool]:
    chosen: set[int] = set()
    for group, quota in groups:
        chosen |= set(sorted(group, key=lambda i: (not keep[i], -scores[i]))[:quota])
    return [i in chosen for i in range(len(scores))]


@SETTINGS
@given(cases)
def test_project_is_legal_exact_and_idempotent(case: tuple[Pattern, Tensor, float]):
    pattern, weight, k = *case[:2], budget(*case)
    mask = pattern.project(weight, k)
    assert mask.dtype is torch.bool
    assert mask.shape == weight.shape
    assert mask.is_contiguous()
    assert pattern.legal(mask)
    assert int(pattern.gather(mask).sum()) == k
    above_zero = torch.where(mask, weight.double().abs() + 1, 0.0)
    assert torch.equal(pattern.project(above_zero, k), mask)


@SETTINGS
@given(cases, st.data())
def test_fill_equals_a_stable_sort(case: tuple[Pattern, Tensor, float], data: st.DataObject):
    pattern, weight, k = *case[:2], budget(*case)
    pooled = pattern.pool(weight)
    groups, scores = groups_of(pattern, tuple(weight.shape), k), pooled.tolist()
    nothing = [False] * len(scores)
    assert pattern.fill(None, pooled, k, weight.shape).tolist() == reference(groups, scores, nothing)

    kept = list(nothing)
    for group, quota in groups:
        for i in data.draw(st.permutations(group))[: data.draw(st.integers(0, quota))]:
            kept[i] = True
    keep = torch.tensor(kept)
    unread = pooled.masked_fill(keep, math.nan)  # the scores of what stays do not matter
    filled = pattern.fill(keep, unread, k, weight.shape)
    assert filled.tolist() == reference(groups, scores, kept)
    assert int(filled.sum()) == k
    assert bool((filled | ~keep).all())


@SETTINGS
@given(cases, st.data())
def test_spread_and_gather_are_inverse(case: tuple[Pattern, Tensor, float], data: st.DataObject):
    pattern, weight, _ = *case[:2], budget(*case)
    units = pattern.units(weight.shape)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=units, max_size=units)))
    mask = pattern.spread(kept, weight.shape)
    assert mask.shape == weight.shape
    assert torch.equal(pattern.gather(mask), kept)
    assert torch.equal(pattern.spread(pattern.gather(mask), weight.shape), mask)


@SETTINGS
@given(cases, st.sampled_from(["mean_abs", "abs_mean", "mean"]))
def test_pool_is_the_mean_over_the_unit(case: tuple[Pattern, Tensor, float], how: Pool):
    pattern, weight, _ = *case[:2], budget(*case)
    pooled = pattern.pool(weight, how)
    for i, score in enumerate(pooled.tolist()):
        unit = pattern.spread(torch.arange(len(pooled)) == i, weight.shape)
        members = weight.double()[unit]
        mean = float((members.abs() if how == "mean_abs" else members).mean())
        assert score == pytest.approx(abs(mean) if how == "abs_mean" else mean, abs=1e-12)
    assert len(pooled) == pattern.units(weight.shape)
    assert pooled.dtype is (weight.dtype if len(pooled) == weight.numel() else torch.float64)


@SETTINGS
@given(nm, weights())
def test_no_other_mask_of_the_pattern_is_nearer(pattern: NM, weight: Tensor):
    # Euclidean projection: the kept squares of each group are the largest that n of its weights can have.
    mask = pattern.project(weight, 0)
    squares, kept = pattern.pool(weight.double().square()), pattern.gather(mask)
    for group, quota in groups_of(pattern, tuple(weight.shape), 0):
        best = max(sum(float(squares[i]) for i in some) for some in itertools.combinations(group, quota))
        assert sum(float(squares[i]) for i in group if kept[i]) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("m", [63, 64, 65, 130])
def test_nm_agrees_with_itself_where_the_algorithm_changes(m: int):
    weight = torch.randint(-3, 4, (5, 2 * m), generator=torch.Generator().manual_seed(0)).float()
    kept = NM(m // 3, m).project(weight, 0).flatten().tolist()
    scores = weight.abs().flatten().tolist()
    assert kept == reference(groups_of(NM(m // 3, m), (5, 2 * m), 0), scores, [False] * len(scores))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3:100", "4x4", "constant_fan_in", "channel"])
def test_results_do_not_depend_on_threads_or_memory_layout(pattern: str):
    made = parse_pattern(pattern)
    weight = torch.randn(96, 120, 3, 3, generator=torch.Generator().manual_seed(0))
    k = made.asked(weight.shape, 0.9)
    threads = torch.get_num_threads()
    try:
        results: list[tuple[Tensor, Tensor]] = []
        for n, w in ((1, weight), (2, weight), (2, weight.to(memory_format=torch.channels_last))):
            torch.set_num_threads(n)
            results.append((made.pool(w), made.project(w, k)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# --- errors, shorthand, JSON -----------------------------------------------------------------------------------------


def test_what_fits_and_what_is_whole():
    for pattern in (Unstructured(), Channel(), ConstantFanIn(), NM(2, 4), Block(4, 1)):
        assert pattern.fits((8, 8)) is None
        assert pattern.whole((8, 8))
        assert "empty shape" in str(pattern.fits((8, 0)))
        assert not pattern.whole((8, 0))
    assert "4x1 is larger than the 3x9 matrix" in str(Block(4, 1).fits((3, 1, 3, 3)))
    assert "at most 3x1" in str(Block(4, 1).fits((3, 1, 3, 3)))
    assert NM(2, 4).fits((8, 3)) is None
    assert not NM(2, 4).whole((8, 3))
    for pattern in (ConstantFanIn(), NM(2, 4), Block(1, 1)):
        assert "unstructured" in str(pattern.fits((8,)))


@pytest.mark.parametrize(
    ("pattern", "keep", "k", "problem"),
    [
        (Unstructured(), [1, 1, 1, 0, 0, 0, 0, 0], 2, "3 units are to stay, but only 2 of 8 may"),
        (NM(2, 4), [0, 0, 0, 0, 0, 1, 1, 1], 4, "3 weights of a group of 4 are to stay, but it keeps 2"),
        (ConstantFanIn(), [0, 0, 0, 0, 0, 1, 1, 1], 4, "3 weights of row 1 are to stay, but each of 2 rows keeps 2"),
        (Channel(), [1, 1], 1, "2 units are to stay"),
        (Unstructured(), [1, 0], 2, r"2x4 has 8 units, got a tensor of shape \(2,\)"),
    ],
    ids=str,
)
def test_fill_refuses_to_drop(pattern: Pattern, keep: list[int], k: int, problem: str):
    scores = torch.ones(pattern.units((2, 4)))
    with pytest.raises(ValueError, match=problem):
        pattern.fill(torch.tensor(keep).bool(), scores, k, (2, 4))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "2x2", "constant_fan_in", "channel"])
def test_scores_must_be_finite_and_counts_possible(pattern: str):
    made, weight = parse_pattern(pattern), torch.ones(4, 4)
    weight[1, 1] = math.nan
    with pytest.raises(ValueError, match="1 NaN and 0 infinite"):
        made.project(weight, made.asked(weight.shape, 0.5))
    if not made.fixed:
        with pytest.raises(ValueError, match=f"asked .* must be from 0 to {made.units((4, 4))}"):
            made.project(torch.ones(4, 4), 17)
        with pytest.raises(ValueError, match="needs a sparsity"):
            made.asked((4, 4), None)


def test_a_weight_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="4x4 is larger"):
        Block(4, 4).project(torch.ones(2, 2), 1)
    with pytest.raises(ValueError, match="n must be at most m = 2"):
        NM(4, 2)
    with pytest.raises(ValueError, match="n must be at least 1"):
        NM(0, 2)


@value
class PatternHolder(Value):
    pattern: PatternField = "unstructured"


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(4, 1), ConstantFanIn(), Channel()], ids=str)
def test_shorthand_and_json_round_trip(pattern: Pattern):
    assert parse_pattern(str(pattern)) == parse_pattern(pattern) == parse_pattern(pattern.to_dict()) == pattern
    holder = PatternHolder(str(pattern))
    assert holder.pattern == pattern
    assert from_dict(json.loads(json.dumps(holder.to_dict()))) == holder
    assert str(PatternHolder()) == "PatternHolder()"


@pytest.mark.parametrize("what", ["2of4", "2:", "x4", "", 4, None, {"kind": "PatternHolder"}])
def test_unknown_patterns(what: Any):
    with pytest.raises(ValueError, match=r"write .*n:m such as 2:4.*, or a Pattern"):
        parse_pattern(what)
