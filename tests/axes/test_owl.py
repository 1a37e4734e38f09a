"""OWL: the handbook's example, exact totals, clamps."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.axes import OWL, AtLeast, Layer, Unstructured, count, from_dict, parse_allocation


def layers(*units: int) -> list[Layer]:
    return [Layer(str(i), (1, n), n, Unstructured()) for i, n in enumerate(units)]


def test_the_handbooks_example():
    assert OWL().densities([1.0, 3.0, 5.0], 0.7) == [0.22, 0.3, 0.38]
    assert OWL().by_block(layers(500, 500, 1000, 1000), [0, 0, 1, 2], [1.0, 3.0, 5.0], 0.7) == [110, 110, 300, 380]


def test_blocks_without_a_difference_are_uniform():
    assert OWL().densities([2.0, 2.0], 0.7) == pytest.approx([0.3, 0.3])


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 2000)), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.05, 0.5, 0.7, 0.95, 0.99]),
    st.sampled_from([0.0, 0.08, 0.3]),
)
def test_the_total_is_exact_and_the_range_holds(blocks, sparsity, width):
    shares, units = [d for d, _ in blocks], [n for _, n in blocks]
    owl = OWL(width=width)
    density = owl.densities(shares, sparsity, units)
    for keep in density:
        assert (1 - sparsity) / 10 - 1e-9 <= keep <= 1
        assert abs(keep - (1 - sparsity)) <= 2 * width + 1e-9
    counts = owl.by_block(layers(*units), range(len(units)), shares, sparsity)
    assert sum(counts) == count(sparsity, sum(units))
    for got, keep, n in zip(counts, density, units, strict=True):
        assert abs(got - Fraction(keep) * n) <= 1 + 1e-6


def test_what_is_clamped_is_spread():
    density = OWL(width=0.1).densities([0.0, 9.0, 10.0], 0.9)  # from −.027, .153, .173: the first by .037 too low
    assert density == pytest.approx([0.01, 0.135, 0.155], abs=1e-3)
    assert sum(density) == pytest.approx(0.3)


def test_groups():
    assert OWL().of_groups([1.0, 3.0, 5.0], 4, 8) == [3, 4, 5]
    assert OWL().of_groups([1.0, 1.0], 2, 4) == [2, 2]
    assert sum(OWL().of_groups([0.0, 1.0, 2.0, 10.0], 4, 8)) == 16  # 3.35, 3.55, 3.75, 5.35 round to 17


@given(st.lists(st.floats(0, 10), min_size=1, max_size=9), st.integers(1, 8), st.floats(0, 6))
def test_groups_keep_the_total_where_blocks_are_equal(shares, n, width):
    kept = OWL(group_width=width).of_groups(shares, n, 8)
    assert all(1 <= k <= 8 for k in kept)
    assert sum(kept) == n * len(kept)


def test_it_needs_the_inputs_of_each_block():
    with pytest.raises(ValueError, match="use it with Wanda, SparseGPT or ALPS"):
        OWL().counts(layers(10), 0.5)
    with pytest.raises(ValueError, match="use it with Wanda"):
        AtLeast("owl").counts(layers(10), 0.5)


def test_values():
    assert parse_allocation("owl") == OWL() == from_dict(OWL().to_dict())
