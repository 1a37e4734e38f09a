"""Tensors kept between runs of blocks: in memory up to a limit, beyond it in files of a temporary folder."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor


@dataclass
class _Entry:
    shape: tuple[int, ...]  # as it was given: axes of stride 0 are kept once
    order: tuple[int, ...]  # axes from the slowest to the fastest
    device: torch.device
    dtype: torch.dtype
    held: Tensor | Path
    size: int
    uses: int
    digest: bytes | None


class Store:
    """Handles for tensors. What `get` returns is a fresh tensor of the same strides, so that a block may write to it.

    limit: bytes kept in memory. folder: where the temporary folder of the others is made (None: the system's place).
    Use it in a `with` block: the temporary folder is removed at its end.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self._limit, self._folder = limit, folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._entries: dict[int, _Entry] = {}
        self._known: dict[bytes, int] = {}
        self._next = 0
        self.memory = self.disk = self.peak = 0

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything and remove the temporary folder."""
        self._entries.clear()
        self._known.clear()
        self.memory = self.disk = 0
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def put(self, tensor: Tensor, *, once: bool = False) -> int:
        """Keep a copy of a tensor; `once`: tensors of the same content have one handle, which counts its uses."""
        digest = fingerprint(tensor) if once else None
        if digest is not None and digest in self._known:
            handle = self._known[digest]
            self._entries[handle].uses += 1
            return handle
        handle = self._next
        self._next += 1
        self._entries[handle] = self._entry(tensor.detach(), handle, digest)
        if digest is not None:
            self._known[digest] = handle
        return handle

    def use(self, handle: int) -> int:
        """Count one more use of a handle."""
        self._entries[handle].uses += 1
        return handle

    def digest(self, handle: int) -> bytes | None:
        """The fingerprint of a tensor that was put `once`."""
        return self._entries[handle].digest

    def get(self, handle: int) -> Tensor:
        """A fresh tensor with the content, shape and strides of the one that was put."""
        entry = self._entries[handle]
        held = entry.held
        if isinstance(held, Path):
            size = entry.size
            raw = (
                torch.from_file(str(held), size=size, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
            )
            small = [1 if n < 0 else n for n in entry.shape]
            found = raw.clone().view(entry.dtype).view([small[axis] for axis in entry.order])
            found = found.permute([entry.order.index(axis) for axis in range(len(small))]).to(entry.device)
        else:
            found = held.clone()
        return found.expand([abs(n) for n in entry.shape]) if any(n < 0 for n in entry.shape) else found

    def drop(self, handle: int) -> None:
        """One use less; without any the tensor is gone."""
        entry = self._entries[handle]
        entry.uses -= 1
        if entry.uses:
            return
        del self._entries[handle]
        if entry.digest is not None:
            del self._known[entry.digest]
        if isinstance(entry.held, Path):
            entry.held.unlink()
            self.disk -= entry.size
        else:
            self.memory -= entry.size

    def holds(self, handles: Iterable[int]) -> bool:
        """Whether all of them are still there: a store that was closed has none."""
        return all(handle in self._entries for handle in handles)

    def drop_all(self, handles: Iterable[int]) -> None:
        """`drop` each that is still there."""
        for handle in handles:
            if handle in self._entries:
                self.drop(handle)

    def _entry(self, tensor: Tensor, handle: int, digest: bytes | None) -> _Entry:
        # An axis of stride 0 is one entry seen many times: kept once, its length with a minus sign.
        repeated = [n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)]
        shape = tuple(-n if again else n for n, again in zip(tensor.shape, repeated, strict=True))
        small = tensor[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
        order = tuple(sorted(range(small.ndim), key=lambda axis: -small.stride(axis)))
        size = small.numel() * small.element_size()
        held: Tensor | Path
        if self.memory + size > self._limit:
            held = self._write(small.permute(order).contiguous(), handle)
            self.disk += size
        else:
            held = small.permute(order).clone(memory_format=torch.contiguous_format)
            held = held.permute([order.index(axis) for axis in range(small.ndim)])
            self.memory += size
        self.peak = max(self.peak, self.memory)
        return _Entry(shape, order, tensor.device, tensor.dtype, held, size, 1, digest)

    def _write(self, tensor: Tensor, handle: int) -> Path:
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="rarefy-", dir=self._folder)
        path = Path(self._temporary.name) / str(handle)
        with path.open("wb") as file:
            file.write(cast(Any, as_bytes(tensor).numpy()))
        return path


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in row order, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def fingerprint(tensor: Tensor) -> bytes:
    """A hash of dtype, shape, strides, device and every bit."""
    told = f"{tensor.dtype}{tuple(tensor.shape)}{tensor.stride()}{tensor.device}".encode()
    found = hashlib.blake2b(told, digest_size=16)
    found.update(cast(Any, as_bytes(tensor).numpy()))
    return found.digest()
