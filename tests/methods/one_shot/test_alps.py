"""ALPS: closed forms, and that it beats what it starts from."""

from fractions import Fraction

import pytest
import torch

from methods.one_shot.layers import correlated, gaussian, matrix
from rarefy.axes import NM, Block, ConstantFanIn, Unstructured, top_k
from rarefy.core.method import method_from_dict
from rarefy.methods.one_shot.alps import ALPS, _Penalty, _solver, alps, scale
from rarefy.methods.one_shot.matrix import choose_mask, layer_error
from rarefy.methods.one_shot.refit import refit
from rarefy.methods.one_shot.sparse_gpt import sparse_gpt
from rarefy.methods.one_shot.wanda import wanda_scores


def half(scores: torch.Tensor) -> torch.Tensor:
    return top_k(scores, scores.numel() // 2)


def test_white_inputs_keep_values_and_take_magnitudes_support():
    weight = gaussian(16, 32)
    mask, new = alps(weight, 3.0 * torch.eye(32, dtype=torch.float64), half)
    assert torch.equal(mask, half(weight.abs()))  # ADMM's own support is near, and worse
    torch.testing.assert_close(new, weight * mask, rtol=1e-14, atol=0)


def test_independent_inputs_start_from_wandas_support_over_the_layer():
    weight, norms = gaussian(16, 32), torch.rand(32, dtype=torch.float64) + 0.1
    gram = torch.diag(norms.square())
    mask, new = alps(weight, gram, half, damping=0.0)
    assert torch.equal(mask, half(wanda_scores(weight, gram.diagonal())))
    torch.testing.assert_close(new, weight * mask)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_errors_are_in_the_handbooks_order(sparsity: float):
    x, weight = correlated(2000, 64, rank=16), gaussian(32, 64)
    made = matrix(weight, x, sparsity)
    gram = made.gram
    mask, updated = sparse_gpt(weight, gram, made.pattern, made.keep)
    solved = ALPS(sparsity).solve(made)
    assert int(solved.mask.sum()) == made.keep
    assert solved.weight is not None
    assert not solved.weight[~solved.mask].any()
    ours = layer_error(weight, solved.weight, gram)
    assert ours < layer_error(weight, refit(weight, mask, gram), gram) < layer_error(weight, updated, gram)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(1, 3), Block(4, 1), ConstantFanIn()])
def test_patterns_are_legal_and_better_than_the_start(pattern):
    x, weight = correlated(500, 50), gaussian(18, 50)
    made = matrix(weight, x, 0.6, pattern)
    solved = ALPS(0.6, pattern=str(pattern)).solve(made)
    assert pattern.legal(solved.mask)
    assert int(pattern.gather(solved.mask).sum()) == made.keep
    start = choose_mask(wanda_scores(weight, made.gram.diagonal()), pattern, made.keep, Fraction("0.6"))
    bare = layer_error(weight, weight * start, made.gram)
    assert solved.weight is not None
    assert layer_error(weight, solved.weight, made.gram) < bare


def test_few_rows_take_two_products_and_find_the_same():
    x, weight = correlated(500, 64), gaussian(40, 64)
    gram = x.t() @ x
    made = scale(gram)
    right = gaussian(40, 64, seed=2)
    exact = torch.linalg.solve(made.matrix + 0.3 * torch.eye(64, dtype=torch.float64), right, left=False)
    torch.testing.assert_close(_solver(made, 0.3, 40)(right), exact)
    torch.testing.assert_close(_solver(made, 0.3, 4)(right), exact)
    assert alps(weight[:4], gram, half)[0].sum() == 128


def test_the_penalty_follows_the_support():
    penalty = _Penalty(0.1)
    assert penalty.restarts(4, 1000)  # still, but not yet settled: begin anew, softer
    assert penalty.rho == pytest.approx(0.02)
    assert not penalty.restarts(0, 1000)
    assert penalty.rho == pytest.approx(0.004)
    assert not penalty.restarts(200, 1000)
    assert penalty.rho == pytest.approx(0.0052)
    assert not penalty.restarts(50, 1000)
    assert penalty.rho == pytest.approx(0.00624)
    assert not penalty.restarts(1, 1000)
    assert penalty.rho == pytest.approx(0.006864)
    assert not penalty.stop
    penalty.restarts(0, 1000)
    assert penalty.stop


def test_in_float32_and_with_dead_inputs():
    x, weight = correlated(300, 48).float(), gaussian(12, 48).float()
    x[:, 7] = 0
    mask, new = alps(weight, x.t() @ x, half)
    assert int(mask.sum()) == 288
    assert new.dtype == torch.float32
    assert new.isfinite().all()


def test_inputs_that_overflowed_are_refused():
    with pytest.raises(ValueError, match=r"'up'.*not finite"):
        scale(torch.full((2, 2), torch.inf), name="up")


def test_values():
    assert method_from_dict(ALPS(0.7, pattern="4:8").to_dict()) == ALPS(0.7, pattern="4:8")
