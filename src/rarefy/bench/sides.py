"""A packed model that can be dense again for a moment, and the weights that one token reads in either form."""

from __future__ import annotations

from typing import Any

from torch import nn

from rarefy.runtime import plan
from rarefy.runtime.judge import Change, show
from rarefy.runtime.packed import Packed

__all__ = ["Sides", "weight_bytes"]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a step for one token reads: all of them once, and of an embedding table one row.

    Tied weights are read by the layer that multiplies with them. All experts are counted.

    >>> weight_bytes(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2, bias=False)))
    48
    """
    seen: dict[int, int] = {}
    rows = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            rows += module.weight[0].numel() * module.weight.element_size()
            continue
        if isinstance(module, Packed):
            seen[id(module)] = module.stored.nbytes
        for parameter in module.parameters(recurse=False):
            seen[parameter.data_ptr()] = parameter.numel() * parameter.element_size()
    return rows + sum(seen.values())


class Sides:
    """A packed model that can be dense again for a moment, and back, without a copy of it."""

    def __init__(self, model: nn.Module) -> None:
        """Of a dense model, before it is packed."""
        self.model = model
        self._noted = {module: (type(module), Change(module)) for module in model.modules()}
        self.changes: list[Change] = []
        self.plans: list[tuple[nn.Module, Any]] = []
        self._packed = True

    def freeze(self) -> None:
        """Now that it is packed, remember what has changed."""
        self.changes = [change for module, (kind, change) in self._noted.items() if type(module) is not kind]
        self.plans = plan.installed(self.model)
        self._noted.clear()

    def show(self, packed: bool) -> None:
        """Be packed, or dense."""
        if packed is self._packed:
            return
        self._packed = packed
        show(packed, self.plans, self.changes)

    def units(self) -> list[nn.Module]:
        """What is compared as "inside": modules that run as one call, and packed layers outside of them."""
        whole = [module for module, _ in self.plans]
        inner = {id(each) for module in whole for each in module.modules()}
        return whole + [c.module for c in self.changes if id(c.module) not in inner]
