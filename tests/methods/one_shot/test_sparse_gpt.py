"""SparseGPT against a literal loop that inverts the Hessian anew at every column."""

import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.one_shot.layers import correlated, gaussian, matrix, sequential_obs
from rarefy.axes import NM, Block, Channel, ConstantFanIn, Unstructured, count, top_k
from rarefy.methods.one_shot.matrix import choose_mask, layer_error, row_errors
from rarefy.methods.one_shot.sparse_gpt import SparseGPT, factorize, sparse_gpt
from rarefy.methods.one_shot.wanda import wanda_scores

TWO = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def damped(x: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    hessian = x.t() @ x
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def test_the_handbooks_two_columns():
    factor = factorize(TWO, damping=0.0)
    upper = torch.linalg.inv(factor.unit * factor.diagonal)  # U = R⁻¹
    torch.testing.assert_close(
        upper, torch.tensor([[math.sqrt(2 / 3), -math.sqrt(1 / 6)], [0.0, math.sqrt(0.5)]], dtype=torch.float64)
    )
    weight = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(weight**2 * factor.diagonal**2, torch.tensor([[1.5, 8.0]], dtype=torch.float64))
    mask, new = sparse_gpt(weight, factor, Unstructured(), keep=1)
    assert mask.tolist() == [[False, True]]
    torch.testing.assert_close(new, torch.tensor([[0.0, 2.5]], dtype=torch.float64))


def test_white_inputs_make_it_magnitude_block_by_block():
    weight = gaussian(12, 40)
    mask, new = sparse_gpt(weight, torch.eye(40, dtype=torch.float64), Unstructured(), 240, block_size=16)
    for start, stop in ((0, 16), (16, 32), (32, 40)):
        part = weight[:, start:stop].abs()
        assert torch.equal(mask[:, start:stop], choose_mask(part, Unstructured(), part.numel() // 2, Fraction(1, 2)))
    assert torch.equal(new, weight * mask)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize(("width", "block"), [(32, 128), (50, 16), (61, 7)])
def test_unstructured_is_the_literal_loop(sparsity: float, width: int, block: int):
    x, weight = correlated(200, width), gaussian(24, width, seed=1)
    mask, new = sequential_obs(weight, damped(x), sparsity, block)
    keep = count(sparsity, weight.numel())
    ours, values = sparse_gpt(weight, x.t() @ x, Unstructured(), keep, Fraction(str(sparsity)), block_size=block)
    assert torch.equal(ours, mask)
    assert (values - new).abs().max() < 1e-9
    assert int(ours.sum()) == keep


@pytest.mark.parametrize(
    ("n", "m", "width"), [(2, 4, 32), (2, 4, 30), (1, 3, 32), (3, 7, 40), (4, 8, 48), (20, 40, 96)]
)
@pytest.mark.parametrize("block", [8, 128])
def test_n_m_is_the_literal_loop_whatever_the_block(n: int, m: int, width: int, block: int):
    x, weight = correlated(200, width), gaussian(24, width, seed=1)
    mask, new = sequential_obs(weight, damped(x), 0.0, group=(n, m))
    ours, values = sparse_gpt(weight, x.t() @ x, NM(n, m), block_size=block)
    assert torch.equal(ours, mask)
    assert (values - new).abs().max() < 1e-9
    assert NM(n, m).legal(ours)


@pytest.mark.parametrize("block", [1, 5, 16, 64, 128])
def test_a_given_mask_makes_the_block_size_irrelevant(block: int):
    x, weight = correlated(300, 64), gaussian(20, 64)
    mask = gaussian(20, 64, seed=2) > 0
    gram = x.t() @ x
    _, once = sparse_gpt(weight, gram, Unstructured(), mask=mask, block_size=64)
    same, other = sparse_gpt(weight, gram, Unstructured(), mask=mask, block_size=block)
    assert torch.equal(same, mask)
    assert (once - other).abs().max() < 1e-12


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([0.0, 0.3, 0.5, 0.65, 0.9]), st.integers(1, 17))
def test_counts_are_exact_after_every_block(rows: int, width: int, sparsity: float, block: int):
    weight, x = gaussian(rows, width), correlated(60, width)
    made = matrix(weight, x, sparsity)
    solved = SparseGPT(sparsity, block_size=block).solve(made)
    for stop in [*range(block, width, block), width]:
        assert int(solved.mask[:, :stop].sum()) == count(sparsity, rows * stop)
    assert solved.weight is not None
    assert not solved.weight[~solved.mask].any()


@pytest.mark.parametrize("pattern", [Block(4, 1), Block(1, 4), Block(3, 5), ConstantFanIn()])
def test_other_patterns_are_legal_and_exact(pattern):
    weight, x = gaussian(18, 50), correlated(200, 50)
    made = matrix(weight, x, 0.6, pattern)
    solved = SparseGPT(0.6, pattern=str(pattern), block_size=16).solve(made)
    assert pattern.legal(solved.mask)
    assert int(pattern.gather(solved.mask).sum()) == made.keep
    bare = layer_error(weight, weight * solved.mask, made.gram)
    assert solved.weight is not None
    assert layer_error(weight, solved.weight, made.gram) < bare


def test_channels_go_by_their_whole_error():
    weight, x = gaussian(18, 50), correlated(200, 50)
    solved = SparseGPT(0.5, pattern="channel").solve(matrix(weight, x, 0.5, Channel()))
    errors = row_errors(weight, torch.zeros_like(weight), damped(x))
    assert torch.equal(solved.mask[:, 0], top_k(errors, 9))
    assert solved.weight is not None
    assert torch.equal(solved.weight, weight * solved.mask)


def test_errors_are_in_the_handbooks_order():
    x, weight = correlated(2000, 64, rank=16), gaussian(32, 64)
    gram = x.t() @ x
    half = weight.numel() // 2
    mask, new = sparse_gpt(weight, gram, Unstructured(), half)

    def bare(scores: torch.Tensor) -> float:
        return layer_error(weight, weight * choose_mask(scores, Unstructured(), half, Fraction(1, 2)), gram)

    without_update = layer_error(weight, weight * mask, gram)
    magnitude, wanda = bare(weight.abs()), bare(wanda_scores(weight, gram.diagonal()))
    sparse = layer_error(weight, new, gram)
    assert without_update > magnitude > wanda > sparse


def test_a_dead_input_is_dropped_first_and_kept_as_it_is():
    x, weight = correlated(100, 8), gaussian(4, 8) + 5
    x[:, 3] = 0
    mask, _ = sparse_gpt(weight, x.t() @ x, Unstructured(), 28)
    assert not mask[:, 3].any()
    _, new = sparse_gpt(weight, x.t() @ x, Unstructured(), mask=torch.ones(4, 8, dtype=torch.bool))
    assert torch.equal(new, weight)


def test_a_singular_hessian_is_damped_with_a_warning_that_names_the_site():
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    weight = gaussian(4, 64).float()
    with pytest.warns(UserWarning, match=r"'layers\.3\.up'.*not positive definite in torch\.float32"):
        mask, new = sparse_gpt(weight, x.t() @ x, Unstructured(), 128, damping=0.0, name="layers.3.up")
    assert int(mask.sum()) == 128
    assert new.isfinite().all()
    assert new.dtype == torch.float32


def test_float64_is_tried_before_more_damping():
    basis = torch.linalg.qr(gaussian(48, 48))[0]
    gram = (basis * torch.logspace(0, -9, 48, dtype=torch.float64)) @ basis.t()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factorize(gram, damping=0.0)
    with pytest.warns(UserWarning, match=r"solved in torch\.float64 with damping"):
        factorize(gram.float(), damping=0.0)


def test_inputs_that_overflowed_are_refused():
    with pytest.raises(ValueError, match=r"'up'.*not finite"):
        factorize(torch.full((2, 2), math.inf), name="up")


def test_matrices_with_the_same_inputs_share_one_factor():
    x = correlated(100, 12)
    one = matrix(gaussian(4, 12), x, 0.5)
    other = matrix(gaussian(6, 12), x, 0.5, shared=one.shared)
    SparseGPT(0.5).solve(one)
    (factor,) = one.shared.values()
    SparseGPT(0.5).solve(other)
    assert list(other.shared.values()) == [factor]
