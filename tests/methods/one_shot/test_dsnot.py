"""DSnoT: the worked step, exact counts, and what it is for."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.one_shot.layers import correlated, gaussian, matrix, statistics
from rarefy.axes import NM, Unstructured
from rarefy.core.capture.statistics import Statistics
from rarefy.core.method import method_from_dict
from rarefy.methods.one_shot.dsnot import DSnoT, dsnot
from rarefy.methods.one_shot.magnitude import Magnitude
from rarefy.methods.one_shot.matrix import choose_mask
from rarefy.methods.one_shot.sparse_gpt import SparseGPT
from rarefy.methods.one_shot.wanda import Wanda, wanda_scores

W = torch.tensor([[2, -1, 0.5, 3, -0.4, 0.2]], dtype=torch.float64)
MU = torch.tensor([0.5, 1, -2, 0.1, 0.3, 1], dtype=torch.float64)
NORMS = torch.tensor([0.6, 1.2, 2.1, 0.3, 0.5, 1.1], dtype=torch.float64)
ONE_SEQUENCE = Statistics(2048, 1, NORMS.square(), MU.clone(), torch.full((6,), 2048.0, dtype=torch.float64))


def handbook_mask() -> torch.Tensor:
    scores = wanda_scores(W, NORMS.square())
    torch.testing.assert_close(scores, torch.tensor([[1.2, 1.2, 1.05, 0.9, 0.2, 0.22]], dtype=torch.float64))
    mask = torch.ones(1, 6, dtype=torch.bool).scatter(1, scores.argsort()[:, :3], False)
    assert mask.tolist() == [[True, True, True, False, False, False]]
    return mask


def test_the_handbooks_step():
    """ε = .3 − .12 + .2 = .38: grow 3 (D = .3), drop 2 (kept, D < 0, least Wanda score); ε = −.92."""
    mask = dsnot(W, handbook_mask(), ONE_SEQUENCE, faithful=True, cycles=1)
    assert mask.tolist() == [[True, True, False, True, False, False]]


def test_with_the_sign_test_the_handbooks_step_is_not_made():
    assert torch.equal(dsnot(W, handbook_mask(), ONE_SEQUENCE, cycles=1), handbook_mask())


def literal(weight, mask, mean, variance, scores, cycles, threshold):
    """The default loop, one row and one exchange at a time."""
    mask = mask.clone()
    change = weight * mean
    for r in range(len(weight)):
        d, error = change[r], float(change[r][~mask[r]].sum())
        pruned, kept = (~mask[r]).nonzero()[:, 0].tolist(), mask[r].nonzero()[:, 0].tolist()
        for _ in range(cycles):
            if abs(error) <= threshold:
                break
            sign = 1 if error > 0 else -1
            grow = [c for c in pruned if sign * d[c] > 0]
            drop = [c for c in kept if sign * d[c] < 0]
            if not grow or not drop:
                break
            g = max(grow, key=lambda c: (float(sign * d[c] / variance[c]), -c))
            p = min(drop, key=lambda c: (float(scores[r, c]), c))
            after = error + float(d[p]) - float(d[g])
            if after * sign <= 0:
                break
            error = after
            pruned.remove(g)
            kept.remove(p)
            mask[r, g], mask[r, p] = True, False
    return mask


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_it_is_the_loop_row_by_row(sparsity: float):
    x = correlated(256, 80) + 0.5
    weight, seen = gaussian(16, 80), statistics(x, sequences=8)
    scores = wanda_scores(weight, seen.squares)
    mask = choose_mask(weight.abs(), Unstructured(), int(16 * 80 * (1 - sparsity)), Fraction(0))  # any mask will do
    mean, variance = seen.sums / 256 * 2048, seen.within / 256
    refined = dsnot(weight, mask, seen, cycles=4)
    assert torch.equal(refined, literal(weight, mask, mean, variance, scores, 4, 0.1))
    assert not torch.equal(refined, mask)


def expected_error(weight, mask, seen):
    return (weight * seen.sums / seen.tokens).masked_fill(mask, 0.0).sum(1).abs()


@given(
    st.integers(1, 6), st.integers(1, 60), st.floats(0, 1), st.integers(0, 9), st.booleans(),
    st.sampled_from(["unstructured", "2:4", "1:3"]),
)  # fmt: skip
def test_counts_are_exact_whatever_happens(rows, width, share, seed, faithful, kind):
    x = correlated(40, width, seed=seed) + 0.3
    weight, seen = gaussian(rows, width, seed), statistics(x, 4)
    pattern = Unstructured() if kind == "unstructured" else NM(int(kind[0]), int(kind[2]))
    scores = wanda_scores(weight, seen.squares)
    mask = choose_mask(scores, pattern, int(share * rows * width), Fraction(0)) if rows else None
    refined = dsnot(weight, mask, seen, pattern, faithful=faithful, threshold=0.0)
    assert torch.equal(refined.sum(1), mask.sum(1))
    if isinstance(pattern, NM):
        assert pattern.legal(refined)
    if not faithful:
        before, after = expected_error(weight, mask, seen), expected_error(weight, refined, seen)
        assert bool((after <= before + 1e-9 * before.max()).all()) or isinstance(pattern, NM)


def test_the_threshold_belongs_to_sequences_of_2048_tokens():
    x = correlated(512, 40) + 0.5
    weight, mask = gaussian(8, 40), gaussian(8, 40, seed=3) > 0
    masks = [dsnot(weight, mask, statistics(x, n), threshold=20.0, cycles=2) for n in (1, 2)]
    assert torch.equal(masks[0], masks[1])  # however the tokens are cut into sequences


def test_constant_and_dead_inputs():
    x = correlated(64, 12) + 0.5
    x[:, 2], x[:, 5] = 3.0, 0.0
    weight, mask = gaussian(8, 12), gaussian(8, 12, seed=1) > 0
    refined = dsnot(weight, mask, statistics(x, 4))
    assert torch.equal(refined.sum(1), mask.sum(1))
    constant = torch.ones(64, 12, dtype=torch.float64)
    assert torch.equal(dsnot(weight, mask, statistics(constant, 4)).sum(1), mask.sum(1))


def test_n_m_on_lines_of_a_convolution():
    x = correlated(64, 18) + 0.5
    weight, seen = gaussian(8, 18), statistics(x, 4)
    mask = choose_mask(weight.abs(), NM(2, 4), 0, Fraction(0), line=6)
    refined = dsnot(weight, mask, seen, NM(2, 4), line=6, threshold=0.0)
    assert NM(2, 4).legal(refined.view(-1, 6))
    assert not torch.equal(refined, mask)


def test_the_method_refines_and_leaves_weights():
    made = matrix(gaussian(16, 80), correlated(256, 80) + 0.5, 0.5)
    method = DSnoT(Wanda(0.5))
    solved, start = method.solve(made), Wanda(0.5).solve(made)
    assert solved.weight is None
    assert torch.equal(solved.mask.sum(1), start.mask.sum(1))
    assert method_from_dict(method.to_dict()) == method
    assert DSnoT(Magnitude(0.5)).sparsity == 0.5


def test_what_it_cannot_refine():
    with pytest.raises(ValueError, match="updates weights to go with its own"):
        DSnoT(SparseGPT(0.5))
    with pytest.raises(ValueError, match=r"exchanges single weights.*4x1"):
        DSnoT(Wanda(0.5, pattern="4x1"))
