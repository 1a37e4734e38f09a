"""What the tests of the laws share: a tiny network and its data, every method and optimizer, and runs that are compared
to the bit."""

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rarefy
from rarefy import Cubic, Every, Sparsity

STEPS = 60

# Short intervals, so that much happens in 60 steps; a method that is not named here runs with its defaults.
SMALL: dict[str, dict[str, Any]] = {
    "Dense": {},
    "GMP": {"sparsity": 0.8, "schedule": Cubic(start=5, end=0.75, every=4)},
    "DSnoT": {"method": rarefy.Wanda(0.75)},
    "GraNet": {"sparsity": 0.8, "schedule": Cubic(initial=0.5, start=0, end=0.6, every=5), "every": Every(5, 1.0)},
    "ITOP": {"sparsity": 0.7, "every": Every(6, 1.0)},
    "RandomSearch": {"sparsity": 0.75, "candidates": 3},
    "Refit": {"method": rarefy.Wanda(0.75)},
    "RigL": {"sparsity": 0.7, "every": Every(4, 0.75)},
    "SET": {"sparsity": 0.7, "every": Every(4, 1.0)},
    "SRSTE": {"pattern": "2:4"},
    "SynFlow": {"sparsity": 0.75, "rounds": 3},
    "TopKAST": {"sparsity": 0.75, "every": 5, "until": 0.75},
}

# Other patterns and arguments of methods above, by a name of their own.
VARIANTS: dict[str, rarefy.Method] = {
    "GMP channel": rarefy.GMP(0.5, pattern="channel", schedule=Cubic(start=5, end=0.5, every=4)),
    "ITOP random": rarefy.ITOP(0.75, grow="random", every=Every(6, 1.0)),
    "RigL 4x1": rarefy.RigL(0.75, pattern="4x1", allocation="uniform", every=Every(4, 0.75)),
    "RigL constant fan-in": rarefy.RigL(0.75, pattern="constant_fan_in", every=Every(4, 0.75)),
    "RigL every step": rarefy.RigL(0.7, every=Every(1, 1.0)),
    "SRSTE decoupled": rarefy.SRSTE(pattern="1:4", decoupled=True, decay=0.1),
    "SRSTE unstructured": rarefy.SRSTE(0.7, pattern="unstructured"),
}


def small(name: str) -> rarefy.Method:
    """A value of the registered method (or variant) for runs of 60 steps."""
    if name in VARIANTS:
        return VARIANTS[name]
    method = rarefy.all_methods()[name](**SMALL.get(name, {"sparsity": 0.75}))
    assert isinstance(method, rarefy.Method)
    return method


METHODS = [name for name, method in rarefy.all_methods().items() if issubclass(method, rarefy.Method)]
TRAINING = [name for name in METHODS if small(name).stage == "training"]


def model_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)
        ).to(dtype)


def batch(step: int, size: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return (
        torch.randn(size, 12, generator=generator, dtype=torch.float64).to(dtype),
        torch.randint(4, (size,), generator=generator),
    )


def loss_of(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(given[0]), given[1])


Optimizers = tuple[torch.optim.Optimizer, ...]
Make = Callable[[nn.Module], Optimizers]


def _one(cls: type[torch.optim.Optimizer], **arguments: Any) -> Make:
    return lambda model: (cls(model.parameters(), **arguments),)


def _muon_and_adamw(model: nn.Module) -> Optimizers:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)


