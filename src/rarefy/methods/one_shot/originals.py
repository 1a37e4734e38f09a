"""The weights of finished blocks as they were, so that a failure can put them all back."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rarefy.core.held import local

IN_MEMORY = 1 << 30
"""Bytes above which they go to temporary files, deleted when all is over."""


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
        self.in_memory = in_memory
        self._held: dict[int, Tensor] = {}
        self._parameters: list[nn.Parameter] = []
        self._files: list[tuple[Path, list[int]]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Originals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def remember(self, parameter: nn.Parameter) -> None:
        """Keep a copy of what is there now."""
        self._held[len(self._parameters)] = local(parameter).detach().clone()
        self._parameters.append(parameter)
        if sum(t.nbytes for t in self._held.values()) > self.in_memory:
            self._spill()

    def restore(self) -> None:
        """Put everything back."""
        for path, indices in self._files:
            with safe_open(path, "pt") as file:
                for index in indices:
                    self._put(index, file.get_tensor(str(index)))
        for index, tensor in self._held.items():
            self._put(index, tensor)

    def _put(self, index: int, tensor: Tensor) -> None:
        with torch.no_grad():
            local(self._parameters[index]).copy_(tensor)

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="rarefy-")
        path = Path(self._folder.name) / f"{len(self._files)}.safetensors"
        save_file({str(index): t.contiguous() for index, t in self._held.items()}, path)
        self._files.append((path, list(self._held)))
        self._held.clear()
