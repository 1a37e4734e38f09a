"""The weights of finished blocks as they were, so that a failure can put them all back."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from rarefy.core.capture.store import Store
from rarefy.core.held import local

IN_MEMORY = 1 << 26
"""Bytes above which they go to temporary files, deleted when all is over: they are read after a failure alone."""


class Originals:
    """A context: remembers parameters before they are changed.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> with Originals() as originals:
    ...     originals.remember(weight)
    ...     _ = weight.data.zero_()
    ...     originals.restore()
    >>> weight.data
    tensor([1., 1.])
    """

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self._store = Store(in_memory)
        self._kept: list[tuple[nn.Parameter, int | Tensor]] = []

    def __enter__(self) -> Originals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.clear()
        self._store.close()

    def remember(self, parameter: nn.Parameter) -> None:
        """Keep a copy of what is there now."""
        self._kept.append((parameter, self._store.put(local(parameter))))

    def replace(self, parameter: nn.Parameter, new: Tensor) -> None:
        """Give it another memory, `new`; what is there now is let alone, and nothing is copied."""
        self._kept.append((parameter, parameter.data))
        parameter.data = new

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for parameter, kept in reversed(self._kept):
                if isinstance(kept, Tensor):
                    parameter.data = kept
                else:
                    local(parameter).copy_(self._store.get(kept))
