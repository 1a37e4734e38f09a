import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rarefy
import tiny
from rarefy.axes import AtLeast, ErdosRenyiKernel, Global, Lamp, Uniform, parse_allocation, parse_pattern
from rarefy.core import choose
from rarefy.core.sites import Site, find_sites

ALLOCATIONS = ["uniform", "erdos_renyi", "erdos_renyi_kernel", "balanced", "global", "lamp"]
EXACT = [*map(parse_allocation, ALLOCATIONS), AtLeast("global", units=2), AtLeast("lamp", units=1)]
PATTERNS = ["unstructured", "2:4", "2x2", "4x1", "constant_fan_in", "channel"]


def sites(pattern: str = "unstructured", model: nn.Module | None = None) -> list[Site]:
    found = find_sites(model or tiny.cnn())
    for site in found:
        site.pattern = parse_pattern(pattern)
    return found


def magnitudes(found: list[Site]) -> dict[Site, torch.Tensor]:
    return {site: site.weight.abs() for site in found}


def kept(masks: dict[Site, torch.Tensor]) -> list[int]:
    return [int(choose.units_of(site, mask).sum()) for site, mask in masks.items()]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("allocation", EXACT, ids=str)
def test_masks_are_legal_and_counted(allocation: rarefy.axes.Allocation, pattern: str):
    found = sites(pattern)
    masks = choose.project(magnitudes(found), "mean_abs", allocation, 0.5)
    for site, mask in masks.items():
        assert mask.shape == site.parameter.shape
        assert site.pattern.legal(site.canonical(mask))
        assert int(choose.units_of(site, mask).sum()) == choose.reachable(site, site.asked)


@given(
    st.sampled_from(EXACT),
    st.sampled_from(PATTERNS),
    st.lists(st.floats(0, 0.98), min_size=2, max_size=6),
    st.integers(0, 99),
    st.booleans(),
)
def test_nested_masks_only_lose(allocation, pattern: str, shares: list[float], seed: int, ties: bool):
    """Whatever the rounding of a budget, the ties and the zeros among scores: no unit comes back, the sum is exact."""
    found = sites(pattern)
    g = torch.Generator().manual_seed(seed)
    before = {site: torch.ones(site.parameter.shape, dtype=torch.bool) for site in found}
    for share in sorted(shares):
        scores = {site: torch.rand(site.parameter.shape, generator=g, dtype=torch.float64) for site in found}
        if ties:
            scores = {site: (2 * x).round() for site, x in scores.items()}
        scores = {site: x * before[site] for site, x in scores.items()}  # as weights that are masked
        if isinstance(allocation, AtLeast) and (1 - share) * 20 < 3 * 2:
            return  # floors that exceed the budget of the fewest units, 20 channels
        masks = choose.project(scores, "mean_abs", allocation, share, nested=before)
        for site, mask in masks.items():
            assert not (mask & ~before[site]).any()
        units = [site.pattern.units(site.pattern_shape) for site in found]
        if allocation != Uniform() and pattern not in {"2:4", "constant_fan_in"}:
            assert sum(kept(masks)) == rarefy.axes.count(share, sum(units))
        before = masks


def test_largest_remainders_may_ask_for_more_than_before():
    """ERK of 70 and of 69 over 4-4-2-3-8-6: one weight fewer gives the first layer one more, which it has not."""
    widths = [4, 4, 2, 3, 8, 6]
    found = find_sites(nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths))))
    n = sum(site.numel for site in found)
    before = choose.project(magnitudes(found), "mean_abs", ErdosRenyiKernel(), 1 - 70 / n)
    assert kept(before) == [13, 8, 6, 19, 24]
    fresh = choose.project(magnitudes(found), "mean_abs", ErdosRenyiKernel(), 1 - 69 / n)
    assert kept(fresh) == [14, 8, 6, 18, 23]
    after = choose.project(magnitudes(found), "mean_abs", ErdosRenyiKernel(), 1 - 69 / n, nested=before)
    assert kept(after) == [13, 8, 6, 19, 23]
    assert all(not (after[s] & ~before[s]).any() for s in found)
    assert [site.asked for site in found] == kept(after)


