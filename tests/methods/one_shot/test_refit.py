"""Refit: least squares on a mask, by factors of each row and by conjugate gradients for all."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rarefy
from methods.one_shot.layers import correlated, gaussian, matrix
from rarefy.core.method import method_from_dict
from rarefy.methods.one_shot.dsnot import DSnoT
from rarefy.methods.one_shot.magnitude import Magnitude
from rarefy.methods.one_shot.matrix import layer_error, row_errors
from rarefy.methods.one_shot.refit import Refit, conjugate, leading, refit
from rarefy.methods.one_shot.sparse_gpt import SparseGPT, sparse_gpt
from rarefy.methods.one_shot.wanda import Wanda

EXACT = [True, False]


def random_mask(rows: int, width: int, share: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < share


def closed_form(weight, mask, gram, damping):
    """w_S = (G_SS)⁻¹ (G w₀)_S, row by row."""
    g = (gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)).numpy()
    new = np.zeros(weight.shape)
    for row, (w, m) in enumerate(zip(weight.numpy(), mask.numpy(), strict=True)):
        new[row, m] = np.linalg.solve(g[np.ix_(m, m)], (g @ w)[m])
    return torch.from_numpy(new)


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize(("width", "tokens"), [(24, 200), (128, 600), (130, 60)])
def test_it_is_the_closed_form(exact: bool, width: int, tokens: int):
    x, weight = correlated(tokens, width), gaussian(20, width)
    gram, mask = x.t() @ x, random_mask(20, width, 0.5)
    mask[3], mask[4] = False, True
    new = refit(weight, mask, gram, 0.01, exact=exact, tolerance=1e-12)
    torch.testing.assert_close(new, closed_form(weight, mask, gram, 0.01), rtol=1e-7, atol=1e-8)
    assert not new[~mask].any()
    torch.testing.assert_close(new[4], weight[4])


@pytest.mark.parametrize("exact", EXACT)
def test_without_damping_it_is_least_squares(exact: bool):
    x, weight = correlated(300, 40), gaussian(9, 40)
    mask = random_mask(9, 40, 0.4)
    new = refit(weight, mask, x.t() @ x, 0.0, exact=exact, tolerance=1e-12)
    for row in range(9):
        kept = mask[row].numpy()
        solution = np.linalg.lstsq(x.numpy()[:, kept], x.numpy() @ weight[row].numpy(), rcond=None)[0]
        np.testing.assert_allclose(new[row].numpy()[kept], solution, rtol=1e-6, atol=1e-7)


@given(
    st.integers(1, 8),
    st.integers(1, 70),
    st.integers(1, 80),
    st.floats(0, 1),
    st.sampled_from(EXACT),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.integers(0, 9),
)
def test_it_is_never_worse_than_its_mask(rows, width, tokens, share, exact, damping, seed):
    x, weight = correlated(tokens, width, seed=seed), gaussian(rows, width, seed=seed)
    gram, mask = x.t() @ x, random_mask(rows, width, share, seed)
    new = refit(weight, mask, gram, damping, exact=exact)
    bare, ours = row_errors(weight, weight * mask, gram), row_errors(weight, new, gram)
    ridge = damping * gram.diagonal().mean()
    bound = bare - ridge * ((new - weight) * mask).square().sum(1)
    scale = 1e-9 * row_errors(weight, torch.zeros_like(weight), gram) + 1e-12
    assert bool((ours <= bound + scale).all())


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_stopped_early_it_is_not_worse_either(steps: int):
    x, weight = correlated(500, 128), gaussian(30, 128)
    gram, mask = x.t() @ x, random_mask(30, 128, 0.5)
    before = layer_error(weight, weight * mask, gram)
    new = conjugate(weight, mask, gram, 0.1, steps=steps, basis=leading(gram, 0.1, 4))
    assert layer_error(weight, new, gram) <= before * (1 + 1e-12)


def test_in_float32_it_comes_close_enough():
    x, weight = correlated(2000, 256, rank=32), gaussian(64, 256)
    gram, mask = x.t() @ x, random_mask(64, 256, 0.5)
    best = layer_error(weight, closed_form(weight, mask, gram, 0.01), gram)
    ours = refit(weight.float(), mask, gram.float(), 0.01, exact=False)
    assert layer_error(weight, ours.double(), gram) < 1.001 * best


def test_it_improves_on_sparse_gpt_on_the_same_mask():
    x, weight = correlated(2000, 64, rank=16), gaussian(32, 64)
    made = matrix(weight, x, 0.5)
    mask, updated = sparse_gpt(weight, made.gram, made.pattern, made.keep)
    solved = Refit(SparseGPT(0.5)).solve(made)
    assert torch.equal(solved.mask, mask)
    assert solved.weight is not None
    assert layer_error(weight, solved.weight, made.gram) < layer_error(weight, updated, made.gram)


def test_values():
    for method in (Refit(Wanda(0.5)), Refit(Magnitude(0.5, "uniform"), damping=0.1), Refit(DSnoT(Wanda(0.7)))):
        assert method_from_dict(method.to_dict()) == method
    assert str(Refit(Wanda(pattern="2:4")).pattern) == "2:4"
    with pytest.raises(ValueError, match="needs gradients"):
        Refit(rarefy.SNIP(0.5))
    with pytest.raises(ValueError, match="does not choose masks at once"):
        Refit(rarefy.RigL(0.5))
    with pytest.raises(ValueError, match="method"):
        Refit("wanda")
