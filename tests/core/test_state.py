"""The handle's state as data: what it holds, and what is refused before anything is taken over."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from laws.training import METHODS, OPTIMIZERS, STEPS, VARIANTS, Run, begin, differences, leaves, model_of, small
from tiny import equal_models

JSON = (int, float, str, bool, type(None))


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    """Runs that stand at step 9; not to be trained on."""
    return {name: begin(small(name), OPTIMIZERS["SGD"]).train(9) for name in ("RigL", "SRSTE", "TopKAST")}


# -- what it holds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_tensors_and_json_values_only(name: str):
    state = begin(small(name), OPTIMIZERS["SGD"]).train(3).handle.state_dict()
    for path, item in leaves(state):
        assert isinstance(item, (Tensor, *JSON)), path
    keys = [part for path, _ in leaves(state) for part in path.split("/")]
    assert all(isinstance(key, str) for key in keys)


def test_what_a_reader_finds(runs: dict[str, Run]):
    handle = runs["TopKAST"].handle
    state = handle.state_dict()
    assert (state["version"], state["step"], state["steps"], state["seed"]) == (1, 9, STEPS, 3)
    assert rarefy.method_from_dict(state["method"]) == handle.method
    assert list(state["per_site"]) == list(handle.masks)
    for name, saved in state["per_site"].items():
        p = handle.model.get_parameter(name)
        unpacked = _unpacked(saved["mask"], p.shape)
        assert torch.equal(unpacked, handle.masks[name])
        assert torch.equal(saved["master"] * unpacked, p)
        assert bool((_unpacked(saved["trainable"], p.shape) | ~unpacked).all())


def _unpacked(packed: Tensor, shape: torch.Size) -> Tensor:
    """Bit i of byte j is entry 8j + i, taken literally."""
    entries = [bool(int(byte) >> bit & 1) for byte in packed.tolist() for bit in range(8)]
    return torch.tensor(entries[: shape.numel()]).reshape(shape)


def test_nothing_is_shared_with_the_handle(runs: dict[str, Run]):
    for run in runs.values():
        state, before = run.handle.state_dict(), copy.deepcopy(run.handle.state_dict())
        for _, item in leaves(state):
            if isinstance(item, Tensor):
                item.zero_()
        state["ledger"]["entries"].clear()
        assert not differences(run.handle.state_dict(), before)


def test_nothing_of_a_loaded_state_is_shared_with_it():
    run = begin(small("SRSTE"), OPTIMIZERS["SGD"]).train(4)
    run.handle.memory["history"] = [{"round": 0}]
    saved = run.handle.state_dict()
    run.handle.detach()
    again = rarefy.sparsify(run.model, small("SRSTE"), resume=saved)
    before = again.state_dict()
    for _, item in leaves(saved):
        if isinstance(item, Tensor):
            item.zero_()
    saved["memory"]["history"].append("more")
    saved["ledger"]["entries"].clear()
    assert not differences(again.state_dict(), before)


def test_memory_of_the_method_comes_back():
    run = begin(small("RigL"), OPTIMIZERS["SGD"])
    run.handle.memory["history"] = [{"loss": 0.5}, [1, 2]]
    run.handle.sites[1].memory["saliency"] = torch.arange(3.0)
    saved = run.handle.state_dict()
    run.handle.detach()
    again = rarefy.sparsify(run.model, small("RigL"), resume=saved)
    assert again.memory == {"history": [{"loss": 0.5}, [1, 2]]}
    assert torch.equal(again.sites[1].memory["saliency"], torch.arange(3.0))


@pytest.mark.parametrize("name", ["RigL", "SRSTE"])
def test_a_handle_that_has_ended_comes_back_ended(name: str):
    run = begin(small(name), OPTIMIZERS["SGD"]).train(5)
    run.handle.end()
    saved = run.handle.state_dict()
    again = rarefy.sparsify(run.model, small(name), resume=saved)
    assert again.ended
    assert all(torch.equal(mask, run.handle.masks[key]) for key, mask in again.masks.items())
    with pytest.raises(RuntimeError, match="has ended"):
        again.attach(run.optimizers)


# -- in place --------------------------------------------------------------------------------------------------------


def test_an_attached_handle_can_be_loaded():
    """Frameworks build everything first and load it then; the handle stays attached, now by what was loaded."""
    run, other = begin(small("TopKAST"), OPTIMIZERS["SGD"]).train(7), begin(small("TopKAST"), OPTIMIZERS["SGD"])
    other.model.load_state_dict(run.model.state_dict())
    other.handle.load_state_dict(run.handle.state_dict())
    assert other.handle.attached
    assert not differences(other.handle.state_dict(), run.handle.state_dict())
    rarefy.check(other.model, other.handle)


def test_loading_the_state_of_an_ended_handle_detaches():
    run, other = begin(small("RigL"), OPTIMIZERS["SGD"]).train(7), begin(small("RigL"), OPTIMIZERS["SGD"])
    run.handle.end()
    other.model.load_state_dict(run.model.state_dict())
    other.handle.load_state_dict(run.handle.state_dict())
    assert other.handle.ended
    assert not other.handle.attached


# -- what is refused -------------------------------------------------------------------------------------------------


def flip(packed: Tensor, *entries: int) -> Tensor:
    packed = packed.clone()
    for entry in entries:
        packed[entry // 8] ^= 1 << entry % 8
    return packed


def _site(edit: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda state: edit(state["per_site"]["0.weight"])


def _drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return edit


def _put(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return edit


def _first(mask: Tensor, kept: bool) -> int:
    return int((mask.flatten() == kept).nonzero()[0])


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "empty": (dict.clear, "no state of a rarefy handle: it lacks"),
    "another version": (_put(2, "version"), "version 2; this rarefy reads version 1"),
    "no version": (_drop("version"), "it lacks version"),
    **{f"no {key}": (_drop(key), f"it lacks {key}") for key in ("ledger", "generator", "per_site", "step", "memory")},
    "another method": (_put(rarefy.SET(0.7).to_dict(), "method"), r"made by SET\(sparsity=0.7\), but RigL"),
    "no method": (_put("RigL", "method"), "made by 'RigL', but RigL"),
    "other sites": (_put("0123456789abcdef", "sites"), "another model"),
    "a site is missing": (_drop("per_site", "5.weight"), "another model"),
    "a negative step": (_put(-1, "step"), "step=-1"),
    "a fractional step": (_put(1.5, "step"), "step=1.5"),
    "a short mask": (_site(lambda s: s.update(mask=s["mask"][:-1])), "packs into 24 bytes of uint8; got 23"),
    "a mask of another type": (_site(lambda s: s.update(mask=s["mask"].long())), "of torch.int64"),
    "a mask that is no tensor": (_site(lambda s: s.update(mask=[1, 2])), "is list, not a tensor"),
    "no mask": (_drop("per_site", "0.weight", "mask"), "'0.weight' lacks mask"),
    "one bit more": (_site(lambda s: s.update(mask=s["mask"] | 1, explored=s["explored"] | 1)), "its ledger says"),
    "all bits": (_site(lambda s: s.update(mask=s["mask"] | 255)), "its ledger says"),
    "no bits": (_site(lambda s: s.update(mask=s["mask"] & 0)), "its ledger says"),
    "never explored": (_site(lambda s: s.update(explored=s["explored"] & 0)), "that it never explored"),
    "short explored": (_site(lambda s: s.update(explored=s["explored"][:3])), "packs into 24 bytes"),
    "half a generator": (_put(torch.zeros(100, dtype=torch.uint8), "generator"), "no state of a random generator"),
    "no tensor for a generator": (_put("abc", "generator"), "no state of a random generator"),
    "half a ledger": (_drop("ledger", "entries"), "no ledger"),
    "no ledger at all": (_put([], "ledger"), "no ledger"),
    "another ledger": (_put(["0.weight"], "ledger", "names"), "counts other sites"),
    "a broken entry": (_put([{"step": 0}], "ledger", "entries"), "no ledger"),
    "a short entry": (_put([{"step": 0, "kept": [1], "trainable": [1]}], "ledger", "entries"), "counts other sites"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_is_refused_and_nothing_changes(runs: dict[str, Run], name: str):
    edit, says = DAMAGE[name]
    saved = runs["RigL"].handle.state_dict()
    if name == "one bit more":  # of an entry that is masked
        at = _first(runs["RigL"].handle.masks["0.weight"], kept=False)
        entry = saved["per_site"]["0.weight"]
        entry.update(mask=flip(entry["mask"], at), explored=flip(entry["explored"], at) | entry["explored"])
    else:
        edit(saved)
    model = copy.deepcopy(runs["RigL"].model)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=says):
        rarefy.sparsify(model, small("RigL"), optimizer=OPTIMIZERS["SGD"](model), resume=saved)
    assert equal_models(model, before)


def test_two_flipped_bits_do_not_fit_the_weights(runs: dict[str, Run]):
    """As many kept as the ledger says, but not those that are not zero."""
    saved = runs["RigL"].handle.state_dict()
    mask = runs["RigL"].handle.masks["0.weight"]
    weight = runs["RigL"].model.get_parameter("0.weight").flatten()
    kept = int((mask.flatten() & (weight != 0)).nonzero()[0])
    entry = saved["per_site"]["0.weight"]
    entry["mask"] = flip(entry["mask"], kept, _first(mask, kept=False))
    entry["explored"] = entry["explored"] | entry["mask"]
    with pytest.raises(ValueError, match=r"1 weights of '0.weight' are not zero where the saved mask says so"):
        rarefy.sparsify(copy.deepcopy(runs["RigL"].model), small("RigL"), resume=saved)


@pytest.mark.parametrize("name", ["RigL", "SRSTE", "TopKAST"])
def test_the_weights_must_be_those_of_the_same_moment(runs: dict[str, Run], name: str):
    model = model_of(seed=5)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="load the model's own state_dict from the same moment first"):
        rarefy.sparsify(model, small(name), resume=runs[name].handle.state_dict())
    assert equal_models(model, before)


@pytest.mark.parametrize("name", ["SRSTE", "TopKAST"])
def test_weights_of_another_step_are_noticed_behind_a_master(runs: dict[str, Run], name: str):
    saved = runs[name].handle.state_dict()
    model = copy.deepcopy(runs[name].model)
    with torch.no_grad():
        model.get_parameter("5.weight").mul_(1.01)
    with pytest.raises(ValueError, match=r"kept weights of '5.weight' differ from the dense weights"):
        rarefy.sparsify(model, small(name), resume=saved)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda s: s.update(master=s["master"][:, :3]), "is no tensor of shape"),
        (lambda s: s.update(master="none"), "is no tensor of shape"),
        (lambda s: s.update(trainable=s["trainable"][:3]), "packs into"),
    ],
)
def test_damage_to_what_only_some_methods_have(runs: dict[str, Run], edit: Callable[[Any], None], says: str):
    saved = runs["TopKAST"].handle.state_dict()
    edit(saved["per_site"]["0.weight"])
    with pytest.raises(ValueError, match=says):
        rarefy.sparsify(copy.deepcopy(runs["TopKAST"].model), small("TopKAST"), resume=saved)


def test_the_state_of_another_model(runs: dict[str, Run]):
    saved = runs["RigL"].handle.state_dict()
    for model in (nn.Linear(3, 2), nn.Sequential(*list(model_of().children())[:4]), torch.nn.Sequential(model_of())):
        with pytest.raises(ValueError, match="another model"):
            rarefy.sparsify(model, small("RigL"), resume=saved)


@pytest.mark.parametrize("changed", [{"only": ["0", "3"]}, {"skip": "5"}, {"skip": ["0", "5"]}])
def test_other_selections_have_other_sites(runs: dict[str, Run], changed: dict[str, Any]):
    saved = runs["RigL"].handle.state_dict()
    with pytest.raises(ValueError, match="other only= and skip="):
        rarefy.sparsify(copy.deepcopy(runs["RigL"].model), small("RigL"), resume=saved, **changed)


@pytest.mark.parametrize("chosen", [{"only": ["0", "5"]}, {"skip": "3"}, {"only": nn.Linear, "skip": "*5*"}])
def test_the_same_selection_goes_on(chosen: dict[str, Any]):
    whole = begin(small("RigL"), OPTIMIZERS["SGD"], **chosen).train(20)
    run = begin(small("RigL"), OPTIMIZERS["SGD"], **chosen).train(9)
    saved = run.handle.state_dict()
    run.handle.detach()
    run.handle = rarefy.sparsify(run.model, small("RigL"), optimizer=run.optimizers, resume=saved, **chosen)
    assert not differences(run.train(20).saved(), whole.saved())


@pytest.mark.parametrize("steps", [STEPS - 1, 2 * STEPS])
def test_another_length_of_the_run(runs: dict[str, Run], steps: int):
    saved = runs["RigL"].handle.state_dict()
    model = copy.deepcopy(runs["RigL"].model)
    with pytest.raises(ValueError, match=f"steps={steps}, but the saved run has {STEPS}"):
        rarefy.sparsify(model, small("RigL"), steps=steps, resume=saved)
    assert rarefy.sparsify(model, small("RigL"), resume=saved).steps == STEPS


def test_methods_without_a_schedule_may_train_on_for_longer():
    run = begin(rarefy.Magnitude(0.5), OPTIMIZERS["SGD"]).train(3)
    saved = run.handle.state_dict()
    run.handle.detach()
    assert (
        rarefy.sparsify(run.model, rarefy.Magnitude(0.5), optimizer=run.optimizers, steps=500, resume=saved).step == 3
    )


# -- other devices and types -----------------------------------------------------------------------------------------


def test_a_state_goes_on_in_another_dtype():
    """The model was cast, so was its master."""
    run = begin(small("SRSTE"), OPTIMIZERS["SGD"]).train(4)
    saved = run.handle.state_dict()
    run.handle.detach()
    model = run.model.double()
    handle = rarefy.sparsify(model, small("SRSTE"), optimizer=OPTIMIZERS["SGD"](model), resume=saved)
    assert all(site.master is not None and site.master.dtype is torch.float64 for site in handle.sites)
    rarefy.check(model, handle)
