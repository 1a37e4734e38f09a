import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layer_lists import CNN, budget, counts, layers, networks, random_scores, sparsities
from rarefy.axes.allocation import AtLeast, Global, Lamp, lamp_scores


def test_lamp_vectors():
    assert lamp_scores(torch.tensor([1.0, -2.0, 3.0, -4.0])).tolist() == pytest.approx([1 / 30, 4 / 29, 9 / 25, 1])
    assert lamp_scores(torch.tensor([0.1, 0.2, 0.3])).tolist() == pytest.approx([0.0714, 0.3077, 1.0], abs=5e-5)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=12))
def test_lamp_is_the_double_loop(weights):
    order = sorted(range(len(weights)), key=lambda i: (weights[i] ** 2, -i))  # of equal weights the first is the best
    expected = [0.0] * len(weights)
    for place, u in enumerate(order):
        rest = sum(weights[v] ** 2 for v in order[place:])
        expected[u] = weights[u] ** 2 / rest if rest else 0.0
    assert lamp_scores(torch.tensor(weights, dtype=torch.float32)).tolist() == expected


@given(networks, sparsities, st.integers(0, 99))
def test_global_is_one_sort(shapes, sparsity, seed):
    its = layers(*shapes)
    scores = [(its_scores * 8).floor() for its_scores in random_scores(its, seed)]  # many ties
    ranked = sorted((-s, i, j) for i, its_scores in enumerate(scores) for j, s in enumerate(its_scores.tolist()))
    best = [i for _, i, _ in ranked[: budget(its, sparsity)]]
    assert Global().counts(its, sparsity, scores) == [best.count(i) for i in range(len(its))]


@pytest.mark.parametrize("allocation", [Global(), Lamp()], ids=str)
@given(shapes=networks, sparsity=sparsities, data=st.data())
def test_the_order_of_layers_does_not_matter_to_scores(allocation, shapes, sparsity, data):
    its = layers(*shapes)
    order = data.draw(st.permutations(range(len(its))))
    scores = random_scores(its)
    found = allocation.counts(its, sparsity, scores)
    permuted = allocation.counts([its[i] for i in order], sparsity, [scores[i] for i in order])
    # LAMP gives every layer's best the same score, 1
    assert sum(found) == sum(permuted)
    assert all(abs(n - found[i]) <= (allocation == Lamp()) for n, i in zip(permuted, order, strict=True))


@given(shapes=networks, sparsity=sparsities, seed=st.integers(0, 99))
def test_lamp_empties_no_layer_before_its_time(shapes, sparsity, seed):
    its = layers(*shapes)
    found = counts(Lamp(), its, sparsity, seed)
    if sum(found) >= len(its):
        assert min(found) >= 1
    else:
        assert max(found) <= 1


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-300, 1e-30, 1.0, 1e30, 1e300]))
def test_lamp_does_not_depend_on_a_layers_scale(seed, scale):
    scores = random_scores(CNN, seed)
    scaled = [scores[0] * scale, *scores[1:]]
    assert Lamp().counts(CNN, 0.9, scaled) == pytest.approx(Lamp().counts(CNN, 0.9, scores), abs=1)


def test_lamp_counts_follow_its_scores():
    scores = random_scores(CNN)
    assert Lamp().counts(CNN, 0.9, scores) == Global().counts(CNN, 0.9, [lamp_scores(s) for s in scores])


def test_a_layer_of_zeros_is_worth_nothing_to_lamp():
    its = layers((2, 2), (2, 2))
    assert Lamp().counts(its, 0.5, [torch.zeros(4), torch.ones(4)]) == [0, 4]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "needs one tensor for each of 2 layers, got none"),
        ([torch.ones(4)], "got 1 tensors"),
        ([torch.ones(4), torch.ones(2, 2)], r"'layer1.weight' have shape \(2, 2\).*shape \(4,\)"),
        ([torch.ones(4), torch.tensor([1.0, math.nan, 1.0, 1.0])], "'layer1.weight' are NaN or infinite"),
        ([torch.ones(4), torch.tensor([1.0, -math.inf, 1.0, 1.0])], "'layer1.weight' are NaN or infinite"),
    ],
)
@pytest.mark.parametrize("allocation", [Global(), Lamp(), AtLeast("global"), AtLeast("lamp")], ids=str)
def test_scores_that_do_not_fit(allocation, scores, message):
    with pytest.raises(ValueError, match=message):
        allocation.counts(layers((2, 2), (2, 2)), 0.5, scores)


def test_lamp_wants_no_negative_scores():
    its, scores = layers((2, 2)), [torch.tensor([1.0, -1.0, 1.0, 1.0])]
    assert Global().counts(its, 0.5, scores) == [2]
    for allocation in (Lamp(), AtLeast(Lamp())):
        with pytest.raises(ValueError, match=r"'layer0\.weight' has negative scores"):
            allocation.counts(its, 0.5, scores)


def test_scores_of_several_dtypes_compete():
    its = layers((1, 2), (1, 2))
    scores = [torch.tensor([1.0, 3.0], dtype=torch.bfloat16), torch.tensor([2.0, 4.0], dtype=torch.float64)]
    assert Global().counts(its, 0.5, scores) == [1, 1]
