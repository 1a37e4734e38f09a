import math

import pytest
import torch

import rarefy
import tiny
from rarefy import Random
from rarefy.core.scoring import random_masks


def masks(method: rarefy.Method, model=None, seed: int = 0) -> dict[str, torch.Tensor]:
    return rarefy.sparsify(model or tiny.mlp(), method, seed=seed).masks


def test_counts_are_those_of_the_allocation():
    """784-300-100-10 at 90 %: ERK keeps 18 714, 6 906 and all 1 000."""
    lenet = torch.nn.Sequential(torch.nn.Linear(784, 300), torch.nn.Linear(300, 100), torch.nn.Linear(100, 10))
    assert [int(m.sum()) for m in masks(Random(0.9), lenet).values()] == [18714, 6906, 1000]


@pytest.mark.parametrize("allocation", ["uniform", "erdos_renyi", "erdos_renyi_kernel_plus", "balanced", "global"])
def test_another_seed_is_another_mask_of_the_same_size(allocation: str):
    a, again, b = (masks(Random(0.7, allocation=allocation), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a[n], again[n]) for n in a)
    assert not all(torch.equal(a[n], b[n]) for n in a)
    assert tiny.total(a.values()) == tiny.total(b.values())


def test_the_draw_is_a_float64_per_weight_in_row_order():
    """So that anybody can make the same mask: the k largest of these numbers."""
    model = tiny.linear(torch.ones(6, 5).tolist())
    draws = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    expected = draws >= draws.flatten().sort(descending=True).values[8]
    assert torch.equal(masks(Random(0.7), model, seed=7)["weight"], expected)


def test_neither_dtype_nor_memory_format_nor_threads_decide():
    wide = tiny.cnn()
    half = tiny.cnn().to(torch.bfloat16)
    last = tiny.cnn().to(memory_format=torch.channels_last)
    found = [masks(Random(0.6), model) for model in (wide, half, last)]
    torch.set_num_threads(2)
    try:
        found.append(masks(Random(0.6), tiny.cnn()))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(found[0][n], other[n]) for other in found[1:] for n in found[0])


def test_every_tile_is_as_likely_as_any_other():
    """3×3 in tiles of 2×2: one of four, three of them smaller. A mean over its draws would favour the smallest."""
    s = rarefy.sparsify(tiny.linear(torch.ones(3, 3).tolist()), Random(0.75, pattern="2x2"))
    seen = torch.zeros(3, 3)
    for _ in range(1000):
        (mask,) = random_masks(s, rarefy.Uniform(), 0.75).values()
        seen += mask
    tiles = torch.stack([seen[0, 0], seen[0, 2], seen[2, 0], seen[2, 2]]) / 1000
    assert tiles.sum() == 1
    assert (tiles - 0.25).abs().max() < 0.06  # more than four standard deviations


def test_weights_are_not_looked_at():
    model = tiny.mlp()
    before = masks(Random(0.9), tiny.clone(model))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-3)
    assert all(torch.equal(before[n], m) for n, m in masks(Random(0.9), model).items())


def test_kept_weights_keep_their_initial_values():
    model, before = tiny.mlp(), tiny.mlp()
    for name, mask in masks(Random(0.9), model).items():
        assert torch.equal(model.get_parameter(name)[mask], before.get_parameter(name)[mask])


def test_it_stays_as_it_is():
    model, data = tiny.mlp(), tiny.batches()
    optimizer = tiny.sgd(model)
    s = rarefy.sparsify(model, Random(0.9), optimizer=optimizer)
    first = s.masks
    tiny.fit(model, optimizer, 10, data, lambda _: rarefy.check(model, s))
    assert all(torch.equal(first[n], m) for n, m in s.masks.items())
    assert s.ledger.explored == tiny.total(first.values()) / 248
    assert s.ledger.flip_rate() == 0.0
    assert tiny.total(first.values()) == math.floor(0.1 * 248 + 0.5)
