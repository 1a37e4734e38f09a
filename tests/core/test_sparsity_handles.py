"""The life of a handle: beside others, at its end, copied; what a user reads of it."""

import copy
import gc

import pytest
import torch
from torch import nn

import rarefy
from core.handles import MANY, trained
from laws.training import OPTIMIZERS, STEPS, Run, batch, begin, differences, loss_of, model_of, small
from rarefy import Every
from tiny import equal_models, picture

# -- two handles -----------------------------------------------------------------------------------------------------


def test_two_live_handles_on_one_model():
    run = begin(small("RigL"), OPTIMIZERS["SGD"]).train(3)
    before = picture(run.model)
    with pytest.raises(RuntimeError, match=r"held by a live handle, <Sparsity RigL.*end\(\).*detach\(\) first"):
        rarefy.sparsify(run.model, rarefy.Magnitude(0.5))
    assert picture(run.model) == before
    run.handle.detach()
    second = rarefy.sparsify(run.model, rarefy.Magnitude(0.5), optimizer=run.optimizers)
    with pytest.raises(RuntimeError, match="held by a live handle, <Sparsity Magnitude"):
        run.handle.attach(run.optimizers)
    second.end()
    run.handle.attach(run.optimizers)


@pytest.mark.parametrize("inner", ["first", "last"])
def test_a_handle_on_a_part_and_one_on_the_whole(inner: str):
    part, model = model_of(), nn.Sequential()
    model.append(part).append(nn.Linear(4, 4))
    one, two = (part, model) if inner == "first" else (model, part)
    optimizer = OPTIMIZERS["SGD"](model)
    handle = rarefy.sparsify(one, rarefy.Magnitude(0.5), optimizer=optimizer)
    with pytest.raises(RuntimeError, match="live handle"):
        rarefy.sparsify(two, rarefy.Magnitude(0.5))
    handle.end()
    rarefy.sparsify(two, rarefy.Magnitude(0.5), optimizer=optimizer)


