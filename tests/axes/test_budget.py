import importlib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_lists import budget, layers
from rarefy.axes.allocation import AtLeast, Proportional
from rarefy.axes.budget import highest_sparsity, kept, lowest_sparsity, proportional
from rarefy.axes.value import value


@pytest.mark.parametrize(("density", "units", "expected"), [(0.5, 5, 3), (0.35, 10, 4), (1.0, 7, 7), (0.01, 10, 0)])
def test_kept_reads_the_decimal(density, units, expected):
    assert kept(density, units) == expected


# 10 among demands 5 : 3 : 2 is 5, 3, 2; the first holds 2, so 8 are left for 3 : 2, and the second holds 3 of its 4.8.
def test_what_a_full_layer_cannot_take_goes_to_the_others():
    its = layers((1, 2), (1, 3), (10, 10))
    assert proportional(its, [Fraction(5), Fraction(3), Fraction(2)], 10, {}) == [2, 3, 5]


def test_a_pinned_layer_keeps_its_share():
    its = layers((10, 10), (10, 10), (10, 10))
    assert proportional(its, [Fraction(1)] * 3, 100, {1: 7}) == [Fraction(93, 2), 7, Fraction(93, 2)]
    with pytest.raises(ValueError, match=r"mine: the budget is 6 of 300 units, but it fixes 7 \('layer1.weight' 7\)"):
        proportional(its, [Fraction(1)] * 3, 6, {1: 7}, asked="mine")


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_the_sparsities_that_errors_propose_would_do(total, part):
    units = min(part, total)
    its = layers((1, total))
    assert budget(its, highest_sparsity(units, total)) >= units
    assert budget(its, lowest_sparsity(units, total)) <= units


def test_an_allocation_of_ones_own_needs_its_demand_only(monkeypatch):
    module = importlib.import_module("rarefy.axes.value")
    monkeypatch.setattr(module, "_registry", dict(module._registry))  # the class is gone after the test

    @value
    class ByOutputs(Proportional):
        def demand(self, layers, sparsity):
            return [Fraction(layer.shape[0]) for layer in layers]

    its = layers((1, 9), (3, 9), (9, 9))
    assert ByOutputs().counts(its, 0.9) == [1, 3, 8]  # 12 = 117/10, in proportion 1 : 3 : 9
    assert AtLeast(ByOutputs(), units=4).counts(its, 0.9) == [4, 4, 4]
