import pytest
import torch

from rarefy.bench.pruning.reference import COLUMNS, Judged, quota, sparse_gpt, wanda


def problem(rows, columns, seed=0):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=source, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=source, dtype=torch.float64)
    return torch.randn(rows, columns, generator=source, dtype=torch.float64), x.t() @ x / len(x)


def literal(weight, hessian, sparsity, damping, size):
    """Columns from the left; before each the inverse of what is left of H is made anew (optimal brain surgeon)."""
    weight, mask, kept = weight.clone(), torch.ones(weight.shape, dtype=torch.bool), 0
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    rows, columns = weight.shape
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        first = [torch.linalg.inv(h[j:, j:])[0, 0] for j in range(start, stop)]
        scores = weight[:, start:stop].square() / torch.stack(first)
        most = quota(sparsity, rows * stop) - kept
        chosen = torch.zeros(scores.numel(), dtype=torch.bool)
        chosen[scores.flatten().argsort(descending=True)[:most]] = True
        mask[:, start:stop] = chosen.view_as(scores)
        kept += most
        for j in range(start, stop):
            inverse = torch.linalg.inv(h[j:, j:])
            dropped = torch.where(mask[:, j], 0.0, weight[:, j])
            weight[:, j:] -= torch.outer(dropped, inverse[0] / inverse[0, 0])
    return mask, weight * mask


@pytest.mark.parametrize("columns", [24, 150])
def test_sparse_gpt_is_the_literal_loop(columns):
    weight, hessian = problem(6, columns)
    mask, found = sparse_gpt(weight, hessian, 0.6)
    expected_mask, expected = literal(weight, hessian, 0.6, 0.01, COLUMNS)
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    assert int(mask.sum()) == quota(0.6, weight.numel())


def test_wanda_of_the_paper():
    weight = torch.tensor([[4.0, -1.0, 2.0, -3.0], [1.0, 1.0, -2.0, 0.5]])
    squares = torch.tensor([0.1, 2.0, 1.0, 0.5]).square()
    mask = torch.tensor([[False, True, True, False], [False, True, True, False]])
    assert torch.equal(wanda(weight, squares, 0.5), mask)


def test_an_input_that_never_came_is_dropped_first():
    weight, hessian = problem(3, 8)
    hessian[2], hessian[:, 2] = 0, 0
    mask, _ = sparse_gpt(weight, hessian, 0.5)
    assert not mask[:, 2].any()


def test_a_given_mask_is_kept_and_judged():
    weight, hessian = problem(6, 40)
    mask, updated = sparse_gpt(weight, hessian, 0.5)
    judged = Judged()
    again, same = sparse_gpt(weight, hessian, 0.5, given=mask, judged=judged)
    assert torch.equal(again, mask)
    assert torch.equal(same, updated)
    assert (judged.wrong, judged.gap) == (0, 0.0)
    sparse_gpt(weight, hessian, 0.5, given=weight.abs() > 0.7, judged=judged)
    assert judged.wrong > 0
    assert judged.gap > 0.01


def test_a_mask_is_judged_by_its_distance_from_the_bound():
    judged = Judged()
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    judged.add(scores, torch.tensor([False, False, True, True]))
    assert (judged.wrong, judged.gap) == (0, 0.0)
    judged.add(scores, torch.tensor([False, True, False, True]))
    assert judged.wrong == 2
    assert judged.gap == pytest.approx(0.2)  # of 2 and 3 from 2.5
    judged.add(scores, torch.ones(4, dtype=torch.bool))
    assert judged.wrong == 2
    tied = Judged()
    tied.add(torch.tensor([1.0, 1.0]), torch.tensor([False, True]))
    assert (tied.wrong, tied.gap) == (0, 0.0)
