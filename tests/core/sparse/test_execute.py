"""In and out of sparse execution, and what holds meanwhile."""

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn, optim

import rarefy
import tiny
from core.sparse.runs import METHODS, RANDOM, RIGL, begin, data, layers, loss_of, network, sgd
from rarefy import Every
from rarefy.core import flops
from rarefy.core.sparse import SparseLinear, to_dense

F64 = torch.float64


# -- meanwhile -------------------------------------------------------------------------------------------------------


def test_the_handle_reads_as_ever() -> None:
    run, simulated = begin("sparse", RIGL, dtype=F64).train(7), begin("simulated", RIGL, dtype=F64).train(7)
    s, other = run.handle, simulated.handle
    assert repr(s) == repr(other)
    assert (s.sparsity, s.density("2.weight"), s.site_hash) == (
        other.sparsity,
        other.density("2.weight"),
        other.site_hash,
    )
    assert s.ledger.explored == other.ledger.explored
    for mine, theirs in zip(s.sites, other.sites, strict=True):
        assert (mine.name, mine.shape, mine.numel, mine.kind) == (theirs.name, theirs.shape, theirs.numel, theirs.kind)
        torch.testing.assert_close(mine.weight, theirs.weight)
        assert torch.equal(mine.mask, mine.trainable)
    found, expected = rarefy.report(run.model, s), rarefy.report(simulated.model, other)
    assert (found.rows, found.parameters) == (expected.rows, expected.parameters)
    assert found.nonzero_parameters == expected.nonzero_parameters
    x = data(F64)[0][0]
    assert flops.measure(run.model, x) == flops.measure(simulated.model, x)


def test_check_names_what_is_broken() -> None:
    run = begin("sparse", RIGL)
    layer, structure = layers(run.model)[1], layers(run.model)[1].structure
    rarefy.check(run.model, run.handle)
    columns = structure.by_row.columns.clone()
    structure.by_row.columns.fill_(0)
    with pytest.raises(RuntimeError, match=r"2\.weight: the structure is damaged: the columns of each row must ascend"):
        rarefy.check(run.model, run.handle)
    structure.by_row.columns.copy_(columns)
    order = structure.order.clone()
    structure.order.fill_(0)
    with pytest.raises(RuntimeError, match=r"2\.weight: the transposed structure is not that of the weight"):
        rarefy.check(run.model, run.handle)
    structure.order.copy_(order)
    rarefy.check(run.model, run.handle)
    layer.values = nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"2\.values: the parameter was replaced"):
        rarefy.check(run.model, run.handle)


def test_a_dense_gradient_that_was_not_announced_is_refused() -> None:
    run = begin("sparse", RIGL).train(1)
    with pytest.raises(RuntimeError, match="wants_dense_gradient"):
        run.handle.dense_gradient(run.handle.sites[0])


def test_what_gradients_reach_cannot_be_more_than_what_is_kept() -> None:
    s = begin("sparse", RIGL).handle
    site = s.sites[0]
    with pytest.raises(ValueError, match="gradients reach the kept weights and no others"):
        s.keep(site, site.mask, "everywhere")
    with pytest.raises(ValueError, match="expected bool of shape"):
        s.keep(site, site.mask[:2])


