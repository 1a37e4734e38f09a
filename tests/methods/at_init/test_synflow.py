import itertools

import pytest
import torch
from torch import nn

import rarefy
import tiny
from rarefy import SNIP, Magnitude, SynFlow


def net(*widths: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    def make() -> nn.Sequential:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return tiny.seeded(make, seed)


@pytest.mark.parametrize("bias", [False, True])
def test_flow_is_conserved(bias: bool):
    """R flows through every layer, and what flows into a hidden neuron flows out of it."""
    model = net(4, 3, 5, 2, bias=bias)
    scores = list(tiny.scores(model, "synflow", [torch.randn(7, 4)]).values())
    a, b, c = (m.weight.detach().double().abs() for m in model if isinstance(m, nn.Linear))
    r = float((c @ b @ a @ torch.ones(4, dtype=torch.float64)).sum())
    assert [float(s.sum()) for s in scores] == pytest.approx([r] * 3, rel=1e-14)
    for into, out in itertools.pairwise(scores):
        assert torch.allclose(into.sum(1), out.sum(0), rtol=1e-14)


def test_the_score_in_closed_form():
    """score(w_ij) = (what reaches j) · |w_ij| · (what leaves i), in float64 whatever the weights' own type."""
    model = net(4, 3, 2).to(torch.bfloat16)
    a, b = model[0].weight.detach().double().abs(), model[2].weight.detach().double().abs()
    scores = tiny.scores(model, "synflow", [torch.zeros(1, 4)])
    assert torch.allclose(scores["0.weight"], a * b.sum(0)[:, None], rtol=1e-14)
    assert torch.allclose(scores["2.weight"], b * a.sum(1), rtol=1e-14)
    assert scores["0.weight"].dtype == torch.float64


def collapsed(model: nn.Module, method: rarefy.Method, data=None) -> list[str]:
    s = rarefy.sparsify(model, method, data=data, loss=tiny.loss)
    rarefy.check(model, s)
    return [name for name, mask in s.masks.items() if not mask.any()]


def test_no_layer_collapses_at_a_thousandth():
    """17 of 17 200 weights in four layers, where magnitude and SNIP lose whole layers."""
    widths = (64, 100, 100, 4, 100, 4)
    build = lambda: net(*widths).double()  # noqa: E731
    assert not collapsed(build(), SynFlow(0.999, rounds=60), [torch.ones(1, 64)])
    assert collapsed(build(), Magnitude(0.999))
    assert collapsed(build(), SNIP(0.999), tiny.batches((64,)))


def test_one_round_alone_collapses():
    """The iterations are the method."""
    build = lambda: net(64, 100, 100, 4, 100, 4)  # noqa: E731
    assert collapsed(build(), SynFlow(0.999, rounds=1), [torch.ones(1, 64)])


def reference(model: nn.Sequential, density: float, rounds: int) -> list[torch.Tensor]:
    """The paper's loop on a net of Linears, by matrix products and sorting."""
    weights = [m.weight.detach().double().abs() for m in model if isinstance(m, nn.Linear)]
    masks = [torch.ones_like(w) for w in weights]
    n = sum(w.numel() for w in weights)
    for i in range(1, rounds + 1):
        live = [w * m for w, m in zip(weights, masks, strict=True)]
        scores = []
        for k, w in enumerate(live):
            into = torch.ones(live[0].shape[1], dtype=torch.float64)
            for before in live[:k]:
                into = before @ into
            out = torch.ones(live[-1].shape[0], dtype=torch.float64)
            for after in reversed(live[k + 1 :]):
                out = out @ after
            scores.append(out[:, None] * w * into)
        share = 1 - (1 - density) if i == rounds else density ** (i / rounds)
        ranked = torch.cat([torch.where(m > 0, s, -1.0).flatten() for s, m in zip(scores, masks, strict=True)])
        chosen = torch.zeros(n)
        chosen[ranked.argsort(descending=True, stable=True)[: int(share * n + 0.5)]] = 1
        masks = [c.view_as(w) for c, w in zip(chosen.split([w.numel() for w in weights]), weights, strict=True)]
    return masks


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_the_rounds_of_the_paper(rounds: int):
    s = rarefy.sparsify(net(9, 11, 7, 3), SynFlow(0.75, rounds=rounds), data=[torch.ones(1, 9)])
    expected = reference(net(9, 11, 7, 3), 0.25, rounds)
    assert all(torch.equal(m, e.bool()) for m, e in zip(s.masks.values(), expected, strict=True))


def test_the_linear_ablation():
    method = SynFlow(0.8, rounds=4, decay="linear")
    assert method._shares() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert SynFlow(0.75, rounds=2)._shares() == pytest.approx([0.5, 0.75])


def test_convolutions_norms_and_pools():
    """Running statistics and batch size do not matter; the model stays as it was, training mode and all."""
    model = tiny.cnn()
    model[1].running_mean.fill_(3.0)
    before = tiny.picture(model)
    scores = tiny.scores(model, "synflow", [torch.ones(5, 3, 4, 4)])
    sums = [float(score.sum()) for score in scores.values()]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-12)
    changed = {k for k, v in tiny.picture(model).items() if v != before[k]}
    assert not changed


def test_integers_are_passed_on():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    s = rarefy.sparsify(model, SynFlow(0.5, rounds=3), data=[torch.tensor([[1, 2, 3], [4, 5, 6]])])
    assert int(s.masks["2.weight"].sum()) == 12


def test_labels_are_no_input():
    with pytest.raises(ValueError, match="give inputs without labels"):
        rarefy.sparsify(tiny.mlp(), SynFlow(0.5), data=tiny.batches())


def test_n_m_takes_one_round():
    model = net(8, 8, 4)
    scores = tiny.scores(net(8, 8, 4), "synflow", [torch.ones(1, 8)])
    s = rarefy.sparsify(model, SynFlow(pattern="2:4"), data=[torch.ones(1, 8)])
    for name, mask in s.masks.items():
        groups = scores[name].view(-1, 4)
        assert torch.equal(mask.view(-1, 4), groups >= groups.sort(1, descending=True).values[:, 1:2])
