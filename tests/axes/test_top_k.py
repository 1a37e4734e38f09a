"""Top-k by index, and exact counts."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.axes.top_k import count, largest_remainder, top_k, top_k_per_row

SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@st.composite
def scores(draw: st.DrawFn, dims: int = 2) -> Tensor:
    """Scores with few or many ties, both zeros, any dtype, sometimes not contiguous."""
    shape = draw(st.lists(st.integers(1, 9), min_size=dims, max_size=dims))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    made = torch.randint(-levels, levels + 1, shape, generator=generator) / 8
    made = torch.where(torch.rand(shape, generator=generator) < 0.2, -0.0, made.float())
    made = made.to(draw(st.sampled_from(DTYPES)))
    return made.transpose(0, -1) if draw(st.booleans()) else made


def reference(flat: list[float], k: int) -> list[bool]:
    """Python's sort is stable, and -0.0 == 0.0."""
    kept = set(sorted(range(len(flat)), key=lambda i: -flat[i])[:k])
    return [i in kept for i in range(len(flat))]


@SETTINGS
@given(scores(), st.data())
def test_equals_a_stable_sort(x: Tensor, data: st.DataObject):
    k = data.draw(st.integers(0, x.numel()))
    mask = top_k(x, k)
    assert mask.dtype is torch.bool
    assert mask.shape == x.shape
    assert int(mask.sum()) == k
    assert mask.flatten().tolist() == reference(x.double().flatten().tolist(), k)


@SETTINGS
@given(scores(), st.data())
def test_among_never_reads_the_others(x: Tensor, data: st.DataObject):
    among = torch.tensor(data.draw(st.lists(st.booleans(), min_size=x.numel(), max_size=x.numel()))).reshape(x.shape)
    k = data.draw(st.integers(0, int(among.sum())))
    mask = top_k(x.float().masked_fill(~among, math.nan), k, among)
    assert int(mask.sum()) == k
    assert not bool((mask & ~among).any())
    assert mask[among].tolist() == reference(x.double()[among].tolist(), k)


