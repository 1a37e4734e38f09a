"""The life of a handle: attach, detach, attach again, end; what it counts, and what it refuses."""

import copy
import gc
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from laws.training import OPTIMIZERS, STEPS, TRAINING, Run, batch, begin, differences, loss_of, model_of, small
from rarefy import Every
from tiny import equal_models, picture

MANY = [*TRAINING, "Magnitude"]


def masked_zeros(run: Run) -> bool:
    weights = dict(run.model.named_parameters())
    return all(bool((weights[name][~mask] == 0).all()) for name, mask in run.handle.masks.items())


def trained(model: nn.Module, optimizers: Any, steps: int, step: int = 0) -> None:
    Run(model, optimizers, step=step).train(step + steps)


# -- fine-tuning after a one-shot method -----------------------------------------------------------------------------


def pruned(seed: int = 0) -> tuple[nn.Module, rarefy.Sparsity, torch.optim.Optimizer]:
    """Trained dense with AdamW, then pruned at one stroke."""
    model = model_of(seed)
    optimizers = OPTIMIZERS["AdamW"](model)
    trained(model, optimizers, 5)
    return model, rarefy.sparsify(model, rarefy.Magnitude(0.8)), optimizers[0]


def revived(model: nn.Module, handle: rarefy.Sparsity) -> float:
    """Share of the masked weights that are not zero."""
    weights = dict(model.named_parameters())
    masked = torch.cat([weights[name][~mask] for name, mask in handle.masks.items()])
    return float((masked != 0).float().mean())


@pytest.mark.parametrize(("optimizer", "share"), [("as it was", 0.8), ("new", 0.4)])
def test_one_step_without_a_handle_brings_weights_back(optimizer: str, share: float):
    """What `attach` is for: by its momentum AdamW revives four fifths of the zeros in one step. A new one revives those
    whose gradient is not zero."""
    model, handle, used = pruned()
    assert revived(model, handle) == 0.0
    trained(model, (used,) if optimizer == "as it was" else OPTIMIZERS["AdamW"](model), 1, step=5)
    assert revived(model, handle) > share


@pytest.mark.parametrize("optimizer", ["as it was", "new"])
def test_attached_zeros_stay_zeros(optimizer: str):
    model, handle, used = pruned()
    optimizers = (used,) if optimizer == "as it was" else OPTIMIZERS["AdamW"](model)
    handle.attach(optimizers)
    for step in range(5, 12):
        trained(model, optimizers, 1, step)
        assert revived(model, handle) == 0.0
        rarefy.check(model, handle)
    assert handle.step == 7


# -- attach late, again, elsewhere -----------------------------------------------------------------------------------


