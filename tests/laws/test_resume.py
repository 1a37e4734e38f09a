"""Law 5: stop after any optimizer step, restore model, optimizer and handle: what follows is the same to the bit."""

import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rarefy
from laws.training import (
    METHODS,
    OPTIMIZERS,
    ORDERS,
    STEPS,
    TRAINING,
    VARIANTS,
    Run,
    begin,
    differences,
    leaves,
    resume,
    small,
    snapshot,
    through_a_file,
)

MANY = [*TRAINING, *VARIANTS]

# Every training method, and every optimizer with state of a kind of its own; the orders of loading take turns.
SOME = [
    *((name, ("SGD", "AdamW")[index % 2]) for index, name in enumerate(MANY)),
    *(("RigL", name) for name in ("SGD", "Adagrad", "Rprop", "LBFGS", "Adafactor", "Muon + AdamW")),
    *(("TopKAST", name) for name in ("SGD", "AdamW", "Adamax", "ASGD")),
    ("SNIP", "SGD"),
]
SOME = list(dict.fromkeys(SOME))


def pairs() -> Iterator[tuple[str, str]]:
    """Every training method with every optimizer. Where another method runs the same code, variants and those that
    choose once, they take turns: a share of the optimizers each, so that each optimizer meets several."""
    for names, every in ((TRAINING, 1), (list(VARIANTS), 2), ([name for name in METHODS if name not in TRAINING], 4)):
        for (i, name), (j, optimizer) in itertools.product(enumerate(names), enumerate(OPTIMIZERS)):
            if (i + j) % every == 0:
                yield name, optimizer


THE_REST = [pair for pair in pairs() if pair not in SOME]


def assert_identical(one: Run, other: Run, when: str) -> None:
    found = differences(one.saved(), other.saved())
    assert not found, f"{when}: {found[:5]} and {len(found[5:])} more"


def stop_after_every_step(name: str, optimizer: str, order: str, *, scheduled: bool = True) -> None:
    """After each step all is thrown away and restored from what was saved, beside a run that never stops."""
    method, make = small(name), OPTIMIZERS[optimizer]
    whole, stopped = begin(method, make, scheduled=scheduled), begin(method, make, scheduled=scheduled)
    for step in range(STEPS):
        stopped = resume(snapshot(stopped), method, make, order=order)
        whole.train(step + 1)
        stopped.train(step + 1)
        assert_identical(whole, stopped, f"step {step + 1}, after as many stops")
    assert whole.handle is not None
    rarefy.check(whole.model, whole.handle)


@pytest.mark.parametrize(("name", "optimizer"), SOME)
def test_stopping_after_every_step_changes_nothing(name: str, optimizer: str):
    order = ORDERS[SOME.index((name, optimizer)) % len(ORDERS)]
    stop_after_every_step(name, optimizer, order)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizer"), THE_REST)
def test_stopping_after_every_step_changes_nothing_at_length(name: str, optimizer: str):
    order = ORDERS[THE_REST.index((name, optimizer)) % len(ORDERS)]
    stop_after_every_step(name, optimizer, order, scheduled=order != "attached later")


def stop_once(name: str, optimizer: str, stops: Sequence[int]) -> None:
    """Stopped after one step only, through a file, and on to the end; for each of these steps, in order."""
    method, make = small(name), OPTIMIZERS[optimizer]
    whole, saved = begin(method, make), {}
    for stop in stops:
        saved[stop] = through_a_file(whole.train(stop).saved())
    whole.train(STEPS)
    for stop in stops:
        restored = resume(saved[stop], method, make, order=ORDERS[stop // 2 % len(ORDERS)])
        assert_identical(whole, restored.train(STEPS), f"stopped after step {stop}")


@pytest.mark.parametrize("name", MANY)
def test_one_stop_on_the_way(name: str):
    stop_once(name, "AdamW", [1 + 5 * MANY.index(name) % STEPS])


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "first"), [("SGD", 0), ("AdamW", 1)])
@pytest.mark.parametrize("name", MANY)
def test_one_stop_anywhere(name: str, optimizer: str, first: int):
    """After each step, the optimizers taking turns."""
    stop_once(name, optimizer, range(first, STEPS + 1, 2))


