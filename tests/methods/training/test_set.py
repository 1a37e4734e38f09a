import torch

import rarefy
import tiny
from rarefy import SET, Constant, Every

EACH_STEP = Every(1, 1.0)


def updated(weight: list[float], kept: list[int], **options) -> tuple[torch.Tensor, torch.nn.Module]:
    """The mask after one update of a layer with one row."""
    model = tiny.linear([weight])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    share = 1 - sum(kept) / len(kept)
    s = rarefy.sparsify(model, SET(share, every=EACH_STEP, **options), optimizer=optimizer, steps=100)
    tiny.hold(s, [tiny.mask([kept])], [[weight]])
    tiny.step_with_gradient(optimizer, torch.zeros(1, len(weight), dtype=torch.float64))
    rarefy.check(model, s)
    return s.masks["weight"][0], model


def test_the_smallest_positive_and_the_largest_negative_go():
    # −3 −.1 .2 4: half of each side goes, −.1 and .2
    now, model = updated([-3, -0.1, 0.2, 4, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0], fraction=0.5)
    assert now[[0, 3]].all()
    assert now.sum() == 4
    grown = now.clone()
    grown[[0, 3]] = False
    regrown = grown[[1, 2]].sum()
    assert model.weight[0][grown].count_nonzero() == regrown  # new ones start at zero, a regrown one has its value


def test_the_sides_are_apart():
    # −3 −2 .1 .2: by sign −2 and .1 go, by magnitude .1 and .2
    weight, kept = [-3, -2, 0.1, 0.2, *[0] * 400], [1] * 4 + [0] * 400
    by_sign, _ = updated(weight, kept, fraction=0.5)
    by_size, _ = updated(weight, kept, fraction=0.5, drop="magnitude")
    assert by_sign[:4].tolist() == [True, False, False, True]
    assert by_size[:4].tolist() == [True, True, False, False]


def test_zeros_are_positive():
    now, _ = updated([0.0, 0.0, -1, -2, *[0] * 400], [1] * 4 + [0] * 400, fraction=0.5)
    assert now[:4].tolist() == [True, False, False, True]  # of two zeros the first stays


def test_blocks_have_no_side():
    """Where a unit has several weights, the mean magnitude decides."""
    weight, kept = [[1.0, 1.0, -2.0, -2.0, *[0.0] * 800]], [[1] * 4 + [0] * 800]
    model = tiny.linear(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = SET(1 - 4 / 804, every=EACH_STEP, fraction=0.5, pattern="1x2")
    s = rarefy.sparsify(model, method, optimizer=optimizer, steps=100)
    tiny.hold(s, [tiny.mask(kept)], [weight])
    tiny.step_with_gradient(optimizer, torch.zeros(1, 804, dtype=torch.float64))
    assert s.masks["weight"][0, :4].tolist() == [False, False, True, True]


def test_growth_is_uniform_among_what_is_free():
    model = tiny.linear([[0.0] * 10])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    s = rarefy.sparsify(model, SET(0.8, every=EACH_STEP, fraction=1.0), optimizer=optimizer, steps=10_000)
    seen = torch.zeros(10)
    for _ in range(400):
        tiny.step_with_gradient(optimizer, torch.zeros(1, 10, dtype=torch.float64))
        seen += s.masks["weight"][0]
    assert (seen / 400 - 0.2).abs().max() < 0.09  # more than four standard deviations of 400 draws


def test_it_needs_no_dense_gradient():
    method = SET(0.8, every=EACH_STEP)
    assert not any(method.wants_dense_gradient(t, 100) for t in range(100))


def test_the_optimizer_steps_at_updates_too_and_not_after_the_end():
    model, data = tiny.mlp(), tiny.batches()
    optimizer = tiny.sgd(model)
    s = rarefy.sparsify(model, SET(0.8, every=Every(4, 1.0)), optimizer=optimizer, steps=12)
    changed = []
    masks = s.masks

    def after(t: int) -> None:
        nonlocal masks
        if any(not torch.equal(masks[n], m) for n, m in s.masks.items()):
            changed.append(t)
        masks = s.masks

    tiny.fit(model, optimizer, 12, data, after)
    assert changed == [4, 8]
    bias = model[0].bias.detach().clone()
    tiny.fit(model, optimizer, 1, data)
    assert not torch.equal(bias, model[0].bias)


def test_defaults_are_the_papers():
    assert SET(0.9).fraction == Constant(0.3)
    assert str(SET(0.9).allocation) == str(rarefy.ErdosRenyi())