def test_handles_on_two_parts_of_one_model():
    """They share an optimizer and no weight: each minds its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    handles = [
        rarefy.sparsify(model["a"], rarefy.SET(0.5, every=Every(2, 1.0)), optimizer=optimizer, steps=9),
        rarefy.sparsify(model["b"], rarefy.Random(0.75), optimizer=optimizer),
    ]
    for step in range(7):
        optimizer.zero_grad()
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        model["b"](model["a"](x)).square().mean().backward()
        optimizer.step()
        for part, handle in zip(model.values(), handles, strict=True):
            rarefy.check(part, handle)
    assert [h.step for h in handles] == [7, 7]


# -- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANY)
def test_end_is_final_and_may_be_called_twice(name: str):
    run = begin(small(name), OPTIMIZERS["SGD"]).train(8)
    weights, masks = copy.deepcopy(run.model.state_dict()), run.handle.masks
    for _ in range(2):
        run.handle.end()
        assert run.handle.ended
        assert not run.handle.attached
        assert not differences(run.model.state_dict(), weights)
        assert all(torch.equal(mask, masks[key]) for key, mask in run.handle.masks.items())
        rarefy.check(run.model, run.handle)
    with pytest.raises(RuntimeError, match=r"has ended: call rarefy.sparsify again"):
        run.handle.attach(run.optimizers)
    assert run.handle.ledger.steps == 8
    run.train(10)
    assert run.handle.step == 8


def test_end_without_ever_attaching():
    model = model_of()
    handle = rarefy.sparsify(model, rarefy.Magnitude(0.75))
    handle.end()
    rarefy.check(model, handle)


def test_end_zeroes_what_was_written_meanwhile():
    model = model_of()
    handle = rarefy.sparsify(model, rarefy.Magnitude(0.75))
    trained(model, OPTIMIZERS["SGD"](model), 2)
    handle.end()
    rarefy.check(model, handle)


# -- check -----------------------------------------------------------------------------------------------------------


def test_a_training_method_must_be_attached():
    model = model_of()
    handle = rarefy.sparsify(model, small("RigL"))
    with pytest.raises(RuntimeError, match="no optimizer is attached"):
        rarefy.check(model, handle)
    handle.attach(OPTIMIZERS["SGD"](model), STEPS)
    rarefy.check(model, handle)
    handle.detach()
    with pytest.raises(RuntimeError, match="no optimizer is attached"):
        rarefy.check(model, handle)


# -- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANY)
def test_a_copied_handle_has_a_model_of_its_own(name: str):
    run = begin(small(name), OPTIMIZERS["SGD"]).train(6)
    twin = copy.deepcopy(run.handle)
    assert twin.model is not run.model
    assert not twin.attached
    assert not differences(twin.state_dict(), run.handle.state_dict())
    ours = {id(p) for p in run.model.parameters()}
    assert all(id(h.parameter) not in ours for h in twin.held())
    assert {id(h.parameter) for h in twin.held()} <= {id(p) for p in twin.model.parameters()}
    twin.attach(OPTIMIZERS["SGD"](twin.model))
    rarefy.check(twin.model, twin)
    assert not differences(run.train(12).saved(), begin(small(name), OPTIMIZERS["SGD"]).train(12).saved())


def test_a_copy_is_a_copy_whatever_became_of_the_weights():
    """Copying proves nothing and refuses nothing."""
    run = begin(rarefy.Random(0.75), OPTIMIZERS["SGD"])
    run.handle.detach()
    run.train(2)
    twin = copy.deepcopy(run.handle)
    assert equal_models(twin.model, run.model)


def test_a_copy_of_an_ended_handle_has_ended():
    run = begin(small("RigL"), OPTIMIZERS["SGD"]).train(2)
    run.handle.end()
    assert copy.deepcopy(run.handle).ended


# -- what a user reads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANY)
def test_numbers_are_those_of_the_masks_at_every_step(name: str):
    run = begin(small(name), OPTIMIZERS["SGD"])
    sizes = {name: p.numel() for name, p in run.model.named_parameters()}
    ever = {key: torch.zeros_like(mask) for key, mask in run.handle.masks.items()}
    flips, last = 0, run.handle.masks
    for step in range(1, 21):
        masks = run.handle.masks
        kept = {key: int(mask.sum()) for key, mask in masks.items()}
        total = sum(sizes[key] for key in masks)
        assert run.handle.sparsity == 1 - sum(kept.values()) / total
        assert all(run.handle.density(key) == count / sizes[key] for key, count in kept.items())
        assert run.handle.ledger.entries[-1].kept == list(kept.values())
        assert run.handle.ledger.nonzeros[-1][1] == sum(kept.values())
        flips += sum(int((masks[key] ^ last[key]).sum()) for key in masks)
        ever = {key: ever[key] | masks[key] for key in masks}
        assert run.handle.ledger.explored == sum(int(e.sum()) for e in ever.values()) / total
        assert run.handle.ledger.flip_rate() == pytest.approx(flips / (max(1, step - 1) * total))
        last = masks
        run.train(step)
    assert run.handle.step == run.handle.ledger.steps == 20


def test_density_of_what_is_no_site():
    run = begin(rarefy.Random(0.75), OPTIMIZERS["SGD"])
    with pytest.raises(KeyError, match=r"no site '1\.weight'; the sites are 0.weight, 3.weight, 5.weight"):
        run.handle.density("1.weight")


def test_repr_says_where_it_stands():
    run = begin(small("SRSTE"), OPTIMIZERS["SGD"]).train(2)
    assert repr(run.handle) == "<Sparsity SRSTE(): 50.00% of 3 sites, step 2 of 60>"
    assert repr(rarefy.sparsify(model_of(), rarefy.Magnitude(0.5))).endswith("step 0>")


def test_a_handle_dropped_in_the_middle_of_an_exception_is_found_out():
    """The traceback holds the frame of a failed run; once it is gone, so is the handle."""

    def fails(model: nn.Module) -> None:
        run = Run(model, OPTIMIZERS["SGD"](model))
        run.handle = rarefy.sparsify(model, rarefy.Random(0.5), optimizer=run.optimizers)
        loss_of(model, batch(0)).backward()
        raise ArithmeticError

    model = model_of()
    with pytest.raises(ArithmeticError):
        fails(model)
    gc.collect()
    rarefy.sparsify(model, rarefy.Random(0.5), optimizer=OPTIMIZERS["SGD"](model))
