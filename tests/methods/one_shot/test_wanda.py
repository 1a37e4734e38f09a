"""Wanda's masks by hand, and what leaves them unchanged."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.one_shot.layers import correlated, gaussian, matrix, statistics
from rarefy.axes import NM, Block, Channel, ConstantFanIn, Unstructured, count, top_k
from rarefy.core.method import method_from_dict
from rarefy.methods.one_shot.matrix import choose_mask, largest, layer_error, quota
from rarefy.methods.one_shot.wanda import Wanda, wanda_scores

W = torch.tensor([[4, -1, 2, -3], [1, 1, -2, 0.5]], dtype=torch.float64)
NORMS = torch.tensor([0.1, 2, 1, 0.5], dtype=torch.float64)


def test_the_handbooks_matrix():
    scores = wanda_scores(W, NORMS.square())
    torch.testing.assert_close(scores, torch.tensor([[0.4, 2, 2, 1.5], [0.1, 2, 2, 0.25]], dtype=torch.float64))
    mask = choose_mask(scores, Unstructured(), 4, Fraction(1, 2), "row")
    assert (W * mask).tolist() == [[0, -1, 2, 0], [0, 1, -2, 0]]
    by_magnitude = choose_mask(W.abs(), Unstructured(), 4, Fraction(1, 2), "row")
    assert (W * by_magnitude).tolist() == [[4, 0, 0, -3], [1, 0, -2, 0]]  # of the tied 1 and 1, the first


def test_rows_keep_our_rounding():
    scores = gaussian(7, 96).abs()
    assert choose_mask(scores, Unstructured(), 0, Fraction("0.6"), "row").sum(1).tolist() == [38] * 7  # 58 zeros
    assert quota(Fraction("0.6"), 96) == 38


def test_a_constant_factor_and_a_rescaled_feature_change_nothing():
    x, weight = correlated(300, 32), gaussian(16, 32)
    made = matrix(weight, x, 0.5)
    mask = Wanda(0.5).solve(made).mask
    assert torch.equal(Wanda(0.5).solve(matrix(weight, 7 * x, 0.5)).mask, mask)
    scale = torch.ones(32, dtype=torch.float64)
    scale[[3, 11]] = 32.0  # powers of two: the products are the same to the last bit
    rescaled = matrix(weight / scale, x * scale, 0.5)
    assert torch.equal(Wanda(0.5).solve(rescaled).mask, mask)
    magnitude = choose_mask(weight.abs(), Unstructured(), 256, Fraction(1, 2))
    degraded = choose_mask((weight / scale).abs(), Unstructured(), 256, Fraction(1, 2))
    gram = x.t() @ x
    assert layer_error(weight, weight * degraded, gram) > layer_error(weight, weight * magnitude, gram)


@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize(
    "pattern", [Unstructured(), NM(1, 3), NM(2, 4), Block(4, 1), Block(2, 3), ConstantFanIn(), Channel()]
)
def test_patterns_are_legal_and_exact(pattern, group):
    weight, x = gaussian(18, 50), correlated(100, 50)
    made = matrix(weight, x, 0.6, pattern)
    mask = Wanda(0.6, pattern=str(pattern), group=group).solve(made).mask
    assert pattern.legal(mask)
    kept = int(pattern.gather(mask).sum())
    if group == "layer" or isinstance(pattern, NM | ConstantFanIn | Channel):
        assert kept == pattern.asked((18, 50), 0.6)
    elif isinstance(pattern, Block):
        bands, tiles = math.ceil(18 / pattern.rows), math.ceil(50 / pattern.columns)
        assert pattern.gather(mask).view(bands, tiles).sum(1).tolist() == [quota(Fraction("0.6"), tiles)] * bands
    else:
        assert mask.sum(1).tolist() == [20] * 18


def test_groups_of_n_m_stay_within_a_line():
    scores = torch.tensor([[1.0, 2.0, 3.0, 9.0, 8.0, 7.0]])
    assert choose_mask(scores, NM(1, 2), 0, Fraction(0), line=3).int().tolist() == [[0, 1, 1, 1, 0, 1]]


@given(st.integers(1, 400), st.floats(0, 1), st.integers(0, 5), st.integers(1, 200))
def test_largest_is_top_k(length: int, share: float, seed: int, values: int):
    """Ties too: few different values."""
    scores = torch.from_numpy(np.random.default_rng(seed).integers(0, values, length).astype(np.float32))
    assert torch.equal(largest(scores, int(share * length)), top_k(scores, int(share * length)))


@pytest.mark.parametrize("k", [0, 1, 5_000, 50_000, 99_999, 100_000])
@pytest.mark.parametrize("kind", ["gaussian", "ties", "one column counts"])
def test_largest_of_many_is_top_k(k: int, kind: str):
    scores = gaussian(1, 100_000)[0].float()
    if kind == "ties":
        scores = (scores * 2).round()
    elif kind == "one column counts":  # what a sample of every n-th may never see
        scores = torch.where(torch.arange(100_000) % 24 == 7, 1e6, 1.0) * scores
    assert torch.equal(largest(scores, k), top_k(scores, k))


def test_statistics_are_all_that_is_read():
    seen = statistics(correlated(64, 8))
    assert wanda_scores(torch.ones(2, 8), seen.squares).dtype == torch.float32


def test_values():
    method = Wanda(0.7, "owl", "4x1", group="layer")
    assert method_from_dict(method.to_dict()) == method
    with pytest.raises(ValueError, match=r'compares the scores of all layers.*use "uniform", "owl"'):
        Wanda(0.5, "global")
    with pytest.raises(ValueError, match="group must be 'row' or 'layer'"):
        Wanda(0.5, group="column")


def test_the_sum_over_rows_is_remembered_as_it_is():
    assert count(0.5, 3 * 5) == 8
    mask = Wanda(0.5).solve(matrix(gaussian(3, 5), correlated(20, 5), 0.5)).mask
    assert mask.sum(1).tolist() == [3, 3, 3]
