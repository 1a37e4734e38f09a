import pytest
import torch

import rarefy
import tiny
from rarefy import check


def pruned(method: rarefy.Method | None = None) -> tuple[torch.nn.Module, rarefy.Sparsity]:
    model = tiny.mlp()
    return model, rarefy.sparsify(model, method or rarefy.Magnitude(0.5, allocation="uniform"))


def broken(model: torch.nn.Module, s: rarefy.Sparsity) -> list[str]:
    with pytest.raises(RuntimeError) as error:
        check(model, s)
    first, *lines = str(error.value).split("\n")
    assert first.startswith(f"{len(lines)} promise")
    return [line.strip() for line in lines]


def test_a_kept_promise():
    check(*pruned())


def test_values_that_are_not_zero():
    model, s = pruned()
    with torch.no_grad():
        model[2].weight.fill_(1.0)
    assert broken(model, s) == ["2.weight: 48 of 48 masked values are not +0.0"]


@pytest.mark.parametrize("value", [-0.0, 1e-320, float("nan")])
def test_zero_means_plus_zero(value: float):
    model, s = pruned()
    at = (~s.masks["0.weight"]).nonzero()[0]
    with torch.no_grad():
        model[0].weight[tuple(at)] = value
    assert broken(model, s) == ["0.weight: 1 of 60 masked values are not +0.0"]


def test_a_kept_weight_may_be_zero():
    model, s = pruned()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    check(model, s)


def test_followers_are_promised_too():
    model = tiny.cnn()
    s = rarefy.sparsify(model, rarefy.Magnitude(0.5, pattern="channel"))
    dead = int((~s.masks["0.weight"].flatten(1).any(1)).sum())
    with torch.no_grad():
        model[1].weight.fill_(2.0)
    assert broken(model, s) == [f"1.weight: {dead} of {dead} masked values are not +0.0"]


def test_another_pattern():
    model, s = pruned(rarefy.Magnitude(pattern="2:4"))
    site = s.sites[2]
    swapped = site.mask.roll(1, 1)
    swapped[0] = tiny.mask([1, 1, 1, 0, 1, 0, 0, 0])
    s.keep(site, swapped)
    s.commit()
    assert broken(model, s) == ["4.weight: the mask does not obey the pattern 2:4"]


def test_another_count():
    model, s = pruned()
    mask = s.sites[0].mask
    mask[tuple(mask.nonzero()[0])] = False
    s.keep(s.sites[0], mask)
    s.commit()
    assert broken(model, s) == ["0.weight: 59 units of unstructured are kept, 60 were asked for"]


def test_gradients_that_do_not_reach():
    model, s = pruned()
    s.keep(s.sites[0], s.sites[0].mask, torch.zeros(12, 10, dtype=torch.bool))
    s.commit()
    assert broken(model, s) == ["0.weight: gradients do not reach all kept weights"]


def test_parameters_that_were_replaced_or_are_gone():
    model, s = pruned()
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().clone())
    assert broken(model, s) == ["0.weight: the parameter was replaced after sparsify: attach again"]
    other = torch.nn.Sequential(model[0])
    assert len(broken(other, s)) == 3
    assert "another model" in broken(other, s)[1]


def test_a_training_method_that_nobody_watches():
    model, s = pruned(rarefy.RigL(0.5))
    assert broken(model, s) == [
        "no optimizer is attached, so nothing holds zeros while training: call attach(optimizer, steps)"
    ]
    s.attach(tiny.sgd(model), steps=10)
    check(model, s)
    s.detach()
    assert len(broken(model, s)) == 1
    s.end()
    check(model, s)


def test_weights_behind_the_weights():
    """Writing to the sparse weight of a straight-through method is lost at the next step: the master is what counts."""
    model = tiny.mlp()
    s = rarefy.sparsify(model, rarefy.SRSTE(), optimizer=tiny.sgd(model))
    check(model, s)
    with torch.no_grad():
        model[4].weight.mul_(2)
    assert broken(model, s) == [
        "4.weight: 16 kept weights were written to and the next step will undo it: attach again to keep them"
    ]
    s.attach(tiny.sgd(model))
    check(model, s)


def test_all_broken_promises_are_named_at_once():
    model, s = pruned(rarefy.RigL(0.5))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.fill_(1.0)
    assert len(broken(model, s)) == 3