class Trainer:
    """Makes its optimizer when fit() is called, and never shows it before."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def fit(self, model: nn.Module, steps: int) -> None:
        optimizers = OPTIMIZERS["SGD"](model)
        self.callback(optimizers, steps)
        trained(model, optimizers, steps)


@pytest.mark.parametrize("name", MANY)
def test_an_optimizer_that_is_made_late(name: str):
    expected = begin(small(name), OPTIMIZERS["SGD"]).train(STEPS)
    model = model_of()
    handle = rarefy.sparsify(model, small(name), seed=3)
    Trainer(handle.attach).fit(model, STEPS)
    assert equal_models(model, expected.model)
    assert not differences(handle.state_dict(), expected.handle.state_dict())


@pytest.mark.parametrize("name", MANY)
def test_attaching_again_changes_nothing(name: str):
    """The same optimizer twice is watched once."""
    expected = begin(small(name), OPTIMIZERS["SGD"]).train(20)
    run = begin(small(name), OPTIMIZERS["SGD"])
    for step in range(1, 21):
        run.handle.attach(run.optimizers, STEPS if step % 2 else None)
        run.train(step)
    assert not differences(run.saved(), expected.saved())


def test_another_optimizer_in_the_middle():
    run = begin(small("RigL"), OPTIMIZERS["SGD"]).train(10)
    first, run.optimizers = run.optimizers[0], OPTIMIZERS["AdamW"](run.model)
    run.handle.attach(run.optimizers)
    assert not first._optimizer_step_pre_hooks
    run.train(20)
    assert run.handle.step == 20
    assert masked_zeros(run)
    rarefy.check(run.model, run.handle)


def test_detached_means_unwatched_and_attached_again_means_zeros():
    run = begin(rarefy.Random(0.75), OPTIMIZERS["SGD"]).train(4)
    masks = run.handle.masks
    run.handle.detach()
    run.train(6)
    assert run.handle.step == 4
    assert not masked_zeros(run)
    with pytest.raises(RuntimeError, match="masked values are not"):
        rarefy.check(run.model, run.handle)
    run.handle.attach(run.optimizers)
    assert masked_zeros(run)
    run.train(9)
    assert run.handle.step == 7
    assert all(torch.equal(mask, masks[name]) for name, mask in run.handle.masks.items())
    rarefy.check(run.model, run.handle)


@pytest.mark.parametrize("before", [True, False])
def test_learning_rate_schedulers(before: bool):
    """Made before or after attaching; they wrap `step` themselves, and complain when steps come in another order."""
    model = model_of()
    optimizer = OPTIMIZERS["SGD"](model)[0]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5) if before else None
    handle = rarefy.sparsify(model, rarefy.RigL(0.75, every=1), optimizer=optimizer, steps=8)
    scheduler = scheduler or torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    for step in range(6):
        trained(model, (optimizer,), 1, step)
        scheduler.step()
    assert handle.step == 6
    assert handle.learning_rate(handle.sites[0]) == pytest.approx(0.1 * 0.5**3)


def test_a_step_is_complete_when_the_last_optimizer_has_stepped():
    run = begin(small("RigL"), OPTIMIZERS["Muon + AdamW"])
    assert len(run.handle.optimizers) == 2
    run.train(13)
    assert run.handle.step == 13
    assert masked_zeros(run)


# -- what attach refuses, and leaves as it was -----------------------------------------------------------------------


def _other_model(run: Run) -> Any:
    return OPTIMIZERS["SGD"](model_of())


def _embedding(run: Run) -> Any:
    return torch.optim.SparseAdam(list(run.model.parameters()))


REFUSED = {
    "an optimizer of another model": (_other_model, {}, ValueError, "no given optimizer holds"),
    "SparseAdam": (_embedding, {}, ValueError, "SparseAdam"),
    "nothing": (lambda run: (), {}, ValueError, "holds no optimizer"),
    "no optimizer": (lambda run: "adam", {}, TypeError, "is no torch.optim.Optimizer"),
    "other steps": (lambda run: run.optimizers, {"steps": 50}, ValueError, f"step 5 of a run of {STEPS} is complete"),
    "negative steps": (lambda run: run.optimizers, {"steps": -1}, ValueError, "0 or more"),
    "a truth": (lambda run: run.optimizers, {"steps": True}, ValueError, "an int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_attach_changes_nothing(name: str):
    make, arguments, kind, says = REFUSED[name]
    expected = begin(small("RigL"), OPTIMIZERS["SGD"]).train(20)
    run = begin(small("RigL"), OPTIMIZERS["SGD"]).train(5)
    optimizer = make(run)
    before = picture(run.model)
    with pytest.raises(kind, match=says):
        run.handle.attach(optimizer, **arguments)
    assert picture(run.model) == before
    assert not differences(run.train(20).saved(), expected.saved())


@pytest.mark.parametrize("name", ["RigL", "GMP", "TopKAST"])
def test_schedules_need_the_length_of_the_run(name: str):
    model = model_of()
    handle = rarefy.sparsify(model, small(name))
    with pytest.raises(ValueError, match="needs steps="):
        handle.attach(OPTIMIZERS["SGD"](model))
    handle.attach(OPTIMIZERS["SGD"](model), 40)
    assert handle.attach(OPTIMIZERS["SGD"](model), 60).steps == 60  # not a step is done yet


def test_a_fraction_of_a_step():
    handle = rarefy.sparsify(model_of(), small("RigL"))
    unchecked = inspect.unwrap(rarefy.Sparsity.checked_steps)  # the types of arguments are checked in tests only
    with pytest.raises(ValueError, match=r"steps=60.0: .*an int"):
        unchecked(handle, 60.0)


def test_past_its_steps_a_run_goes_on_with_the_last_masks():
    run = begin(small("GMP"), OPTIMIZERS["SGD"]).train(STEPS)
    masks = run.handle.masks
    run.train(STEPS + 5)
    assert run.handle.step == STEPS + 5
    assert all(torch.equal(mask, masks[name]) for name, mask in run.handle.masks.items())
    assert masked_zeros(run)


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
