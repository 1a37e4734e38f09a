"""What the tests of sparse execution share: a small network, and one run under either execution."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import rarefy
import tiny
from rarefy import Every, Sparsity
from rarefy.core.method import Method
from rarefy.core.sparse import SparseLinear

STEPS = 64

METHODS: dict[str, Method] = {
    "RigL": rarefy.RigL(0.8, every=Every(5, 0.9)),
    "SET": rarefy.SET(0.8, every=Every(5, 1.0)),
    "ITOP": rarefy.ITOP(0.8, every=Every(5, 1.0)),
    "ITOP random": rarefy.ITOP(0.8, grow="random", every=Every(4, 1.0)),
    "Random": rarefy.Random(0.8),
    "SNIP": rarefy.SNIP(0.8),
    "SynFlow": rarefy.SynFlow(0.8, rounds=5),
    "Magnitude uniform": rarefy.Magnitude(0.9, allocation="uniform"),
    "Magnitude 2:4": rarefy.Magnitude(pattern="2:4"),
}
RIGL = METHODS["RigL"]
RANDOM = rarefy.Random(0.5)

Make = Callable[[nn.Module], Optimizer]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    layers = [nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 4)]
    return tiny.seeded(lambda: nn.Sequential(*(type(m)(*_sizes(m)) for m in layers))).to(dtype)


def _sizes(module: nn.Module) -> tuple[int, ...]:
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else ()


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def data(dtype: torch.dtype = torch.float32) -> list[tiny.Batch]:
    return [(x.to(dtype), y) for x, y in tiny.batches((20,), n=8, size=24)]


def loss_of(model: nn.Module, batch: tiny.Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass
class Run:
    """A run that can be looked at: the losses of its steps, and the masks after each."""

    model: nn.Module
    optimizer: Optimizer
    handle: Sparsity
    dtype: torch.dtype
    losses: list[float] = field(default_factory=list[float])
    masks: list[dict[str, Tensor]] = field(default_factory=list[dict[str, Tensor]])

    def train(self, steps: int, *, micro: int = 1, clip: float | None = None, start: int = 0) -> "Run":
        batches = data(self.dtype)
        for step in range(start, start + steps):
            self.losses.append(self.step(batches, step, micro, clip))
            self.masks.append(self.handle.masks)
        return self

    def step(self, batches: list[tiny.Batch], step: int, micro: int = 1, clip: float | None = None) -> float:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            total = torch.zeros(())
            for part in range(micro):
                loss = loss_of(self.model, batches[(step * micro + part) % len(batches)]) / micro
                loss.backward()
                total = total + loss.detach()
            if clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            return total

        if isinstance(self.optimizer, torch.optim.LBFGS):
            return float(self.optimizer.step(closure))
        value = closure()
        self.optimizer.step()
        return float(value)


def begin(execution: str, method: Method, make: Make = sgd, dtype: torch.dtype = torch.float32, **more: Any) -> Run:
    """A run before its first step."""
    model = network(dtype)
    optimizer = make(model)
    batches = data(dtype)
    given = [batches[0][0]] if isinstance(method, rarefy.SynFlow) else batches
    arguments: dict[str, Any] = {"steps": STEPS, "seed": 3, "data": given, "loss": loss_of} | more
    handle = rarefy.sparsify(model, method, optimizer=optimizer, execution=execution, **arguments)
    return Run(model, optimizer, handle, dtype)


def assert_same(one: Run, other: Run, tolerance: float) -> None:
    """The same masks at every step, and the same losses within `tolerance`."""
    for step, (mine, theirs) in enumerate(zip(one.masks, other.masks, strict=True)):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), f"masks differ after step {step + 1}"
    assert max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)) <= tolerance
    assert one.handle.ledger == other.handle.ledger


def layers(model: nn.Module) -> list[SparseLinear]:
    """Those that run sparse."""
    return [m for m in model.modules() if isinstance(m, SparseLinear)]
