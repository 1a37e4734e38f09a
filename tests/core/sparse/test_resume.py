"""Law 5 under sparse execution: stop after any step, restore model, optimizer and handle: the same to the bit."""

import copy
from typing import Any

import pytest
import torch
from torch import nn, optim

import rarefy
from core.sparse.runs import METHODS, STEPS, Run, begin, network, sgd
from laws.training import differences, through_a_file

OPTIMIZERS: dict[str, Any] = {
    "SGD": sgd,
    "AdamW fused": lambda m: optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1, fused=True),
    "Rprop": lambda m: optim.Rprop(m.parameters(), lr=0.01),
    "LBFGS": lambda m: optim.LBFGS(m.parameters(), lr=0.1, max_iter=3, history_size=4),
}


def saved(run: Run) -> dict[str, Any]:
    parts = {"model": run.model, "optimizer": run.optimizer, "handle": run.handle}
    return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})


def resumed(state: dict[str, Any], name: str, optimizer: str, *, optimizer_first: bool = False) -> Run:
    """A new process: a dense model of another initialisation is made sparse, then loads."""
    torch.manual_seed(99)
    model = nn.Sequential(*(copy.deepcopy(m) for m in network()))
    for p in model.parameters():
        nn.init.normal_(p)
    made = OPTIMIZERS[optimizer](model)
    if optimizer_first:
        made.load_state_dict(state["optimizer"])
    more = {"steps": STEPS, "seed": 77, "resume": state["handle"], "execution": "sparse"}
    handle = rarefy.sparsify(model, METHODS[name], optimizer=made, **more)
    model.load_state_dict(state["model"])
    if not optimizer_first:
        made.load_state_dict(state["optimizer"])
    return Run(model, made, handle, torch.float32)


@pytest.mark.parametrize("optimizer_first", [False, True])
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("RigL", "SGD"), ("SET", "AdamW fused"), ("ITOP", "Rprop"), ("RigL", "LBFGS"), ("Random", "SGD")],
)
def test_stopping_changes_nothing(name: str, optimizer: str, optimizer_first: bool) -> None:
    whole = begin("sparse", METHODS[name], OPTIMIZERS[optimizer])
    stopped = begin("sparse", METHODS[name], OPTIMIZERS[optimizer])
    step = 0
    for stop in (1, 4, 5, 6, 10, 14):
        whole.train(stop - step, start=step)
        stopped.train(stop - step, start=step)
        step = stop
        assert not differences(saved(whole), saved(stopped)), f"step {step}"
        stopped = resumed(through_a_file(saved(stopped)), name, optimizer, optimizer_first=optimizer_first)
        rarefy.check(stopped.model, stopped.handle)
        assert not differences(saved(whole), saved(stopped)), f"restored after step {step}"


def test_in_place() -> None:
    """Model, optimizer and handle that are there already go back to a saved moment."""
    run = begin("sparse", METHODS["RigL"]).train(7)
    before = saved(run)
    first = run.train(8, start=7).losses[-8:]
    for part, name in ((run.model, "model"), (run.optimizer, "optimizer"), (run.handle, "handle")):
        part.load_state_dict(copy.deepcopy(before[name]))
    assert not differences(before, saved(run))
    assert run.train(8, start=7).losses[-8:] == first


def test_in_place_the_model_comes_first() -> None:
    run = begin("sparse", METHODS["RigL"]).train(7)
    before = saved(run)
    run.train(8, start=7)
    with pytest.raises(ValueError, match="its structure is not the saved mask"):
        run.handle.load_state_dict(before["handle"])
    assert run.handle.step == 15


def test_a_step_before_the_weights_are_loaded_is_refused() -> None:
    state = saved(begin("sparse", METHODS["RigL"]).train(7))
    model = network()
    optimizer = sgd(model)
    more = {"steps": STEPS, "resume": state["handle"], "execution": "sparse"}
    handle = rarefy.sparsify(model, METHODS["RigL"], optimizer=optimizer, **more)
    model(torch.ones(2, 20)).sum().backward()
    with pytest.raises(RuntimeError, match=r"'0.weight' was resumed, .*load_state_dict"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="have not been loaded"):
        rarefy.check(model, handle)
    model.load_state_dict(state["model"])
    optimizer.step()
    rarefy.check(model, handle)


def test_a_simulated_run_goes_on_sparse_and_a_sparse_one_simulated() -> None:
    """The handle's state knows no execution; a dense state_dict is taken by sparse layers whose zeros it has."""
    whole, other = begin("simulated", METHODS["SET"]).train(7), begin("simulated", METHODS["SET"]).train(7)
    state = saved(other)
    run = Run(model := network(), sgd(model), other.handle, torch.float32)
    model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    more = {"steps": STEPS, "resume": state["handle"]}
    run.handle = rarefy.sparsify(model, METHODS["SET"], optimizer=run.optimizer, execution="sparse", **more)
    whole.train(6, start=7)
    run.train(6, start=7)
    assert run.losses == pytest.approx(whole.losses[7:], abs=1e-5)
    state = saved(run)
    run.handle.end()
    run.handle = rarefy.sparsify(
        run.model, METHODS["SET"], optimizer=run.optimizer, steps=STEPS, resume=state["handle"]
    )
    run.train(6, start=13)
    whole.train(6, start=13)
    assert run.losses == pytest.approx(whole.losses[7:], abs=1e-5)
    assert all(torch.equal(mask, run.handle.masks[name]) for name, mask in whole.handle.masks.items())
