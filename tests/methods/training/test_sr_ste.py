import math

import pytest
import torch

import rarefy
import tiny
from rarefy import SRSTE

WEIGHT = [0.1, -0.4, 0.3, 0.2, 1.0, -1.0, 0.5, 2.0]
MASK = [0, 1, 1, 0, 1, 0, 0, 1]  # 2:4, of |1| = |−1| the earlier


def start(method: rarefy.Method, lr: float = 1.0, **options):
    model = tiny.linear([WEIGHT])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
    return model, optimizer, rarefy.sparsify(model, method, optimizer=optimizer)


def test_the_refined_gradient():
    """g = .01 everywhere, λ = 2e-4: .01 + λw at masked positions only."""
    _, optimizer, s = start(SRSTE())
    assert s.masks["weight"][0].int().tolist() == MASK
    tiny.step_with_gradient(optimizer, torch.full((1, 8), 0.01, dtype=torch.float64))
    moved = torch.tensor([WEIGHT], dtype=torch.float64) - s.sites[0].master
    expected = torch.tensor([[0.01002, 0.01, 0.01, 0.01004, 0.01, 0.0098, 0.0101, 0.01]], dtype=torch.float64)
    assert torch.allclose(moved, expected, atol=1e-15, rtol=0)


def test_without_decay_it_is_the_straight_through_estimator():
    model, optimizer, s = start(SRSTE(decay=0.0))
    gradient = torch.arange(8.0, dtype=torch.float64)[None]
    tiny.step_with_gradient(optimizer, gradient)
    assert torch.equal(s.sites[0].master, torch.tensor([WEIGHT], dtype=torch.float64) - gradient)
    assert torch.equal(model.weight, s.sites[0].master.masked_fill(~s.masks["weight"], 0))


def test_the_decoupled_form_acts_outside_the_optimizer():
    _, optimizer, s = start(SRSTE(decay=0.1, decoupled=True), lr=0.5)
    gradient = torch.full((1, 8), 0.2, dtype=torch.float64)
    tiny.step_with_gradient(optimizer, gradient)
    stepped = torch.tensor([WEIGHT], dtype=torch.float64) - 0.5 * gradient
    expected = stepped - 0.5 * 0.1 * stepped * (1 - torch.tensor([MASK]))
    assert torch.allclose(s.sites[0].master, expected, atol=1e-15, rtol=0)


def best_of_each_group(weight: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The n:m mask of a matrix, group by group, ties to the earlier."""
    mask = torch.zeros_like(weight)
    for r, row in enumerate(weight.abs().tolist()):
        for a in range(0, len(row), m):
            group = range(a, min(a + m, len(row)))
            for i in sorted(group, key=lambda i: (-row[i], i))[: math.ceil(n * len(group) / m)]:
                mask[r, i] = 1
    return mask


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (1, 3)])
def test_a_run_is_the_formula(pattern: tuple[int, int], decay: float):
    """W ← W − γ(∂L/∂W̃ + λ(1−M)⊙W) with momentum and weight decay on W, against a loop without the library."""
    n, m = pattern
    model, data = tiny.mlp(), tiny.batches()
    optimizer = tiny.sgd(model, lr=0.1, weight_decay=0.01)
    s = rarefy.sparsify(model, SRSTE(pattern=f"{n}:{m}", decay=decay), optimizer=optimizer)
    tiny.fit(model, optimizer, 25, data, lambda _: rarefy.check(model, s))

    plain = tiny.mlp()
    hidden = {k: p.detach().clone() for k, p in plain.named_parameters()}
    momentum = {k: torch.zeros_like(p) for k, p in hidden.items()}
    for t in range(25):
        masks = {k: best_of_each_group(w, n, m) if w.ndim == 2 else torch.ones_like(w) for k, w in hidden.items()}
        with torch.no_grad():
            for k, p in plain.named_parameters():
                p.copy_(masks[k] * hidden[k])
        plain.zero_grad()
        tiny.loss(plain, data[t % 3]).backward()
        for k, p in plain.named_parameters():
            gradient = p.grad + decay * (1 - masks[k]) * hidden[k] + 0.01 * hidden[k]
            momentum[k] = gradient if t == 0 else 0.9 * momentum[k] + gradient
            hidden[k] = hidden[k] - 0.1 * momentum[k]
    for site in s.sites:
        assert torch.allclose(site.master, hidden[site.name], atol=1e-12, rtol=0), site.name
        assert torch.equal(site.mask, best_of_each_group(hidden[site.name], n, m).bool())


def test_decay_steadies_the_masks():
    def flips(decay: float) -> float:
        model, data = tiny.mlp(), tiny.batches()
        optimizer = tiny.sgd(model, weight_decay=0.0)
        s = rarefy.sparsify(model, SRSTE(pattern="1:4", decay=decay), optimizer=optimizer)
        tiny.fit(model, optimizer, 60, data)
        return s.ledger.flip_rate()

    assert 0 < flips(0.3) < flips(0.0)


def test_the_end_leaves_the_sparse_weight():
    model, optimizer, s = start(SRSTE())
    tiny.step_with_gradient(optimizer, torch.full((1, 8), 0.01, dtype=torch.float64))
    sparse = model.weight.detach().clone()
    s.end()
    assert torch.equal(model.weight, sparse)
    assert s.sites[0].master is None
    assert int(model.weight.count_nonzero()) == 4


def test_any_pattern_with_its_sparsity():
    model, optimizer, s = start(SRSTE(sparsity=0.75, pattern="unstructured"))
    assert s.masks["weight"][0].int().tolist() == [0, 0, 0, 0, 1, 0, 0, 1]
    tiny.step_with_gradient(optimizer, torch.zeros(1, 8, dtype=torch.float64))
    rarefy.check(model, s)


def test_the_formula_of_its_cost():
    """Forward sparse, gradient of the input and of the weight dense: f_S + 2 f_D."""
    _, optimizer, s = start(SRSTE())
    tiny.step_with_gradient(optimizer, torch.zeros(1, 8, dtype=torch.float64))
    assert s.ledger.training_flops({"weight": 16.0}) == 8 + 2 * 16
