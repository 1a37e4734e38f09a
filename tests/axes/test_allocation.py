import json
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from layer_lists import CNN, LENET, budget, counts, densities, layers, networks, random_scores, sparsities
from rarefy.axes.allocation import (
    AtLeast,
    Balanced,
    ErdosRenyi,
    ErdosRenyiKernel,
    ErdosRenyiKernelPlus,
    Global,
    Lamp,
    Layer,
    PerLayer,
    Uniform,
    UniformPlus,
    parse_allocation,
)
from rarefy.axes.pattern import NM, Channel
from rarefy.axes.value import from_dict

BY_SHAPE = [
    Uniform(),
    UniformPlus(),
    ErdosRenyi(),
    ErdosRenyiKernel(),
    ErdosRenyiKernel(power=0.5),
    ErdosRenyiKernelPlus(),
    Balanced(),
]
BY_SCORE = [Global(), Lamp()]
ALL = [*BY_SHAPE, *BY_SCORE, PerLayer({"layer0": 0.5}), AtLeast(Global()), AtLeast("erdos_renyi", units=3)]
EXACT = [a for a in (*BY_SHAPE, *BY_SCORE) if a != Uniform()]


# --- vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allocation", "its", "sparsity", "expected"),
    [
        (ErdosRenyiKernel(), LENET, 0.9, [0.07957, 0.23019, 1.0]),
        (ErdosRenyiKernel(), LENET, 0.95, [0.03848, 0.11133, 0.91851]),
        (ErdosRenyi(), LENET, 0.9, [0.07957, 0.23019, 1.0]),
        (ErdosRenyiKernelPlus(), LENET, 0.9, [0.07957, 0.23019, 1.0]),
        (ErdosRenyiKernel(), CNN, 0.8, [1.0, 0.2817, 0.1330, 1.0]),
        (ErdosRenyiKernel(), CNN, 0.9, [0.5662, 0.1147, 0.0541, 1.0]),
        (ErdosRenyiKernelPlus(), CNN, 0.9, [0.5662, 0.1147, 0.0541, 1.0]),
        (ErdosRenyi(), CNN, 0.9, [0.6193, 0.1467, 0.0733, 0.1809]),
        (UniformPlus(), LENET, 0.9, [0.09962, 0.09962, 0.2]),
        (UniformPlus(), CNN, 0.9, [1.0, 0.08034, 0.08034, 0.2]),
        (UniformPlus(), CNN, 0.95, [1.0, 0.02804, 0.02804, 0.2]),
        # 2411/4 = 602.75 > 432, then (2411 − 432)/3 = 659.67 > 640, then (2411 − 432 − 640)/2 = 669.5
        (Balanced(), CNN, 0.9, [1.0, 669.5 / 4608, 669.5 / 18432, 1.0]),
    ],
    ids=str,
)
def test_densities(allocation, its, sparsity, expected):
    assert densities(allocation, its, sparsity) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(
    ("allocation", "its", "sparsity", "expected"),
    [
        (Uniform(), LENET, 0.9, [23520, 3000, 100]),
        (Uniform(), CNN, 0.9, [43, 461, 1843, 64]),
        (ErdosRenyiKernel(), LENET, 0.9, [18714, 6906, 1000]),
        (ErdosRenyiKernel(), CNN, 0.8, [432, 1298, 2452, 640]),
        (ErdosRenyiKernel(), CNN, 0.9, [245, 528, 998, 640]),
        (UniformPlus(), CNN, 0.9, [432, 370, 1481, 128]),
        (Balanced(), CNN, 0.9, [432, 670, 669, 640]),  # the half goes to the earlier layer
    ],
    ids=str,
)
def test_counts(allocation, its, sparsity, expected):
    assert allocation.counts(its, sparsity) == expected


# |w|: A = 10 large, B = 1000 tiny; s = .99 keeps 10 of 1010.
def test_a_floor_prevents_layer_collapse():
    its = layers((1, 10), (10, 100))
    scores = [torch.full((10,), 9.0), torch.full((1000,), 0.1)]
    assert Global().counts(its, 0.99, scores) == [10, 0]
    assert AtLeast(Global(), units=5).counts(its, 0.99, scores) == [5, 5]
    assert AtLeast(Global(), units=3).counts(its, 0.99, scores) == [7, 3]
    assert Lamp().counts(its, 0.99, scores) == [5, 5]  # equal within a layer: 1, 1/2, 1/3 … in both


# --- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", EXACT, ids=str)
@given(shapes=networks, sparsity=sparsities)
def test_the_sum_is_exactly_the_budget(allocation, shapes, sparsity):
    its = layers(*shapes)
    try:
        found = counts(allocation, its, sparsity)
    except ValueError as error:
        assume("would do" not in str(error))  # the two that fix a layer
        raise
    assert sum(found) == budget(its, sparsity)
    assert all(0 <= n <= layer.units for n, layer in zip(found, its, strict=True))


