import pytest
import torch
from torch import nn
from torch.func import functional_call

import rarefy
import tiny
from rarefy import SNIP


def sensitivity(model: nn.Module, batch: tiny.Batch) -> dict[str, torch.Tensor]:
    """|∂L/∂c| with an explicit c that multiplies every weight."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    c = {n: torch.ones_like(p, requires_grad=True) for n, p in weights.items() if p.ndim > 1}
    scaled = weights | {n: weights[n] * c[n] for n in c}
    tiny.loss(lambda x: functional_call(model, scaled, x), batch).backward()
    return {n: x.grad.abs() for n, x in c.items()}


@pytest.mark.parametrize("make", [tiny.mlp, lambda: tiny.cnn().eval()], ids=["mlp", "cnn"])
def test_the_score_is_the_gradient_of_a_connection(make):
    model = make()
    data = tiny.batches((10,) if isinstance(model[0], nn.Linear) else (3, 4, 4))
    expected = sensitivity(make(), data[0])
    for name, score in tiny.scores(model, "snip", data).items():
        assert (score.abs() - expected[name]).abs().max() < 1e-12


def test_layer_sums_are_equal():
    """Without biases, with ReLU: Σ w·g is the same for every layer, the loss's own Σ ∂L/∂f·f."""
    model = tiny.seeded(lambda: nn.Sequential(nn.Linear(5, 8, False), nn.ReLU(), nn.Linear(8, 6, False), nn.ReLU(),
                                              nn.Linear(6, 3, False)), 3).double()  # fmt: skip
    data = tiny.batches((5,), classes=3)
    sums = [float(score.sum()) for score in tiny.scores(model, "snip", data).values()]
    outputs = model(data[0][0]).detach().requires_grad_(True)
    nn.functional.cross_entropy(outputs, data[0][1]).backward()
    expected = float((outputs.grad * outputs.detach()).sum())
    assert sums == pytest.approx([expected] * 3, abs=1e-14)


def test_the_largest_of_all_layers_are_kept():
    model, data = tiny.mlp(), tiny.batches()
    expected = sensitivity(tiny.mlp(), data[0])
    s = rarefy.sparsify(model, SNIP(0.9), data=data, loss=tiny.loss)
    everything = torch.cat([x.flatten() for x in expected.values()]).sort(descending=True).values
    for name, mask in s.masks.items():
        assert torch.equal(mask, expected[name] >= everything[24])  # 25 of 248


def test_batches_are_scored_together():
    data = tiny.batches()
    one = [tiny.scores(tiny.mlp(), "snip", [batch])["2.weight"] for batch in data]
    assert torch.allclose(tiny.scores(tiny.mlp(), "snip", data, batches=3)["2.weight"], sum(one))
    assert torch.allclose(tiny.scores(tiny.mlp(), "snip", data, batches=None)["2.weight"], sum(one))
    assert torch.equal(tiny.scores(tiny.mlp(), "snip", data)["2.weight"], one[0])
    with pytest.raises(ValueError, match="batches=4, but data= holds only 3"):
        rarefy.sparsify(tiny.mlp(), SNIP(0.9, batches=4), data=data, loss=tiny.loss)


def test_a_unit_pools_signed_scores():
    """w·g of a channel: 3 − 3 + 0 counts for nothing, 1 + 1 + 0 for something; magnitudes would say the opposite."""
    model = tiny.linear([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    gradient = torch.tensor([[3.0, -3.0, 0.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    weighted = lambda m, batch: (m.weight * batch).sum()  # noqa: E731
    s = rarefy.sparsify(model, SNIP(0.5, pattern="channel"), data=[gradient], loss=weighted)
    assert s.masks["weight"].any(1).tolist() == [False, True]


def test_a_generator_of_batches_will_do():
    def stream():
        yield from tiny.batches()

    a, b = tiny.mlp(), tiny.mlp()
    rarefy.sparsify(a, SNIP(0.9, batches=2), data=stream(), loss=tiny.loss)
    rarefy.sparsify(b, SNIP(0.9, batches=2), data=tiny.batches(), loss=tiny.loss)
    assert tiny.equal_models(a, b)


def test_frozen_weights_are_scored_too():
    model = tiny.mlp()
    model[2].weight.requires_grad_(False)
    s = rarefy.sparsify(model, SNIP(0.9), data=tiny.batches(), loss=tiny.loss)
    assert s.masks["2.weight"].any()
    assert not model[2].weight.requires_grad
