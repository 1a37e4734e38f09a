import pytest
import torch

import rarefy
import tiny
from rarefy import ITOP, Constant, Cosine, Every


def explored(method: rarefy.Method, steps: int) -> list[float]:
    """R_s after every step of a run on one 100×100 layer."""
    model = tiny.linear(torch.zeros(100, 100).tolist())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    s = rarefy.sparsify(model, method, optimizer=optimizer, steps=steps)
    found = [s.ledger.explored]
    for _ in range(steps):
        tiny.step_with_gradient(optimizer, torch.zeros(100, 100, dtype=torch.float64))
        found.append(s.ledger.explored)
    return found


def test_random_growth_explores_as_expected():
    """R_s after u updates: 1 − (1−d)·(1 − αd/(1−d+αd))ᵘ."""
    d, alpha = 0.05, 0.4
    found = explored(ITOP(1 - d, grow="random", fraction=Constant(alpha), every=Every(1, 1.0)), steps=41)
    assert found[0] == d
    assert found == sorted(found)
    for u in (1, 10, 40):
        expected = 1 - (1 - d) * (1 - alpha * d / (1 - d + alpha * d)) ** u
        assert found[u] == pytest.approx(expected, abs=0.012), u


def test_static_masks_explore_nothing():
    assert set(explored(rarefy.Random(0.95), steps=3)) == {0.05}


def test_equal_gradients_always_grow_the_same_places():
    found = explored(ITOP(0.95, every=Every(1, 1.0)), steps=6)
    assert found[1] > found[0]
    assert found[6] < 2.1 * found[0]  # the first places, again and again


def test_updates_follow_the_optimizer_step():
    model, data = tiny.mlp(), tiny.batches()
    optimizer = tiny.sgd(model)
    s = rarefy.sparsify(model, ITOP(0.8, every=Every(3, 1.0)), optimizer=optimizer, steps=9)
    masks, moved = s.masks, []

    def after(t: int) -> None:
        nonlocal masks
        if any(not torch.equal(masks[n], m) for n, m in s.masks.items()):
            moved.append(t)
        masks = s.masks

    tiny.fit(model, optimizer, 9, data, after)
    assert moved == [3, 6]
    assert s.ledger.dense_steps == [2, 5]  # the gradient of the step that the update follows


def test_defaults_are_the_papers():
    method = ITOP(0.9)
    assert (method.every, method.fraction, method.skip_step) == (Every(4000, 1.0), Cosine(0.5, 0.005), False)
