"""What sparse execution refuses, with nothing changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

import rarefy
import tiny
from core.sparse.runs import RANDOM, RIGL, begin, layers, network, sgd
from rarefy.core.sparse import SparseLinear
from rarefy.core.sparse.execute import refuse


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight


def replaced() -> nn.Module:
    model = nn.Linear(8, 8)
    model.forward = lambda x: x  # type: ignore[method-assign]
    return model


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