@pytest.mark.parametrize("allocation", ALL, ids=str)
def test_sparsity_zero_keeps_everything(allocation):
    if isinstance(allocation, PerLayer):
        allocation = PerLayer({"layer0": 0.0})
    assert counts(allocation, CNN, 0.0) == [layer.units for layer in CNN]


@pytest.mark.parametrize("allocation", [a for a in ALL if a != ErdosRenyiKernelPlus()], ids=str)
def test_one_layer(allocation):
    assert counts(allocation, layers((8, 8)), 0.5) == [32]


@pytest.mark.parametrize("allocation", [a for a in ALL if not isinstance(a, PerLayer)], ids=str)
def test_no_layers(allocation):
    assert counts(allocation, [], 0.5) == []


@pytest.mark.parametrize("allocation", [ErdosRenyi(), ErdosRenyiKernel(), Balanced(), Global(), Lamp()], ids=str)
def test_fewer_units_than_layers(allocation):
    its = layers(*[(2, 2)] * 10)
    found = counts(allocation, its, 0.9)
    assert sum(found) == 4
    assert set(found) <= {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "allocation", [ErdosRenyi(), ErdosRenyiKernel(), ErdosRenyiKernel(power=0.3), Balanced()], ids=str
)
@given(shapes=networks, sparsity=sparsities, more=sparsities)
def test_a_larger_budget_takes_from_nobody(allocation, shapes, sparsity, more):
    its = layers(*shapes)
    low, high = max(sparsity, more), min(sparsity, more)
    fewer, greater = allocation.ideal(its, low), allocation.ideal(its, high)
    assert all(a <= b for a, b in zip(fewer, greater, strict=True))


@pytest.mark.parametrize(
    "allocation", [ErdosRenyi(), ErdosRenyiKernel(), ErdosRenyiKernel(power=0.3), Balanced()], ids=str
)
@given(shapes=networks, sparsity=sparsities, data=st.data())
def test_the_order_of_layers_does_not_matter(allocation, shapes, sparsity, data):
    its = layers(*shapes)
    order = data.draw(st.permutations(range(len(its))))
    found, permuted = allocation.counts(its, sparsity), allocation.counts([its[i] for i in order], sparsity)
    ideal = allocation.ideal(its, sparsity)
    assert allocation.ideal([its[i] for i in order], sparsity) == [ideal[i] for i in order]
    for place, i in enumerate(order):  # only equal remainders are told apart by place
        tied = sum(ideal[i] % 1 == share % 1 for share in ideal) > 1
        assert permuted[place] == found[i] or tied


def test_units_are_those_of_the_pattern():
    its = [Layer("a.weight", (8, 4), 8, Channel()), Layer("b.weight", (4, 8), 4, Channel())]
    assert Uniform().counts(its, 0.5) == [4, 2]
    assert sum(ErdosRenyiKernel().counts(its, 0.5)) == 6


# --- floors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "within", [a for a in (*BY_SHAPE, *BY_SCORE) if not isinstance(a, UniformPlus | ErdosRenyiKernelPlus)], ids=str
)
@given(shapes=networks, sparsity=sparsities, floor=st.integers(0, 30), seed=st.integers(0, 9))
def test_floors_are_met_and_the_total_stays(within, shapes, sparsity, floor, seed):
    its = layers(*shapes)
    least = AtLeast(within, units=floor)
    floors = [min(floor, layer.units) for layer in its]
    bare = counts(within, its, sparsity, seed)
    assume(sum(floors) <= sum(bare))
    found = counts(least, its, sparsity, seed)
    assert sum(found) == sum(bare)
    assert all(m <= n <= layer.units for m, n, layer in zip(floors, found, its, strict=True))
    if all(m <= n for m, n in zip(floors, bare, strict=True)):
        assert found == bare


@given(shapes=networks, sparsity=st.sampled_from([0.9, 0.99, 0.995]), floor=st.integers(10, 30))
def test_floors_out_of_reach_say_what_would_work(shapes, sparsity, floor):
    its = layers(*shapes)
    scores = random_scores(its)
    needed = sum(min(floor, layer.units) for layer in its)
    assume(needed > budget(its, sparsity))
    with pytest.raises(ValueError, match=r"need .* units, but the budget is") as error:
        AtLeast("global", units=floor).counts(its, sparsity, scores)
    words = str(error.value).replace(";", "").split()
    fewer = int(next(w for w in words if w.startswith("units=") and w[6:].isdigit()).removeprefix("units="))
    denser = float(words[words.index("most") + 1])
    assert AtLeast("global", units=fewer).counts(its, sparsity, scores)
    assert AtLeast("global", units=floor).counts(its, denser, scores)


