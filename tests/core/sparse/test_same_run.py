"""The same run twice, simulated and sparse: the same masks, the same losses within rounding, the same ledger."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

import optimizer_list
import rarefy
from core.sparse.runs import METHODS, RIGL, STEPS, Run, assert_same, begin, data, loss_of, sgd
from rarefy import Every
from rarefy.core.sparse import SparseLinear

F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-5, F64: 1e-12}

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": sgd,
    "SGD foreach": lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, foreach=True),
    "Adam": lambda m: optim.Adam(m.parameters(), lr=0.01),
    "AdamW fused": lambda m: optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1, fused=True),
}


def both(method: Any, make: Any, dtype: torch.dtype, steps: int = STEPS, **how: Any) -> tuple[Run, Run]:
    runs = begin("simulated", method, make, dtype), begin("sparse", method, make, dtype)
    for run in runs:
        run.train(steps, **how)
        rarefy.check(run.model, run.handle)
    return runs


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["RigL", "SET", "Random"])
def test_the_same_run(name: str, optimizer: str) -> None:
    assert_same(*both(METHODS[name], OPTIMIZERS[optimizer], F32), TOLERANCE[F32])


@pytest.mark.parametrize(("name", "optimizer"), [*((name, "SGD") for name in METHODS), ("RigL", "AdamW fused")])
def test_the_same_run_of_micro_batches_clipped(name: str, optimizer: str) -> None:
    assert_same(*both(METHODS[name], OPTIMIZERS[optimizer], F64, steps=22, micro=2, clip=0.3), TOLERANCE[F64])


NOT_ELEMENTWISE = {"Adafactor", "Adafactor decay above 1", "Muon", "Muon and AdamW", "SGD and Adagrad", "third party"}


@pytest.mark.parametrize("name", [name for name in optimizer_list.DEFAULT if name not in NOT_ELEMENTWISE])
@pytest.mark.parametrize("method", ["RigL", pytest.param("ITOP", marks=pytest.mark.slow)])
def test_every_elementwise_optimizer(method: str, name: str) -> None:
    def make(model: nn.Module) -> Any:
        (optimizer,) = optimizer_list.DEFAULT[name](model)
        for group in optimizer.param_groups:
            group["lr"] *= 0.2  # so that rounding is not blown up on the way
        return optimizer

    runs = begin("simulated", METHODS[method], make, F64), begin("sparse", METHODS[method], make, F64)
    for run in runs:
        run.train(12)
    assert_same(*runs, 1e-5 if name.startswith("LBFGS") else 1e-10)


def test_several_optimizers() -> None:
    def trained(execution: str) -> tuple[nn.Module, rarefy.Sparsity]:
        run = begin("simulated", rarefy.Dense(), dtype=F64)
        run.handle.end()
        optimizers = optimizer_list.split(run.model)
        handle = rarefy.sparsify(run.model, RIGL, optimizer=optimizers, steps=20, execution=execution)
        for step in range(20):
            optimizer_list.update(optimizers, lambda step=step: loss_of(run.model, data(F64)[step % 8]))
        return run.model, handle

    (_, one), (_, other) = trained("simulated"), trained("sparse")
    assert all(torch.equal(one.masks[name], other.masks[name]) for name in one.masks)
    assert one.ledger == other.ledger


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler(fused: bool) -> None:
    """A scale of 2¹⁶ and back, once inside a fused optimizer; an overflow voids a step."""

    def trained(execution: str) -> Run:
        run = begin(execution, RIGL, lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        for step, batch in enumerate(data() * 2):
            run.optimizer.zero_grad()
            loss = loss_of(run.model, batch)
            (scaler.scale(loss) * (float("inf") if step == 7 else 1.0)).backward()
            scaler.step(run.optimizer)
            scaler.update()
            run.losses.append(loss.item())
            run.masks.append(run.handle.masks)
        return run

    one, other = trained("simulated"), trained("sparse")
    assert one.handle.step == 15
    assert_same(one, other, TOLERANCE[F32])


def test_a_layer_used_twice_and_a_batch_of_sequences() -> None:
    """Shared in one forward pass, on (batch, positions, features)."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Linear(20, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.again(self.again(self.first(x).tanh()).tanh())

    def trained(execution: str) -> tuple[list[float], rarefy.Sparsity]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Twice().double()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        method = rarefy.RigL(0.7, every=Every(3, 1.0))
        handle = rarefy.sparsify(model, method, optimizer=optimizer, steps=20, execution=execution)
        losses: list[float] = []
        for step in range(20):
            optimizer.zero_grad()
            x = data(F64)[step % 8][0].view(4, 6, 20)
            loss = (model(x) - 0.1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, handle

    (one, mine), (other, theirs) = trained("simulated"), trained("sparse")
    assert all(torch.equal(mine.masks[name], theirs.masks[name]) for name in mine.masks)
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-12


def test_gradients_that_are_not_zeroed_go_on_adding_up() -> None:
    """Of weights that grow while they wait, too."""

    def trained(execution: str) -> list[float]:
        run = begin(execution, METHODS["ITOP"], dtype=F64)
        losses: list[float] = []
        for step in range(12):
            if step % 3 == 0:
                run.optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss = loss_of(run.model, data(F64)[step % 8])
            loss.backward()
            run.optimizer.step()
            losses.append(loss.item())
        return losses

    assert trained("sparse") == pytest.approx(trained("simulated"), abs=1e-12)


def test_a_nan_gradient_changes_no_mask() -> None:
    for name in ("RigL", "ITOP"):
        run = begin("sparse", METHODS[name])
        run.train(5 if name == "RigL" else 4)
        before = run.handle.masks
        run.optimizer.zero_grad()
        (loss_of(run.model, data()[0]) * float("nan")).backward()
        with pytest.raises(ValueError, match=r"gradients of '0\.weight' hold"):
            run.optimizer.step()
        assert all(torch.equal(mask, before[key]) for key, mask in run.handle.masks.items())


def test_modules_parameters_and_their_memory_stay() -> None:
    run = begin("sparse", RIGL)
    layers = [m for m in run.model.modules() if isinstance(m, SparseLinear)]
    assert len(layers) == 3
    before = [(m.values, m.values.data_ptr(), m.structure) for m in layers]
    columns = [m.structure.by_row.columns.clone() for m in layers]
    run.train(8)
    assert all(
        m.values is values and m.values.data_ptr() == pointer and m.structure is structure
        for m, (values, pointer, structure) in zip(layers, before, strict=True)
    )
    assert not any(torch.equal(m.structure.by_row.columns, old) for m, old in zip(layers, columns, strict=True))
