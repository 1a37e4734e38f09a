"""In and out of sparse execution, what is refused with nothing changed, and what holds meanwhile."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

import rarefy
import tiny
from core.sparse.runs import METHODS, RIGL, begin, data, loss_of, network, sgd
from rarefy import Every
from rarefy.core import flops
from rarefy.core.sparse import SparseLinear, to_dense
from rarefy.core.sparse.execute import refuse

F64 = torch.float64


def layers(model: nn.Module) -> list[SparseLinear]:
    return [m for m in model.modules() if isinstance(m, SparseLinear)]


# -- refused, with nothing changed -----------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight


def replaced() -> nn.Module:
    model = nn.Linear(8, 8)
    model.forward = lambda x: x  # type: ignore[method-assign]
    return model


RANDOM = rarefy.Random(0.5)
REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "gradual": (lambda: nn.Linear(8, 8), rarefy.GMP(0.5), "GMP.*SET, RigL, ITOP"),
    "granet": (lambda: nn.Linear(8, 8), rarefy.GraNet(0.5), "GraNet"),
    "a master": (lambda: nn.Linear(8, 8), rarefy.SRSTE(), "SRSTE"),
    "channels": (lambda: nn.Linear(8, 8), rarefy.Magnitude(0.5, pattern="channel"), "any but channel, got channel"),
    "growing blocks": (lambda: nn.Linear(8, 8), rarefy.RigL(0.5, pattern="4x1"), "unstructured, got 4x1"),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(8, 8)), RANDOM, "'0.weight' .*Conv2d.*skip="),
    "subclass": (lambda: nn.MultiheadAttention(8, 2), RANDOM, "NonDynamicallyQuantizableLinear"),
    "tied": (Tied, RANDOM, "tied: the model uses it under 2 names"),
    "forward": (replaced, RANDOM, "forward was replaced"),
    "bfloat16": (lambda: nn.Linear(8, 8).bfloat16(), RANDOM, "bfloat16, and only float32 and float64"),
    "wide": (lambda: nn.Linear(65537, 1), RANDOM, r"\(1, 65537\), and 16-bit indices reach 65536"),
    "tall": (lambda: nn.Linear(1, 65537), RANDOM, r"\(65537, 1\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_run_sparse_is_refused(what: str) -> None:
    make, method, message = REFUSED[what]
    model = make()
    before = tiny.picture(model)
    needs = {"optimizer": sgd(model), "steps": 10} if "optimizer" in method.needs else {}
    with pytest.raises(ValueError, match=message):
        rarefy.sparsify(model, method, execution="sparse", **needs)
    assert tiny.picture(model) == before
    assert not layers(model)


def test_another_execution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"""execution='packed': "simulated" .* or "sparse"."""):
        refuse("packed", RANDOM, nn.Linear(8, 8), [])


def test_another_device_is_refused() -> None:
    """Seen by `refuse` itself, since nothing else is at hand: meta tensors stand for those of an accelerator."""
    sites = rarefy.core.find_sites(model := nn.Linear(8, 8))
    model.to("meta")
    sites[0].held.parameter = model.weight
    with pytest.raises(ValueError, match="on meta, and only plain parameters on the CPU"):
        refuse("sparse", RANDOM, model, sites)


class Mine(optim.SGD):
    """A subclass may do anything."""


@pytest.mark.parametrize(
    "make",
    [
        lambda m: optim.Adafactor(m.parameters()),
        lambda m: optim.Muon([p for p in m.parameters() if p.ndim == 2]),
        lambda m: optim.SparseAdam(m.parameters()),
        lambda m: Mine(m.parameters(), lr=0.1),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_optimizers_that_are_not_elementwise_are_refused(make: Any, late: bool) -> None:
    model = network()
    for p in model.parameters():
        p.requires_grad_(p.ndim == 2)
    optimizer = make(model)
    name = type(optimizer).__name__
    if late:
        handle = rarefy.sparsify(model, RANDOM, execution="sparse")
        with pytest.raises(ValueError, match=name):
            handle.attach(optimizer)
        assert not handle.attached
        return
    before = tiny.picture(model)
    with pytest.raises(ValueError, match=name):
        rarefy.sparsify(model, RANDOM, optimizer=optimizer, execution="sparse")
    assert tiny.picture(model) == before


def test_an_optimizer_of_other_parameters_may_be_any() -> None:
    model = network()
    optimizers = [
        optim.SGD([model[0].weight, model[2].weight], lr=0.1),
        optim.Adafactor([model[0].bias, model[2].bias, *model[4].parameters()]),
    ]
    rarefy.sparsify(model, RANDOM, optimizer=optimizers, skip="4", execution="sparse")
    assert len(layers(model)) == 2


def test_skipped_layers_stay_dense_and_convolutions_can_be_skipped() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2))
    rarefy.sparsify(model, RANDOM, skip=["0", "3"], execution="sparse")
    assert [type(m) for m in model] == [nn.Conv2d, nn.Flatten, SparseLinear, nn.Linear]
    model(torch.zeros(2, 3, 4, 4)).sum().backward()


def test_a_model_that_runs_sparse_is_not_made_sparse_again() -> None:
    run = begin("sparse", RIGL)
    for execution in ("simulated", "sparse"):
        with pytest.raises(RuntimeError, match=r"'0' of this Sequential runs sparse already: end\(\)"):
            rarefy.sparsify(run.model, RANDOM, execution=execution)  # type: ignore[arg-type]


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
