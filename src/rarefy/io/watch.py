"""Which blocks of a model are repeated, and telling which of them runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["Progress", "blocks_in", "watched"]

Progress = Callable[[int, int, str], object]
"""Is told how many of how many blocks are done, and which one comes next."""


def blocks_in(model: nn.Module) -> dict[str, nn.Module]:
    """Name → block: the members of the outermost lists of modules, in their order.

    >>> list(blocks_in(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})))
    ['layers.0', 'layers.1']
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{block}." for block in found)):
            found |= {f"{name}.{index}" if name else index: block for index, block in module.named_children()}
    return found


@contextmanager
def watched(model: nn.Module, progress: Progress | None) -> Iterator[None]:
    """While the block lasts, tell `progress` each time that another block of the model begins to run."""
    blocks = blocks_in(model) if progress is not None else {}
    latest: list[str] = []

    def hook(name: str, index: int) -> Callable[..., None]:
        def tell(*_: Any) -> None:
            if latest[-1:] != [name] and progress is not None:
                latest.append(name)
                progress(index, len(blocks), name)

        return tell

    handles = [block.register_forward_pre_hook(hook(name, i)) for i, (name, block) in enumerate(blocks.items())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if progress is not None and blocks:
        progress(len(blocks), len(blocks), "")