@SETTINGS
@given(scores(), st.data())
def test_each_row_is_a_top_k(x: Tensor, data: st.DataObject):
    x = x.float()
    k = data.draw(st.integers(0, x.shape[1]))
    assert torch.equal(top_k_per_row(x, k), torch.stack([top_k(row, k) for row in x]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [0.0, 0.9, 1.0])
def test_large_tensors_and_any_number_of_threads(dtype: torch.dtype, tied: float):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(300, 400, generator=generator, dtype=torch.float64).to(dtype)
    x[torch.rand(x.shape, generator=generator) < tied] = 0
    threads = torch.get_num_threads()
    try:
        for k in (1, 1_234, 60_000, 119_999):
            masks: list[Tensor] = []
            for n in (1, 2):
                torch.set_num_threads(n)
                masks.append(top_k(x, k))
            expected = torch.zeros(x.numel(), dtype=torch.bool)
            expected[x.flatten().sort(descending=True, stable=True).indices[:k]] = True
            assert torch.equal(masks[0], masks[1])
            assert torch.equal(masks[0].flatten(), expected)
    finally:
        torch.set_num_threads(threads)


def test_the_ends_of_the_range():
    x = torch.tensor([-3.4e38, 3.4e38, 1e-45, -1e-45, 0.0])
    assert top_k(x, 2).tolist() == [False, True, True, False, False]
    assert top_k(torch.tensor([]), 0).tolist() == []
    assert top_k(torch.tensor(1.0, requires_grad=True), 1).item() is True


@pytest.mark.parametrize(
    ("x", "k", "problem"),
    [
        (torch.tensor([1.0, math.nan, math.inf, -math.inf]), 1, r"1 NaN and 2 infinite among 4 of shape \(4,\)"),
        (torch.ones(3), 4, "asked for 4 of 3 candidates"),
        (torch.ones(3), -1, "asked for -1 of 3"),
        (torch.ones(3, dtype=torch.int64), 1, r"must be floating, got torch.int64"),
    ],
)
def test_errors(x: Tensor, k: int, problem: str):
    with pytest.raises(ValueError, match=problem):
        top_k(x, k)


def test_errors_of_among():
    x = torch.tensor([1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match="1 NaN and 0 infinite among 2"):
        top_k(x, 1, torch.tensor([False, True, True]))
    with pytest.raises(ValueError, match="asked for 2 of 1"):
        top_k(x, 2, torch.tensor([False, False, True]))
    for among in (torch.ones(3), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="among must be a bool mask"):
            top_k(x, 1, among)


# --- counts ----------------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.integers(0, 10_000), st.integers(0, 10**9))
def test_count_takes_the_decimal_as_written(ten_thousandths: int, units: int):
    # floor((1 − s)·units + ½) in whole numbers
    expected = (2 * (10_000 - ten_thousandths) * units + 10_000) // 20_000
    assert count(ten_thousandths / 10_000, units) == expected


def test_count_by_hand():
    assert count(0.9, 5) == 1  # .5 + .5; the nearest float to .9 is larger, and would give 0
    assert count(0.7, 5) == 2
    assert count(0.0, 7) == 7
    assert count(1e-05, 100_000) == 99_999


@pytest.mark.parametrize(("sparsity", "units"), [(-0.1, 5), (1.1, 5), (math.nan, 5), (0.5, -1)])
def test_count_refuses(sparsity: float, units: int):
    with pytest.raises(ValueError, match="must be in"):
        count(sparsity, units)


def test_largest_remainder_of_the_handbook():
    # ERK on the CNN of handbook 1.2: s = .8 and .9, exact budgets 4822 and 2411
    sizes, raw = [432, 4608, 18432, 640], [25 / 432, 54 / 4608, 102 / 18432, 74 / 640]
    for budget, dense, expected in ((4822, {0, 3}, [432, 1298, 2452, 640]), (2411, {3}, [245, 528, 998, 640])):
        free = budget - sum(sizes[i] for i in dense)
        rate = free / sum(r * n for i, (r, n) in enumerate(zip(raw, sizes, strict=True)) if i not in dense)
        ideal = [n if i in dense else rate * r * n for i, (r, n) in enumerate(zip(raw, sizes, strict=True))]
        assert largest_remainder(ideal, budget, sizes) == expected


@SETTINGS
@given(st.lists(st.tuples(st.fractions(0, 50, max_denominator=20), st.integers(0, 60)), max_size=8), st.data())
def test_largest_remainder_is_exact_within_caps(pairs: list[tuple[Fraction, int]], data: st.DataObject):
    ideal, caps = [x for x, _ in pairs], [cap for _, cap in pairs]
    total = data.draw(st.integers(0, sum(caps)))
    shares = largest_remainder(ideal, total, caps)
    assert sum(shares) == total
    assert all(0 <= share <= cap for share, cap in zip(shares, caps, strict=True))


@SETTINGS
@given(st.lists(st.fractions(0, 50, max_denominator=20), min_size=1, max_size=8))
def test_largest_remainder_of_a_fair_total_rounds_each_down_or_up(ideal: list[Fraction]):
    ideal[0] += math.ceil(sum(ideal)) - sum(ideal)  # make it a whole number
    shares = largest_remainder(ideal, int(sum(ideal)), [1000] * len(ideal))
    assert all(math.floor(x) <= share <= math.ceil(x) for x, share in zip(ideal, shares, strict=True))
    up = [x - math.floor(x) for x, share in zip(ideal, shares, strict=True) if share > x]
    down = [x - math.floor(x) for x, share in zip(ideal, shares, strict=True) if share < x]
    assert not up or not down or min(up) >= max(down)


def test_largest_remainder_refuses():
    with pytest.raises(ValueError, match=r"capped at \[2, 2\].*from 0 to their sum, 4"):
        largest_remainder([3, 3], 5, [2, 2])
    with pytest.raises(ValueError, match="as many caps"):
        largest_remainder([3, 3], 5, [9])