_O = torch.optim
OPTIMIZERS: dict[str, Make] = {
    "SGD": _one(_O.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "AdamW": _one(_O.AdamW, lr=0.01, weight_decay=0.1),
    "plain": _one(_O.SGD, lr=0.1),
    "SGD nesterov": _one(_O.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "Adam amsgrad": _one(_O.Adam, lr=0.01, amsgrad=True, weight_decay=1e-2),
    "Adam fused": _one(_O.Adam, lr=0.01, fused=True),
    "Adamax": _one(_O.Adamax, lr=0.01),
    "NAdam": _one(_O.NAdam, lr=0.01),
    "RAdam": _one(_O.RAdam, lr=0.01),
    "Adagrad": _one(_O.Adagrad, lr=0.05, initial_accumulator_value=0.1, lr_decay=1e-2),
    "Adadelta": _one(_O.Adadelta, lr=0.5),
    "RMSprop": _one(_O.RMSprop, lr=0.005, momentum=0.5, centered=True),
    "Rprop": _one(_O.Rprop, lr=0.01),
    "ASGD": _one(_O.ASGD, lr=0.1, t0=10.0, lambd=1e-2),
    "Adafactor": _one(_O.Adafactor, lr=0.01),
    "Muon + AdamW": _muon_and_adamw,
    "LBFGS": _one(_O.LBFGS, lr=0.1, max_iter=3, history_size=4),
}


@dataclass
class Run:
    """A training loop that can be stopped, saved and gone on with. The loop itself knows nothing of sparsity."""

    model: nn.Module
    optimizers: Optimizers
    handle: Sparsity | None = None
    schedulers: tuple[Any, ...] = ()
    step: int = 0

    def train(self, until: int) -> "Run":
        while self.step < until:
            given = batch(self.step)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            if isinstance(self.optimizers[0], torch.optim.LBFGS):
                self.optimizers[0].step(self._closure(given))
            else:
                loss_of(self.model, given).backward()
                for optimizer in self.optimizers:
                    optimizer.step()
            for scheduler in self.schedulers:
                scheduler.step()
            self.step += 1
        return self

    def _closure(self, given: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.optimizers[0].zero_grad()
            value = loss_of(self.model, given)
            value.backward()
            return value

        return closure

    def saved(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "handle": self.handle.state_dict() if self.handle is not None else None,
            "step": self.step,
        }


def schedulers_of(optimizers: Optimizers) -> tuple[Any, ...]:
    return tuple(torch.optim.lr_scheduler.StepLR(optimizer, 9, gamma=0.8) for optimizer in optimizers)


def begin(method: rarefy.Method, make: Make, *, scheduled: bool = False, **arguments: Any) -> Run:
    """A sparse run that stands before its first step."""
    model = model_of()
    optimizers = make(model)
    schedulers = schedulers_of(optimizers) if scheduled else ()
    arguments = {"data": [batch(-1)[0] if _shape_only(method) else batch(-1)], "loss": loss_of} | arguments
    handle = rarefy.sparsify(model, method, optimizer=optimizers, steps=STEPS, seed=3, **arguments)
    return Run(model, optimizers, handle, schedulers)


def _shape_only(method: rarefy.Method) -> bool:
    return "loss" not in method.needs


ORDERS = ("optimizer first", "optimizer last", "attached later", "in place")


def resume(saved: dict[str, Any], method: rarefy.Method, make: Make, *, order: str = "optimizer first") -> Run:
    """A new process: everything is built anew from another initialisation, then loaded.

    order "in place": as frameworks do, which build everything first, the handle too, and load it then.
    """
    if order == "in place":
        return _in_place(saved, method, make)
    model = model_of(seed=99)
    model.load_state_dict(saved["model"])
    optimizers = make(model)
    schedulers = schedulers_of(optimizers) if saved["schedulers"] else ()

    def load() -> None:
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for scheduler, state in zip(schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(state)

    if order == "optimizer first":
        load()
    given = optimizers if order != "attached later" else None
    handle = rarefy.sparsify(model, method, optimizer=given, steps=STEPS, seed=77, resume=saved["handle"])
    if order == "attached later":
        load()
        handle.attach(optimizers)
    elif order == "optimizer last":
        load()
    return Run(model, optimizers, handle, schedulers, saved["step"])


def _in_place(saved: dict[str, Any], method: rarefy.Method, make: Make) -> Run:
    run = begin(method, make, scheduled=bool(saved["schedulers"]))
    assert run.handle is not None
    run.model.load_state_dict(saved["model"])
    for parts, states in ((run.optimizers, saved["optimizers"]), (run.schedulers, saved["schedulers"])):
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    run.handle.load_state_dict(saved["handle"])
    run.step = saved["step"]
    return run


def through_a_file(saved: Any) -> Any:
    """torch.save, and loaded as from a stranger."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and tensor of a nested state, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}/{index}")
    else:
        yield path, value


def differences(a: Any, b: Any) -> list[str]:
    """Paths at which two states are not the same to the bit."""
    one, other = dict(leaves(a)), dict(leaves(b))
    return sorted(set(one) ^ set(other)) + [
        path for path in one.keys() & other.keys() if not same(one[path], other[path])
    ]


def same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))


def snapshot(run: Run) -> dict[str, Any]:
    return copy.deepcopy(run.saved())
