import pytest
import torch
from torch import nn

import rarefy
import tiny
from rarefy import Magnitude


def two_layers() -> nn.Sequential:
    """10 large weights, then 1000 tiny ones."""
    model = nn.Sequential(nn.Linear(2, 5, bias=False), nn.Linear(5, 200, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(10.0, 20.0).view(5, 2))
        model[1].weight.copy_(torch.arange(1.0, 1001.0).view(200, 5) / 1e6)
    return model


def test_a_floor_per_layer():
    """s = .99 keeps 10 of 1010: without a floor all of the second layer goes, with a floor of 5 half of each stays."""
    kept = [int(m.sum()) for m in rarefy.sparsify(two_layers(), Magnitude(0.99)).masks.values()]
    assert kept == [10, 0]
    masks = rarefy.sparsify(two_layers(), Magnitude(0.99, minimum=0.005)).masks
    assert [int(m.sum()) for m in masks.values()] == [5, 5]
    assert masks["0.weight"].flatten()[5:].all()
    assert masks["1.weight"].flatten()[-5:].all()


def test_an_idle_floor_changes_nothing():
    a, b = tiny.mlp(), tiny.mlp()
    rarefy.sparsify(a, Magnitude(0.5))
    rarefy.sparsify(b, Magnitude(0.5, minimum=0.0005))
    assert tiny.equal_models(a, b)


def test_impossible_floors():
    model = tiny.mlp()
    before = tiny.picture(model)
    with pytest.raises(ValueError, match="floors of up to 24 units in 3 layers need 72 units"):
        rarefy.sparsify(model, Magnitude(0.9, minimum=0.1))
    assert tiny.picture(model) == before


def test_global_and_local():
    weights = [p.detach().abs() for p in tiny.mlp().parameters() if p.ndim > 1]
    everything = torch.cat([w.flatten() for w in weights]).sort(descending=True).values
    masks = rarefy.sparsify(tiny.mlp(), Magnitude(0.9)).masks
    assert all(torch.equal(m, w >= everything[24]) for m, w in zip(masks.values(), weights, strict=True))
    masks = rarefy.sparsify(tiny.mlp(), Magnitude(0.9, allocation="uniform")).masks
    for mask, weight, kept in zip(masks.values(), weights, (12, 10, 3), strict=True):
        assert torch.equal(mask, weight >= weight.flatten().sort(descending=True).values[kept - 1])


def test_no_two_four_mask_leaves_less_behind():
    """Magnitude is the Euclidean projection: every other choice of two per group is at least as far from W."""
    weight = torch.randn(1, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mask = rarefy.sparsify(tiny.linear(weight.tolist()), Magnitude(pattern="2:4")).masks["weight"]
    left = float((weight * ~mask).norm())
    pairs = torch.combinations(torch.arange(4), 2)
    for a in pairs:
        for b in pairs:
            other = torch.zeros(1, 8, dtype=torch.bool)
            other[0, a], other[0, b + 4] = True, True
            assert float((weight * ~other).norm()) >= left


def test_again_is_no_change():
    model = tiny.mlp()
    rarefy.sparsify(model, Magnitude(0.8))
    once = tiny.clone(model)
    rarefy.sparsify(model, Magnitude(0.8))
    assert tiny.equal_models(model, once)


def test_ties_and_zeros_count_exactly():
    s = rarefy.sparsify(tiny.linear([[0.0] * 7, [1.0] * 7]), Magnitude(0.25, allocation="uniform"))
    assert s.masks["weight"].int().tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]  # 10.5 + ½ → 11; zeros by position


def leaked(watched: bool) -> float:
    """w = [1, 2], loss Σw, lr .1, momentum .9: three steps, w₂ masked once, one step without gradient."""
    model = tiny.linear([[1.0, 2.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ones = torch.ones(1, 2, dtype=torch.float64)
    for _ in range(3):
        tiny.step_with_gradient(optimizer, ones)
    with torch.no_grad():
        model.weight[0, 0] = 9.0  # so that the second goes
    s = rarefy.sparsify(model, Magnitude(0.5))
    if watched:
        s.attach(optimizer)
    tiny.step_with_gradient(optimizer, 0 * ones)
    return model.weight[0, 1].item()


def test_momentum_revives_a_weight_unless_the_handle_is_attached():
    assert leaked(watched=False) == pytest.approx(-0.2439)
    assert leaked(watched=True) == 0.0
