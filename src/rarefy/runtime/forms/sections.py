"""The parts of a stored form as arrays on its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.axes.top_k import from_array
from rarefy.runtime.forms.header import ALIGNMENT, SIZE, TORCH, WIDTH, AnyForm, Header
from rarefy.runtime.kernels import DType, Form

BITS = {4: np.dtype("<u4"), 2: np.dtype("<u2"), 1: np.dtype("<u1")}  # a value's bits, by its width in bytes


@dataclass(frozen=True, eq=False)
class Sections:
    """One stored form: its header, its bytes, and the starts of block rows where kernels need them.

    bytes: uint8, 1-D, contiguous, at a multiple of 64 bytes. starts: int32 [block rows + 1] (LUT: [slices of 16 rows +
    1]), the bits of a uint32; in the bytes for INDEX16 and LUT, beside them for BITMAP, None for forms without.
    """

    header: Header
    bytes: Tensor
    starts: Tensor | None

    @property
    def form(self) -> AnyForm:
        return self.header.form

    @property
    def dtype(self) -> DType:
        return self.header.dtype

    @property
    def block(self) -> int:
        return self.header.block

    @property
    def units(self) -> int:
        return self.header.units

    @property
    def shape(self) -> tuple[int, int]:
        return self.header.rows, self.header.cols

    @property
    def nbytes(self) -> int:
        """Bytes in memory: the form, and starts beside it."""
        beside = self.starts if self.form == Form.BITMAP else None
        return self.bytes.numel() + (0 if beside is None else beside.numel() * beside.element_size())

    @property
    def index(self) -> Tensor:
        """The index as it lies in memory, uint8."""
        return self._section(0)

    @property
    def values(self) -> Tensor:
        """Values [units, block] (DENSE: [rows, cols]; LUT: [steps, per step]) in torch's dtype for them."""
        header = self.header
        if self.form == Form.LUT:
            return self._section(1).view(TORCH[header.dtype]).view(header.steps, 64 // WIDTH[header.dtype])
        shape = self.shape if self.form == Form.DENSE else (header.units, header.block)
        return self._section(1).view(TORCH[header.dtype]).view(shape)

    @property
    def scales(self) -> Tensor | None:
        """int8: the scale of each row, float32 [rows]."""
        return self._section(2).view(torch.float32) if self.dtype == DType.I8 else None

    def value_bits(self) -> NDArray[Any]:
        """Values [units, block] as unsigned integers of their width."""
        return bits_of(self.values).reshape(-1, self.block)

    def first_units(self) -> NDArray[np.int64]:
        """Units before each block row, [block rows + 1]."""
        if self.starts is None:
            raise ValueError(f"{self.form.name} has no starts")
        return self.starts.numpy().view(np.uint32).astype(np.int64)

    def _section(self, which: int) -> Tensor:
        first = self.header.offsets()[which]
        return self.bytes[first : first + self.header.lengths()[which]]


def allocate(header: Header) -> Tensor:
    """Bytes for a form: the header, then zeros."""
    size = header.offsets()[-1]
    data = aligned(torch.zeros(size, dtype=torch.uint8))
    data.numpy()[:SIZE] = np.frombuffer(header.pack(), dtype=np.uint8)
    return data


def aligned(data: Tensor) -> Tensor:
    """The tensor, or a copy of it that begins at a multiple of 64 bytes."""
    if data.data_ptr() % ALIGNMENT == 0:
        return data
    room = torch.zeros(data.numel() + ALIGNMENT, dtype=torch.uint8)
    first = -room.data_ptr() % ALIGNMENT
    return room[first : first + data.numel()].copy_(data)


def bits_of(tensor: Tensor) -> NDArray[Any]:
    """The same memory as unsigned integers of the entries' width: no rounding, whatever the bits are."""
    width = tensor.element_size()
    signed = tensor.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[width])
    return signed.numpy().view(BITS[width])


def from_bits(bits: NDArray[Any], dtype: DType) -> Tensor:
    """The inverse of `bits_of`."""
    signed = np.dtype(f"<i{WIDTH[dtype]}")
    return from_array(bits.view(signed)).view(TORCH[dtype])


def starts_tensor(first_units: NDArray[np.int64]) -> Tensor:
    """Starts as kernels read them: int32 with the bits of a uint32."""
    return from_array(first_units.astype(np.uint32).view(np.int32))