def test_masked_units_rank_last_even_below_zeros():
    (site,) = sites(model=tiny.linear([[0.0, 0.0, 3.0, 0.0]]))
    nested = {site: tiny.mask([[0, 1, 1, 1]])}
    mask = choose.project(magnitudes([site]), "mean_abs", Global(), 0.25, nested=nested)[site]
    assert mask.int().tolist() == [[0, 1, 1, 1]]


def test_lamp_is_not_ranked_by_shifted_scores():
    """LAMP squares: a mark below zero for what is masked would come out on top."""
    model = nn.Sequential(tiny.linear([[1.0, 2.0, 3.0, 0.0]]), tiny.linear([[0.1], [0.2], [0.3], [0.4]]))
    found = find_sites(model)
    nested = {found[0]: tiny.mask([[1, 1, 1, 0]]), found[1]: torch.ones(4, 1, dtype=torch.bool)}
    for allocation in (Lamp(), AtLeast("lamp", units=1)):
        masks = choose.project(magnitudes(found), "mean_abs", allocation, 0.5, nested=nested)
        # LAMP: 1/14 4/13 1 and .033 .138 .36 1: the best four are 1 1 .36 4/13
        assert [m.flatten().int().tolist() for m in masks.values()] == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_what_fixes_its_count_takes_no_part_in_the_budget():
    found = find_sites(tiny.mlp())
    found[0].pattern = parse_pattern("2:4")
    counts = choose.allocate(found, Global(), 0.5, {s: choose.pooled(s, s.weight) for s in found})
    assert counts[found[0]] == 12 * 5
    assert counts[found[1]] + counts[found[2]] == (96 + 32) // 2
    assert list(counts) == found


def test_asked_is_remembered_by_projection_alone():
    found = sites()
    choose.allocate(found, Uniform(), 0.5, None)
    assert [site.asked for site in found] == [None] * 3
    choose.project(magnitudes(found), "mean_abs", Uniform(), 0.5)
    assert [site.asked for site in found] == [108, 64, 64]


def test_a_sparsity_is_needed_unless_the_pattern_says():
    found = sites()
    with pytest.raises(ValueError, match=r"sparsity=None, but the pattern unstructured of '0\.weight'"):
        choose.project(magnitudes(found), "mean_abs", Uniform(), None)
    choose.project(magnitudes(sites("2:4")), "mean_abs", Uniform(), None)


def test_the_first_weight_can_stand_for_its_unit():
    (site,) = sites("2x2", tiny.linear([[1.0, 9.0, 3.0], [9.0, 9.0, 9.0], [5.0, 9.0, 7.0]]))
    assert choose.pooled(site, site.weight, "first").tolist() == [1.0, 3.0, 5.0, 7.0]
    (site,) = sites("channel", tiny.linear([[1.0, 9.0], [3.0, 9.0]]))
    assert choose.pooled(site, site.weight, "first").tolist() == [1.0, 3.0]
    (site,) = sites("2:4", tiny.linear([[1.0, 9.0], [3.0, 8.0]]))
    assert choose.pooled(site, site.weight, "first").tolist() == [1.0, 9.0, 3.0, 8.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_are_numbers(bad: float):
    found = sites()
    scores = magnitudes(found)
    scores[found[1]][0, 0] = bad
    with pytest.raises(ValueError, match=r"scores of '3\.weight' hold . NaN and . infinite values of 128"):
        choose.project(scores, "mean_abs", Uniform(), 0.5)
    assert [site.asked for site in found] == [None] * 3


def test_refusing_infinite_values_of_any_type():
    choose.refuse_infinite("w", torch.empty(0), "weights")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        choose.refuse_infinite("w", torch.ones(3, dtype=dtype), "weights")
        with pytest.raises(ValueError, match="weights of 'w' hold 1 NaN and 1 infinite values of 3"):
            choose.refuse_infinite("w", torch.tensor([math.nan, 1.0, math.inf], dtype=dtype), "weights")