def test_the_floor_is_a_share_of_all_layers():
    its = layers((100, 100), (10, 10), (2, 2))  # 10 104 · .0005 = 5.05
    assert AtLeast("global").floors(its) == {0: 5, 1: 5, 2: 4}  # the last stays dense
    assert AtLeast("global", share=0.1).floors(its) == {0: 1010, 1: 100, 2: 4}


def test_an_idle_floor_changes_nothing():
    scores = random_scores(CNN)
    assert AtLeast(Global()).counts(CNN, 0.9, scores) == Global().counts(CNN, 0.9, scores)
    assert AtLeast(Uniform()).counts(CNN, 0.9) == Uniform().counts(CNN, 0.9)


def test_floors_nest():
    its = layers((1, 10), (10, 100), (10, 100))
    scores = [torch.full((10,), 9.0), torch.full((1000,), 0.1), torch.full((1000,), 0.2)]
    assert AtLeast(AtLeast(Global(), units=2), units=3).counts(its, 0.99, scores) == [10, 3, 7]


def test_a_floor_under_uniform_plus():
    found = AtLeast(UniformPlus(), units=400).counts(CNN, 0.9)
    assert found == [432, 400, 1179, 400]
    with pytest.raises(ValueError, match=r"a sparsity of at most .* would do"):
        AtLeast(UniformPlus(), units=450).counts(layers((8, 8, 3, 3), (50, 50), (50, 50)), 0.8)


def test_a_floor_is_given_once():
    with pytest.raises(ValueError, match="given twice"):
        AtLeast("global", share=0.01, units=5)


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allocation", "its", "sparsity"),
    [
        (UniformPlus(), CNN, 0.99),  # 241 of 432 + 128
        (UniformPlus(), layers((10, 100)), 0.9),  # 100 of 200
        (ErdosRenyiKernelPlus(), CNN, 0.99),  # 241 of 640
        (ErdosRenyiKernelPlus(), layers((8, 8)), 0.5),  # 32 of 64
    ],
)
def test_a_budget_too_small_says_what_would_work(allocation, its, sparsity):
    with pytest.raises(ValueError, match="a sparsity of at most") as error:
        allocation.counts(its, sparsity)
    words = str(error.value).split()
    highest = float(words[words.index("most") + 1])
    assert sum(allocation.counts(its, highest)) == budget(its, highest)


def test_a_budget_too_large_says_what_would_work():
    allocation = ErdosRenyiKernelPlus(last=0.5)
    with pytest.raises(ValueError, match=r"can take no more than 23472; a sparsity of at least 0.0133 would do"):
        allocation.counts(CNN, 0.0)
    assert allocation.counts(CNN, 0.0133)[-1] == 320


@pytest.mark.parametrize("allocation", ALL, ids=str)
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan])
def test_impossible_sparsities(allocation, sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        counts(allocation, CNN, sparsity)


@pytest.mark.parametrize("allocation", ALL, ids=str)
def test_layers_with_a_count_of_their_own_are_left_out(allocation):
    its = [Layer("fc.weight", (8, 8), 32, NM(2, 4))]
    with pytest.raises(ValueError, match=r"'fc\.weight' has the pattern 2:4"):
        counts(allocation, its, 0.5)


# --- as values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ALL, ids=str)
def test_round_trip(allocation):
    again = from_dict(json.loads(json.dumps(allocation.to_dict())))
    assert again == allocation
    assert parse_allocation(allocation.to_dict()) == parse_allocation(allocation) == allocation
    assert hash(again) == hash(allocation)


def test_shorthand():
    names = ["uniform", "uniform_plus", "erdos_renyi", "erdos_renyi_kernel", "erdos_renyi_kernel_plus", "balanced"]
    names += ["global", "lamp"]
    found = [type(parse_allocation(name)).__name__ for name in names]
    assert found == [name.title().replace("_", "") for name in names]
    assert parse_allocation({"head": 0.5}) == PerLayer({"head": 0.5})
    assert AtLeast("lamp") == AtLeast(Lamp())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ("erdos_reny", "did you mean 'erdos_renyi'"),
        (0.5, "is not an allocation"),
        (None, "is not an allocation"),
        ({"kind": "Unstructured"}, "is not an allocation"),
        ({"kind": "ErdosReny"}, "did you mean 'ErdosRenyi'"),
    ],
)
def test_what_is_no_allocation_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        parse_allocation(x)
    with pytest.raises(ValueError, match=message):
        AtLeast(x)
