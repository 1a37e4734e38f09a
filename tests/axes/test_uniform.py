from fractions import Fraction

import pytest
from hypothesis import given

from layer_lists import budget, erk_loop, layers, networks, sparsities
from rarefy.axes.allocation import Balanced, Layer, PerLayer, Uniform
from rarefy.axes.pattern import Unstructured


@given(shapes=networks, sparsity=sparsities)
def test_uniform_rounds_each_layer(shapes, sparsity):
    its = layers(*shapes)
    assert Uniform().counts(its, sparsity) == [budget([layer], sparsity) for layer in its]


@given(networks, sparsities)
def test_balanced_is_the_same_loop_with_one_over_the_units(shapes, sparsity):
    its = layers(*shapes)
    raws = [Fraction(1, layer.units) for layer in its]
    assert Balanced().ideal(its, sparsity) == erk_loop(its, sparsity, raws)


NAMED = [
    Layer(name, (10, 10), 100, Unstructured()) for name in ("block.0.fc.weight", "block.1.fc.weight", "head.weight")
]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, [50, 50, 50]),
        ({"head.weight": 0.0}, [50, 50, 100]),
        ({"head": 0.25}, [50, 50, 75]),
        ({"block.*": 0.9}, [10, 10, 50]),
        ({"block.*": 0.9, "block.1.fc": 0.8}, [10, 20, 50]),
        ({"*": 0.9, "block.*": 0.9}, [10, 10, 10]),
    ],
)
def test_per_layer(asked, expected):
    assert PerLayer(asked).counts(NAMED, 0.5) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"haed.weight": 0.9}, "'haed.weight' fits no layer; did you mean 'head.weight'"),
        ({"*": 0.9, "head*": 0.5}, "several entries fit 'block.*|several entries fit 'head.weight'"),
    ],
)
def test_per_layer_refuses(asked, message):
    with pytest.raises(ValueError, match=message):
        PerLayer(asked).counts(NAMED, 0.5)


def test_per_layer_checks_its_sparsities():
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 1.0"):
        PerLayer({"head": 1.0})
