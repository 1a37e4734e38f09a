import pytest
import torch

import rarefy
import tiny
from rarefy import Constant, Cosine, Cubic, Every, GraNet, RigL

N = 120 + 96 + 32


def history(method: rarefy.Method, steps: int) -> tuple[list[dict[str, torch.Tensor]], rarefy.Sparsity]:
    model, data = tiny.mlp(), tiny.batches()
    optimizer = tiny.sgd(model)
    s = rarefy.sparsify(model, method, optimizer=optimizer, steps=steps)
    found = [s.masks]

    def after(t: int) -> None:
        found.append(s.masks)
        rarefy.check(model, s)

    tiny.fit(model, optimizer, steps, data, after)
    return found, s


@pytest.mark.parametrize("initial", [0.0, 0.5])
def test_the_density_is_cubic_whatever_is_exchanged(initial: float):
    schedule = Cubic(initial=initial, start=2, end=12, every=2)
    masks, _ = history(GraNet(0.9, schedule=schedule, every=Every(2, 1.0)), steps=16)
    for t in range(17):
        last = min(12, max(2, t - t % 2))
        share = 0.9 + (initial - 0.9) * (1 - (last - 2) / 10) ** 3
        assert tiny.total(masks[t].values()) == pytest.approx((1 - share) * N, abs=0.51), t


def test_exchange_keeps_each_layers_count():
    masks, _ = history(GraNet(0.8, schedule=Cubic(initial=0.5, end=4, every=4), every=Every(1, 1.0)), steps=12)
    counts = [[int(m.sum()) for m in at.values()] for at in masks]
    assert counts[5:] == [counts[4]] * 8  # after the window
    assert counts[1:4] == [counts[0]] * 3  # between two prunings
    assert any(not torch.equal(a, b) for a, b in zip(masks[5].values(), masks[4].values(), strict=True))


@pytest.mark.parametrize("skip_step", [False, True])
def test_without_pruning_it_is_rigl(skip_step: bool):
    options = {"every": Every(3, 1.0), "fraction": Constant(0.3), "skip_step": skip_step}
    granet, a = history(GraNet(0.8, schedule=Cubic(initial=0.8, end=0.5, every=3), **options), steps=14)
    rigl, b = history(RigL(0.8, **options), steps=14)
    assert all(torch.equal(x[n], y[n]) for x, y in zip(granet, rigl, strict=True) for n in x)
    assert tiny.equal_models(a.model, b.model)


def test_pruning_is_global_and_may_be_per_layer():
    schedule = Cubic(initial=0.0, end=2, every=2)
    everywhere, _ = history(GraNet(0.75, schedule=schedule, every=Every(100, 1.0)), steps=3)
    per_layer, _ = history(GraNet(0.75, schedule=schedule, every=Every(100, 1.0), pruning="uniform"), steps=3)
    assert [int(m.sum()) for m in per_layer[3].values()] == [30, 24, 8]
    assert [int(m.sum()) for m in everywhere[3].values()] != [30, 24, 8]
    assert tiny.total(everywhere[3].values()) == 62


def test_a_final_sparsity_below_the_first_is_refused_at_once():
    model = tiny.mlp()
    with pytest.raises(ValueError, match="masks only get sparser"):
        rarefy.sparsify(model, GraNet(0.3), optimizer=tiny.sgd(model), steps=1000)


def test_defaults_are_the_papers():
    method = GraNet(0.9)
    assert (method.every, method.fraction, method.skip_step) == (Every(1000, 1.0), Cosine(0.5, 0.005), False)
    assert method.schedule == Cubic(initial=0.5, start=0.0, end=0.6875, every=1000)
