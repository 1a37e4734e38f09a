"""Both sides of the comparison on one block: seconds, masks, and peak memory in processes of their own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rarefy.bench.memory import high_water, reset_high_water
from rarefy.bench.pruning.blocks import Model, Shape, make
from rarefy.bench.pruning.reference import Judged, reference_block, sparse_gpt
from rarefy.core.sparsify import sparsify
from rarefy.methods import SparseGPT, Wanda

__all__ = [
    "METHODS",
    "SIDES",
    "Cost",
    "Method",
    "Pruned",
    "compare_masks",
    "peak",
    "rarefy_block",
    "run_side",
]

Method = Literal["Wanda", "SparseGPT"]
METHODS: tuple[Method, ...] = ("Wanda", "SparseGPT")
SIDES = ("reference", "rarefy")


@dataclass(frozen=True)
class Cost:
    """Seconds. solver: from the end of the first run to the beginning of the second. whole: both runs and it."""

    solver: float
    whole: float


@dataclass(frozen=True)
class Pruned:
    """A copy of the model after one side has pruned it. found: rarefy's masks, or what the reference's Linears added up
    of their inputs, by name."""

    model: Model
    cost: Cost
    found: dict[str, Tensor]


def run_side(side: str, model: Model, batches: Sequence[Tensor], method: Method, sparsity: float) -> Pruned:
    """Prune a copy of the model by one side."""
    own = copy.deepcopy(model)
    if side == "rarefy":
        return Pruned(own, *rarefy_block(own, batches, method, sparsity))
    marks, seen = reference_block(own, batches, method, sparsity, keep=True)
    return Pruned(own, Cost(marks[2] - marks[1], marks[3] - marks[0]), seen)


def rarefy_block(
    model: Model, batches: Sequence[Tensor], method: Method, sparsity: float
) -> tuple[Cost, dict[str, Tensor]]:
    """Prune the model in place as users do. Its costs, and the masks of the block's Linears by name.

    Of all calls of the block the last len(batches) are the second run, and those before them the first.
    """
    begun: list[float] = []
    ended: list[float] = []
    hooks = [
        model.block.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter())),
        model.block.register_forward_hook(lambda *_: ended.append(time.perf_counter())),
    ]
    chosen = SparseGPT(sparsity) if method == "SparseGPT" else Wanda(sparsity)
    sparsity_of = sparsify(model, chosen, data=list(batches))
    for hook in hooks:
        hook.remove()
    n = len(batches)
    cost = Cost(begun[-n] - ended[-n - 1], ended[-1] - begun[-2 * n])
    prefix = "layers.0."
    masks = {s.name[len(prefix) : -len(".weight")]: s.mask for s in sparsity_of.sites if s.name.startswith(prefix)}
    return cost, masks


def compare_masks(model: Model, sides: Mapping[str, Pruned], method: Method, sparsity: float) -> dict[str, float]:
    """How rarefy's masks differ from the reference's. model: as it was before; sides: by name.

    different: entries; of: all. wrong, gap: rarefy's entries that are on the wrong side of the bound by the reference's
    own scores (for SparseGPT those that it has after the same earlier choices), and their largest relative distance.
    """
    other = sides["reference"]
    judged, different, total = Judged(), 0, 0
    with torch.no_grad():
        for name, mask in sides["rarefy"].found.items():
            weight = _weight(model.block, name)
            different += int((mask != _weight(other.model.block, name).ne(0)).sum())
            total += mask.numel()
            _judge(judged, method, weight, other.found[name], sparsity, mask)
    return {"different": different, "of": total, "wrong": judged.wrong, "gap": judged.gap}


def _judge(judged: Judged, method: Method, weight: Tensor, seen: Tensor, sparsity: float, mask: Tensor) -> None:
    if method == "SparseGPT":
        sparse_gpt(weight, seen, sparsity, given=mask, judged=judged)
        return
    for scores, kept in zip(weight.abs() * seen.sqrt(), mask, strict=True):
        judged.add(scores, kept)


def _weight(block: nn.Module, name: str) -> Tensor:
    found: Any = block.get_submodule(name)
    return found.weight.detach()


# ------------------------------------------------------------------------------------------------------------- memory


def peak(shape: Shape, method: Method, side: str, sparsity: float, threads: int) -> int:
    """Bytes that pruning a block adds at most to what the process holds with the model alone, in a fresh process."""
    command = [sys.executable, "-m", "rarefy.bench.pruning.sides", json.dumps({
        "shape": [shape.width, shape.tokens, shape.length], "method": method, "side": side, "sparsity": sparsity,
        "threads": threads,
    })]  # fmt: skip
    said = subprocess.run(command, check=False, capture_output=True, text=True)
    if said.returncode:
        raise RuntimeError(f"the process that measures memory failed: {said.stderr.strip()[-400:]}")
    return int(said.stdout.split()[-1])


def _measure(asked: dict[str, Any]) -> int:
    """In a process of its own: the high-water mark over what is resident once the model is there and torch is warm."""
    torch.set_num_threads(asked["threads"])
    model, batches = make(Shape(*asked["shape"]))
    small, few = make(Shape(64, 64, 32))
    run = reference_block if asked["side"] == "reference" else rarefy_block
    run(small, few, asked["method"], asked["sparsity"])  # libraries are loaded, their pools made
    before = reset_high_water()
    run(model, batches, asked["method"], asked["sparsity"])
    return high_water() - before


if __name__ == "__main__":
    print(_measure(json.loads(sys.argv[1])))  # noqa: T201
