"""The life of a handle: attach, detach, attach again, and what is refused."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from core.handles import MANY, trained
from laws.training import OPTIMIZERS, STEPS, Run, begin, differences, model_of, small
from tiny import equal_models, picture


def masked_zeros(run: Run) -> bool:
    weights = dict(run.model.named_parameters())
    return all(bool((weights[name][~mask] == 0).all()) for name, mask in run.handle.masks.items())


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