def test_a_stale_graph_is_refused() -> None:
    """Backward through a forward pass that another structure made."""
    run = begin("sparse", METHODS["SET"]).train(4)
    loss = loss_of(run.model, data()[0])
    run.train(1, start=4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_detached_and_attached_again() -> None:
    """Zeros cannot come back meanwhile; another optimizer goes on, with the rest of the schedule."""
    run = begin("sparse", METHODS["SET"]).train(6)
    before = run.handle.masks
    run.handle.detach()
    assert not run.handle.attached
    for step in range(6):
        run.step(data(), step)
    assert all(torch.equal(mask, before[name]) for name, mask in run.handle.masks.items())
    assert run.handle.step == 6
    run.optimizer = optim.AdamW(run.model.parameters(), lr=0.01)
    run.handle.attach(run.optimizer)
    run.train(6)
    assert run.handle.step == 12
    assert not all(torch.equal(mask, before[name]) for name, mask in run.handle.masks.items())
    rarefy.check(run.model, run.handle)


def test_without_an_optimizer_first() -> None:
    model = network()
    handle = rarefy.sparsify(model, rarefy.Magnitude(0.8), execution="sparse")
    rarefy.check(model, handle)
    handle.attach(optimizer := sgd(model))
    loss_of(model, data()[0]).backward()
    optimizer.step()
    rarefy.check(model, handle)


@pytest.mark.parametrize(
    "make",
    [
        sgd,
        lambda m: optim.Adam(m.parameters(), lr=0.01),
        lambda m: optim.Adagrad(m.parameters(), lr=0.1, initial_accumulator_value=0.3),
        lambda m: optim.ASGD(m.parameters(), lr=0.1),
        lambda m: optim.LBFGS(m.parameters(), lr=0.1, max_iter=3),
    ],
)
def test_an_optimizer_with_a_past_goes_in_and_out(make: Any) -> None:
    """Trained dense, then sparse, then dense again, under one optimizer; simulated beside it."""

    def trained(execution: str) -> tuple[list[float], nn.Module]:
        run = begin("simulated", rarefy.Dense(), make, F64).train(3)
        run.handle.end()
        parameters = list(run.model.parameters())
        method = rarefy.SET(0.6, every=Every(2, 1.0))
        run.handle = rarefy.sparsify(run.model, method, optimizer=run.optimizer, steps=9, execution=execution)
        run.train(6)
        run.handle.end()
        assert [type(m) for m in run.model if hasattr(m, "weight")] == [nn.Linear] * 3
        assert all(a is b for a, b in zip(run.model.parameters(), parameters, strict=True))
        run.losses += [run.step(data(F64), 9), run.step(data(F64), 10)]
        return run.losses, run.model

    (one, mine), (other, theirs) = trained("simulated"), trained("sparse")
    assert other == pytest.approx(one, abs=1e-8)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_end_leaves_a_plain_model_with_exact_zeros() -> None:
    run = begin("sparse", RIGL).train(12)
    masks, weights = run.handle.masks, {s.name: s.weight for s in run.handle.sites}
    run.handle.end()
    assert not layers(run.model)
    assert list(run.model.state_dict()) == list(network().state_dict())
    for name, mask in masks.items():
        weight = run.model.get_parameter(name)
        assert torch.equal(weight, weights[name])
        assert tiny.positive_zero(weight[~mask])
        assert weight.grad is not None
        assert weight.grad.shape == weight.shape
    assert all(torch.equal(mask, masks[name]) for name, mask in run.handle.masks.items())
    rarefy.check(run.model, run.handle)
    run.handle.end()
    saved = run.handle.state_dict()
    again = rarefy.sparsify(run.model, RIGL, steps=64, resume=saved, execution="sparse")
    assert again.ended
    assert not layers(run.model)


def test_a_model_whose_handle_is_gone_can_be_made_dense() -> None:
    run = begin("sparse", RIGL).train(2)
    model, weight = run.model, run.handle.sites[0].weight
    del run
    gc.collect()
    assert layers(model)
    with pytest.raises(RuntimeError, match="to_dense"):
        rarefy.sparsify(model, RANDOM)
    to_dense(model)
    assert torch.equal(model[0].weight, weight)  # type: ignore[index]
    rarefy.sparsify(model, RANDOM)


def test_copies_go_their_own_way() -> None:
    """A copied handle, and models copied and pickled without one, in a step that gathers a dense gradient too."""
    run = begin("sparse", RIGL).train(5)
    twin = copy.deepcopy(run.handle)
    for model in (twin.model, copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):  # noqa: S301
        x = data()[0][0]
        assert torch.equal(model(x), run.model(x))
    assert (twin.step, twin.execution, twin.attached) == (5, "sparse", False)
    assert twin.ledger == run.handle.ledger
    before = run.handle.masks
    optimizer = sgd(twin.model)
    twin.attach(optimizer, 64)
    for step in range(5, 12):
        optimizer.zero_grad()
        loss_of(twin.model, data()[step % 8]).backward()
        optimizer.step()
    assert not torch.equal(twin.masks["0.weight"], before["0.weight"])
    assert torch.equal(run.handle.masks["0.weight"], before["0.weight"])
    rarefy.check(run.model, run.handle)
    rarefy.check(twin.model, twin)


def test_frozen_layers_and_root_linear() -> None:
    model = nn.Linear(12, 6)
    handle = rarefy.sparsify(model, RANDOM, execution="sparse")
    assert type(model) is SparseLinear
    assert list(handle.masks) == ["weight"]
    run = network()
    run[0].weight.requires_grad_(False)
    optimizer = optim.SGD([p for p in run.parameters() if p.requires_grad], lr=0.1)
    method = rarefy.RigL(0.5, every=Every(1, 1.0))
    s = rarefy.sparsify(run, method, optimizer=optimizer, steps=5, execution="sparse")
    for step in range(4):
        optimizer.zero_grad()
        loss_of(run, data()[step]).backward()
        optimizer.step()
    assert run[0].values.grad is None
    rarefy.check(run, s)
