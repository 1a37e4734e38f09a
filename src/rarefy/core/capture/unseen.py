"""When which modules ran, and what it means that a site's inputs were not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from rarefy.core.capture.blocks import Block
from rarefy.core.capture.operands import Rows
from rarefy.core.sites import Site

_LISTS = (nn.ModuleList, nn.ModuleDict)


class Order:
    """A sink that notes in which order sites are read, and when modules are called. Used in a `with` block."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._hooks: list[Any] = []
        self._now = 0
        self.first: dict[Site, int] = {}
        self._last: dict[Site, int] = {}
        self._ended: dict[nn.Module, list[int]] = {}

    def __enter__(self) -> Order:
        self._hooks = [module.register_forward_hook(self._ends) for module in self._modules]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self, rows: Rows, source: Tensor, recipe: object, make: Callable[[], Iterator[Tensor]]) -> None:
        """See Sink."""
        self.reached(rows)

    def reached(self, rows: Rows) -> None:
        """See Sink."""
        self._now += 1
        self.first.setdefault(rows.site, self._now)
        self._last[rows.site] = self._now

    def over(self) -> bool:
        """See Sink. All of a run is asked for."""
        return False

    def _ends(self, module: nn.Module, *_: Any) -> None:
        self._ended.setdefault(module, []).append(self._now)

    def over_after(self, block: Block) -> bool:
        """Whether the block is called once, and its weights are not used after that."""
        ends = self._ended.get(block.module, [])
        return len(ends) == 1 and all(self._last.get(site, 0) <= ends[0] for site in block.sites)


class Ran:
    """Which modules inside of a block ran. Used in a `with` block."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parents = {child: parent for parent in module.modules() for child in parent.children()}
        self._hooks: list[Any] = []
        self._ran: set[nn.Module] = set()

    def __enter__(self) -> Ran:
        self._hooks = [m.register_forward_pre_hook(self._note) for m in self._module.modules()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, module: nn.Module, _: Any) -> None:
        self._ran.add(module)

    def refuse_unseen(self, site: Site) -> None:
        """Raise ValueError unless it is plain why nothing was seen: an expert to which no token was sent."""
        if self._module not in self._ran:
            raise ValueError(
                f"{site.name!r} was not reached: the data never runs {type(self._module).__name__}. Give data that "
                f"does, or skip={site.name!r}."
            )
        if site.layout.stacked or not self._used(site.module):
            return
        raise ValueError(
            f"no input of {site.name!r} was seen, although its block ran: these data do not use the weight, or it is "
            f"copied or computed with before it is multiplied. skip={site.name!r}, or take a method without data "
            "(Magnitude)."
        )

    def _used(self, module: nn.Module) -> bool:
        """Whether the module ran, or the one that it is a part of (which may use its weight without calling it)."""
        parent = self._parents.get(module)
        while parent is not None and isinstance(parent, _LISTS) and parent not in self._ran:
            parent = self._parents.get(parent)
        return module in self._ran or parent in self._ran
