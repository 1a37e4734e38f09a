"""A stand-in for the capture of layer inputs: chains of modules, one block each, replayed with the pruned prefix."""

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.one_shot.layers import statistics


@dataclass
class Block:
    name: str
    sites: tuple[Any, ...] = ()


@dataclass
class Captured:
    block: Block
    statistics: dict[Any, Any]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where the methods look for the capture."""
    for name in ("walk", "blocks"):
        module = types.ModuleType(f"rarefy.core.capture.{name}")
        vars(module).update(walk=walk, dense_statistics=dense_statistics, blocks_of=blocks_of)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def blocks_of(model: nn.Sequential, sites: Any) -> list[Block]:
    return [
        Block(name, tuple(site for site in sites if site.name.startswith(f"{name}.")))
        for name, _ in model.named_children()
    ]


def dense_statistics(model: nn.Sequential, sites: Any, data: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for captured in walk(model, sites, data, gram=None):
        found |= captured.statistics
    return found


def walk(model: nn.Sequential, sites: Any, data: Any, *, gram: torch.dtype | None) -> Iterator[Captured]:
    x = torch.cat(list(data))
    for name, module in model.named_children():
        found = {}
        for site in sites:
            inputs = seen_by(module, site.module, x)
            if inputs is not None:
                its = [statistics(part, sequences=4) for part in inputs]
                for each in its:
                    each.gram = None if gram is None or each.gram is None else each.gram.to(gram)
                found[site] = its
        if found:
            yield Captured(Block(name), found)
        with torch.no_grad():
            x = module(x)


def seen_by(block: nn.Module, layer: nn.Module, x: Tensor) -> list[Tensor] | None:
    """The inputs of each matrix of a layer, (rows, in), unfolded for a convolution."""
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        block(x)
    hook.remove()
    if not inputs:
        return None
    if isinstance(layer, nn.Conv2d):
        parts = [
            nn.functional.unfold(part, layer.kernel_size, padding=layer.padding, stride=layer.stride)
            for part in inputs[0].chunk(layer.groups, dim=1)
        ]
        return [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return [inputs[0].flatten(0, -2)]
