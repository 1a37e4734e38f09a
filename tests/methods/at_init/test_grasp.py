import pytest
import torch
from torch.nn import functional as F

import rarefy
import tiny
from rarefy import GraSP

T = 200.0


def regression() -> tuple[torch.nn.Linear, list[tiny.Batch]]:
    """3 inputs, 5 classes."""
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return tiny.linear(weight.tolist()), tiny.batches((3,), classes=5)


def gradient(weight: torch.Tensor, batch: tiny.Batch, temperature: float) -> torch.Tensor:
    """Of the softmax regression in closed form: (p − y)ᵀ x / (n T)."""
    x, y = batch
    p = torch.softmax(x @ weight.T / temperature, 1)
    return (p - F.one_hot(y, 5)).T @ x / len(x) / temperature


@pytest.mark.parametrize("temperature", [1.0, T])
def test_the_score_is_theta_times_h_g(temperature: float):
    """H g by finite differences of the closed gradient."""
    model, data = regression()
    theta = model.weight.detach().clone()
    g = gradient(theta, data[0], temperature)
    eps = 1e-3 / float(g.abs().max())
    hg = (gradient(theta + eps * g, data[0], temperature) - gradient(theta - eps * g, data[0], temperature)) / (2 * eps)
    score = tiny.scores(model, "grasp", data, temperature=temperature)["weight"]
    assert torch.allclose(score, theta * hg, rtol=1e-6, atol=0)


def test_the_score_is_half_theta_times_the_slope_of_the_squared_gradient_norm():
    model, data = tiny.mlp(), tiny.batches()
    score = tiny.scores(model, "grasp", data, temperature=T)
    twin = tiny.mlp()
    weights = [twin[i].weight for i in (0, 2, 4)]
    loss = F.cross_entropy(twin(data[0][0]) / T, data[0][1])
    norm = sum(g.square().sum() for g in torch.autograd.grad(loss, weights, create_graph=True))
    for (name, found), w, slope in zip(score.items(), weights, torch.autograd.grad(norm, weights), strict=True):
        assert torch.allclose(found, 0.5 * w * slope, rtol=1e-9, atol=1e-22), name


def test_the_largest_signed_scores_of_all_layers_stay():
    """Removed are the largest −θ ⊙ Hg; magnitudes would keep others."""
    model, data = tiny.mlp(), tiny.batches()
    scores = tiny.scores(tiny.mlp(), "grasp", data, temperature=T)
    s = rarefy.sparsify(model, GraSP(0.8), data=data, loss=tiny.loss)
    order = torch.cat([x.flatten() for x in scores.values()]).sort(descending=True).values
    kept = 50  # of 248
    assert all(torch.equal(mask, scores[name] >= order[kept - 1]) for name, mask in s.masks.items())
    sizes = order.abs().sort(descending=True).values
    assert not all(torch.equal(mask, scores[name].abs() >= sizes[kept - 1]) for name, mask in s.masks.items())


def test_two_halves_count_as_one():
    """g is the sum over both halves, in both passes."""
    model, data = regression()
    halves = [(data[0][0][:4], data[0][1][:4]), (data[0][0][4:], data[0][1][4:])]
    both = tiny.scores(model, "grasp", halves, batches=2)["weight"]
    theta = model.weight.detach()
    g = gradient(theta, halves[0], 1.0) + gradient(theta, halves[1], 1.0)
    eps = 1e-4

    def total(w: torch.Tensor) -> torch.Tensor:
        return gradient(w, halves[0], 1.0) + gradient(w, halves[1], 1.0)

    hg = (total(theta + eps * g) - total(theta - eps * g)) / (2 * eps)
    assert torch.allclose(both, theta * hg, rtol=1e-6, atol=1e-12)


def test_the_loss_sees_the_model_itself():
    class Named(torch.nn.Linear):
        bonus = 2.0

    model = Named(3, 5, bias=False, dtype=torch.float64)
    rarefy.sparsify(
        model, GraSP(0.5), data=regression()[1], loss=lambda m, batch: m.bonus * F.cross_entropy(m(batch[0]), batch[1])
    )
    assert not model._forward_hooks


def test_a_temperature_needs_logits():
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 5, dtype=torch.float64)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return self.layer(x), None

    of = lambda m, batch: F.cross_entropy(m(batch[0])[0], batch[1])  # noqa: E731
    data = regression()[1]
    with pytest.raises(ValueError, match=r"Two returns tuple\. Give temperature=1"):
        rarefy.sparsify(Two(), GraSP(0.5), data=data, loss=of)
    rarefy.sparsify(Two(), GraSP(0.5, temperature=1.0), data=data, loss=of)


def test_defaults_are_the_papers():
    assert GraSP(0.9).temperature == T
    assert str(GraSP(0.9).allocation) == "Global()"