# -- where the state lies meanwhile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_the_state_is_tensors_and_json(tmp_path: Path, name: str):
    """safetensors for the tensors, JSON for the rest, and nothing lost."""
    method, make = small(name), OPTIMIZERS["SGD"]
    run = begin(method, make).train(9)
    saved = snapshot(run)
    tensors = {path: value for path, value in leaves(saved["handle"]) if isinstance(value, Tensor)}
    save_file({path: value.contiguous() for path, value in tensors.items()}, tmp_path / "state.safetensors")
    (tmp_path / "state.json").write_text(json.dumps(_named(saved["handle"])))
    loaded = load_file(tmp_path / "state.safetensors")
    saved["handle"] = _filled(json.loads((tmp_path / "state.json").read_text()), loaded)
    assert_identical(run, resume(saved, method, make), "from files")


def _named(value: Any, path: str = "") -> Any:
    """Every tensor replaced by its path."""
    if isinstance(value, dict):
        return {key: _named(item, f"{path}/{key}") for key, item in value.items()}
    return {"tensor": path} if isinstance(value, Tensor) else value


def _filled(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _filled(item, tensors) for key, item in value.items()}
    return value


def test_masks_are_one_bit_a_weight():
    run = begin(rarefy.Magnitude(0.5), OPTIMIZERS["SGD"])
    for (_, mask), saved in zip(run.handle.masks.items(), run.handle.state_dict()["per_site"].values(), strict=True):
        assert saved["mask"].dtype is torch.uint8
        assert saved["mask"].numel() == -(-mask.numel() // 8)


@pytest.mark.parametrize("name", MANY)
def test_a_saved_state_is_a_snapshot(name: str):
    run = begin(small(name), OPTIMIZERS["SGD"]).train(8)
    saved = run.handle.state_dict()
    before = copy.deepcopy(saved)
    run.train(16)
    assert not differences(saved, before)


# -- restoring leaves the model as it is -----------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_resume_leaves_the_model_untouched(name: str, attached: bool):
    method, make = small(name), OPTIMIZERS["AdamW"]
    run = begin(method, make).train(11)
    saved = run.handle.state_dict()
    run.handle.detach()
    before = copy.deepcopy(run.model.state_dict())
    random = torch.get_rng_state()
    rarefy.sparsify(run.model, method, optimizer=run.optimizers if attached else None, steps=STEPS, resume=saved)
    assert not differences(run.model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_without_resume_a_method_would_choose_anew():
    """What `resume` is for: begin() destroys the weights that were trained."""
    run = begin(small("RigL"), OPTIMIZERS["SGD"]).train(20)
    run.handle.detach()
    before = copy.deepcopy(run.model.state_dict())
    rarefy.sparsify(run.model, small("RigL"), optimizer=run.optimizers, steps=STEPS)
    assert differences(run.model.state_dict(), before)


def test_a_detached_copy_in_one_deepcopy_goes_on_identically():
    run = begin(small("RigL"), OPTIMIZERS["AdamW"]).train(13)
    model, optimizers, handle = copy.deepcopy((run.model, run.optimizers, run.handle))
    assert not handle.attached
    handle.attach(optimizers)
    twin = Run(model, optimizers, handle, (), run.step)
    for step in range(14, STEPS + 1):
        assert_identical(run.train(step), twin.train(step), f"step {step}")


@pytest.mark.parametrize("name", MANY)
def test_twins_part_ways_without_touching_each_other(name: str):
    run = begin(small(name), OPTIMIZERS["SGD"]).train(6)
    alone = snapshot(begin(small(name), OPTIMIZERS["SGD"]).train(12))
    model, optimizers, handle = copy.deepcopy((run.model, run.optimizers, run.handle))
    handle.attach(optimizers)
    Run(model, optimizers, handle, (), 40).train(46)  # other data
    assert not differences(run.train(12).saved(), alone)
