"""The contract table: one row for each registered method, small enough to run in a test.

A new method gets a row here; that puts it under every law of `test_contract.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rarefy
import tiny
from rarefy import Constant, Cubic, Every
from rarefy.core.method import Driver, Method
from rarefy.core.sparsity import Sparsity
from rarefy.methods.one_shot.layerwise import Layerwise

STEPS = 12
SPARSITY = 0.8
PATTERNS = ("unstructured", "2:4", "2x2", "constant_fan_in", "channel")


@dataclass(frozen=True)
class Row:
    """How the contract tests run one method.

    make: the method, from `sparsity` and `pattern` by name.
    random: whether another seed gives other masks.
    patterns: those it takes.
    per_layer: whether each layer's count is rounded by itself (uniform), or the sum of all.
    share: step -> the sparsity that holds after it; None: SPARSITY, from the first step on.
    """

    make: Callable[..., Any]
    random: bool = False
    patterns: Sequence[str] = PATTERNS
    per_layer: bool = False
    share: Callable[[int], float] | None = None

    def method(self, sparsity: float = SPARSITY, pattern: str = "unstructured") -> Any:
        return self.make(sparsity=sparsity, pattern=pattern)


def cubic(initial: float, final: float, end: int, every: int) -> Callable[[int], float]:
    """s after step t, by the formula of Zhu & Gupta, with updates every so many steps and at the end."""

    def share(t: int) -> float:
        last = end if t >= end else t - t % every
        return final + (initial - final) * (1 - last / end) ** 3

    return share


FREE = tuple(p for p in PATTERNS if p != "2:4")

ROWS = {
    "Dense": Row(lambda sparsity, pattern: rarefy.Dense(), patterns=["unstructured"], share=lambda t: 0.0),
    "Random": Row(rarefy.Random, random=True),
    "RandomSearch": Row(lambda **axes: rarefy.RandomSearch(**axes, candidates=3), random=True),
    "Magnitude": Row(rarefy.Magnitude),
    "Prune": Row(lambda **axes: rarefy.Prune(**axes, score="taylor", allocation="lamp", batches=None)),
    "SNIP": Row(lambda **axes: rarefy.SNIP(**axes, batches=2)),
    "GraSP": Row(rarefy.GraSP),
    "SynFlow": Row(lambda **axes: rarefy.SynFlow(**axes, rounds=5)),
    "GMP": Row(
        lambda **axes: rarefy.GMP(**axes, schedule=Cubic(end=9, every=2)),
        per_layer=True,
        share=cubic(0.0, SPARSITY, end=9, every=2),
    ),
    "SET": Row(lambda **axes: rarefy.SET(**axes, every=Every(3, 1.0)), random=True),
    "RigL": Row(lambda **axes: rarefy.RigL(**axes, every=Every(3, 0.75), fraction=Constant(0.5)), random=True),
    "ITOP": Row(lambda **axes: rarefy.ITOP(**axes, every=Every(3, 1.0)), random=True),
    "GraNet": Row(
        lambda **axes: rarefy.GraNet(**axes, schedule=Cubic(initial=0.5, end=9, every=3), every=Every(3, 1.0)),
        random=True,
        share=cubic(0.5, SPARSITY, end=9, every=3),
    ),
    "TopKAST": Row(lambda **axes: rarefy.TopKAST(**axes, every=3), per_layer=True, patterns=FREE),
    "SRSTE": Row(rarefy.SRSTE, per_layer=True),
    "Wanda": Row(lambda **axes: rarefy.Wanda(**axes, group="layer"), per_layer=True),
    "SparseGPT": Row(rarefy.SparseGPT, per_layer=True),
    "ALPS": Row(lambda **axes: rarefy.ALPS(**axes, iterations=20), per_layer=True),
    "DSnoT": Row(
        lambda **axes: rarefy.DSnoT(rarefy.Wanda(**axes, group="layer")),
        per_layer=True,
        patterns=["unstructured", "2:4", "constant_fan_in"],
    ),
    "Refit": Row(lambda **axes: rarefy.Refit(rarefy.Magnitude(**axes))),
    "IMP": Row(lambda **axes: rarefy.IMP(**axes, share=0.6), patterns=FREE),
}


METHODS = list(ROWS)
PLAIN = [name for name, row in ROWS.items() if not isinstance(row.method(), Driver)]


def masked_at_start(name: str) -> bool:
    """Whether `sparsify` itself masks something."""
    return name not in {"Dense", "GMP"}


Built = tuple[nn.Module, list[tiny.Batch]]


def mlp() -> Built:
    return tiny.mlp(), tiny.batches()


def cnn() -> Built:
    return tiny.cnn(), tiny.batches((3, 4, 4))


def given(method: Any, data: list[tiny.Batch]) -> list[Any]:
    """What the method takes as `data`: SynFlow and those that look at layers' inputs take no labels."""
    return [inputs for inputs, _ in data] if isinstance(method, rarefy.SynFlow | Layerwise) else data


def start(method: Method, built: Built, steps: int = STEPS, seed: int = 0, **more: Any) -> tuple[Any, Sparsity]:
    """An optimizer and an attached handle."""
    model, data = built
    optimizer = tiny.sgd(model)
    arguments = {"data": given(method, data), "loss": tiny.loss, "steps": steps, "seed": seed} | more
    return optimizer, rarefy.sparsify(model, method, optimizer=optimizer, **arguments)


def run(
    method: Method | Driver,
    built: Built,
    after: Callable[[Sparsity], None] = lambda s: None,
    steps: int = STEPS,
    seed: int = 0,
) -> Sparsity:
    """A whole run, drivers too; `after` is called with the handle at the start and after every step."""
    model, data = built
    if isinstance(method, Method):
        optimizer, s = start(method, built, steps, seed)
        after(s)
        tiny.fit(model, optimizer, steps, data, lambda _: after(s))
        return s

    def train(model: nn.Module, s: Sparsity) -> None:
        optimizer = tiny.sgd(model)
        s.attach(optimizer, steps)
        after(s)
        tiny.fit(model, optimizer, steps, data, lambda _: after(s), start=s.step)

    return method.run(model, train, seed=seed)


def units(pattern: str, mask: Tensor, transposed: bool = False, groups: int = 1) -> int:
    """Units of a pattern that a mask keeps, by a slow reading of what a unit is."""
    if transposed:  # (in, out/groups, *kernel) -> (out, in/groups, *kernel)
        parts = mask.chunk(groups)
        mask = torch.cat([part.transpose(0, 1) for part in parts])
    matrix = mask.flatten(1)
    if pattern == "channel":
        return int(matrix.any(1).sum())
    if pattern == "2x2":
        return sum(bool(tile.any()) for rows in matrix.split(2) for tile in rows.split(2, dim=1))
    return int(mask.sum())
