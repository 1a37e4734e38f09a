import itertools
import math
from fractions import Fraction

import pytest
import torch

import rarefy
import tiny
from rarefy import GMP, AtLeast, Cubic, OneShot


def history(method: rarefy.Method, steps: int, model=None) -> tuple[list[dict[str, torch.Tensor]], rarefy.Sparsity]:
    """Masks at the start and after every step."""
    model, data = model or tiny.mlp(), tiny.batches()
    optimizer = tiny.sgd(model)
    s = rarefy.sparsify(model, method, optimizer=optimizer, steps=steps)
    found = [s.masks]

    def after(t: int) -> None:
        found.append(s.masks)
        rarefy.check(model, s)

    tiny.fit(model, optimizer, steps, data, after)
    return found, s


def test_the_sparsity_is_cubic():
    """s_i = 0, s_f = .9, progress 0 .1 .25 .5 .75 1 → 0 .2439 .5203 .7875 .8859 .9"""
    masks, s = history(GMP(0.9, schedule=Cubic(start=0, end=20, every=1)), steps=24)
    for t, share in ((0, 0.0), (2, 0.2439), (5, 0.5203125), (10, 0.7875), (15, 0.8859375), (20, 0.9), (24, 0.9)):
        for mask in masks[t].values():
            kept = math.floor((1 - Fraction(str(share))) * mask.numel() + Fraction(1, 2))
            assert int(mask.sum()) == kept, t
    assert s.sparsity == pytest.approx(0.9, abs=0.01)


def test_updates_fall_on_the_interval_and_on_the_end():
    masks, _ = history(GMP(0.9, schedule=Cubic(start=3, end=14, every=4)), steps=20)
    changed = [t for t in range(1, 21) if any(not torch.equal(masks[t][n], masks[t - 1][n]) for n in masks[t])]
    assert changed == [7, 11, 14]  # at 3 it is still s_i = 0


@pytest.mark.parametrize(
    "allocation", ["uniform", "erdos_renyi_kernel", "global", "lamp", AtLeast("global", share=0.01)]
)
def test_masks_are_nested_and_keep_the_largest(allocation: object):
    masks, s = history(GMP(0.9, schedule=Cubic(end=0.75, every=1), allocation=allocation), steps=20)
    for before, after in itertools.pairwise(masks):
        assert not any(bool((m & ~before[n]).any()) for n, m in after.items())
    assert s.sparsity == pytest.approx(0.9, abs=0.005)


def test_at_each_update_the_smallest_go():
    model, data = tiny.mlp(), tiny.batches()
    optimizer = tiny.sgd(model)
    s = rarefy.sparsify(model, GMP(0.8, schedule=OneShot(at=5)), optimizer=optimizer, steps=10)
    dense, other = tiny.mlp(), None
    plain = tiny.sgd(dense)
    tiny.fit(dense, plain, 5, data)
    tiny.fit(model, optimizer, 5, data)
    for name, mask in s.masks.items():
        weight = dense.get_parameter(name).detach()
        other = weight.abs().flatten().sort(descending=True).values
        assert torch.equal(mask, weight.abs() >= other[int(mask.sum()) - 1])
        assert torch.equal(model.get_parameter(name), weight * mask)


def test_an_initial_sparsity_holds_from_the_start():
    masks, _ = history(GMP(0.9, schedule=Cubic(initial=0.5, start=4, end=8, every=4)), steps=9)
    kept = [tiny.total(m.values()) for m in masks]
    assert kept[0] == kept[4] == 60 + 48 + 16
    assert kept[8] == kept[9] == 12 + 10 + 3


@pytest.mark.parametrize("schedule", ["at_init", OneShot(at=0), OneShot(at=0.0)])
def test_masks_of_the_first_step(schedule: object):
    masks, _ = history(GMP(0.9, schedule=schedule), steps=1)
    assert tiny.total(masks[0].values()) == 12 + 10 + 3


def test_n_m_is_masked_where_the_schedule_leaves_zero():
    masks, _ = history(GMP(pattern="2:4", schedule=OneShot(at=0.5)), steps=4)
    assert [all(bool(m.all()) for m in at.values()) for at in masks] == [True, True, False, False, False]


def test_sparsities_by_layer_are_reached_in_step():
    masks, _ = history(GMP(0.8, schedule=Cubic(end=4, every=2), allocation={"0": 0.4, "2.weight": 0.9}), steps=4)
    # halfway 1 − (1 − ½)³ = .875 of each: .65 of 120, .2125 of 96, .3 of 32
    assert [int(m.sum()) for m in masks[2].values()] == [78, 20, 10]
    assert [int(m.sum()) for m in masks[4].values()] == [72, 10, 6]


def test_average_parameters_of_the_journey():
    """From a quarter to three quarters of the run: N̄ = N·(1 − .625 s) = .6875 N at s = .5."""
    schedule = Cubic(start=0.25, end=0.75, every=1)
    _, s = history(GMP(0.5, schedule=schedule), steps=200)
    assert s.ledger.average_parameters() / 248 == pytest.approx(0.6875, abs=0.005)
    assert rarefy.axes.average_sparsity(schedule, 0.5, 200) == 0.3125


def test_what_could_only_fail_later_fails_at_once():
    cases = [
        (GMP(), "give sparsity="),
        (GMP(0.3, schedule=Cubic(initial=0.5)), "masks only get sparser"),
        (GMP(0.9, schedule=Cubic(end=1000)), "after the run of 50 steps"),
        (GMP(0.9, schedule=OneShot(at=3), allocation={"nowhere": 0.5}), "fits no layer"),
        (GMP(0.999, allocation=AtLeast("global", units=9)), "floors of up to 9 units"),
    ]
    for method, match in cases:
        model = tiny.mlp()
        before = tiny.picture(model)
        with pytest.raises(ValueError, match=match):
            rarefy.sparsify(model, method, optimizer=tiny.sgd(model), steps=50)
        assert tiny.picture(model) == before


def test_a_schedule_that_does_not_fit_a_late_run_is_refused_before_its_first_step():
    model = tiny.mlp()
    s = rarefy.sparsify(model, GMP(0.9, schedule=Cubic(end=100)))
    with pytest.raises(ValueError, match="after the run of 50 steps"):
        s.attach(tiny.sgd(model), steps=50)
