"""The header of a stored form: what it holds and where, in 128 bytes that say nothing that could be computed otherwise.

Little endian, as everything in a form:

    magic 8 bytes | version, form, dtype, block: uint32 | rows, cols, units: int64 |
    offset and length in bytes of index, values, scales, starts: int64 | steps: int64 | 8 bytes of zeros

The sections follow in that order (LUT: values first, starts before scales), each at a multiple of 64 bytes, the last
filled up to one. Offsets and lengths follow from the sizes; a reader computes them and accepts no others. Only LUT has
steps.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import torch

from rarefy.runtime.kernels import DType, Form

VERSION: Final = 1
MAGIC: Final = b"rarefy\x00\x01"
SIZE: Final = 128
ALIGNMENT: Final = 64  # bytes: a cache line, and the widest vector register
PANEL: Final = 256  # columns that one byte tells apart
BLOCKS: Final = (1, 4, 8, 16)
MAX_UNITS: Final = 2**32  # `starts` are 32 bits wide
MAX_SIDE: Final = 2**31
MAX_COLS: Final = 2**16  # of a form whose columns are 16 bits wide

_FORMAT: Final = struct.Struct("<8s4I3q8qq8s")


class FileForm(IntEnum):
    """Forms that no kernel reads: they lie in files, and are turned into one of `Form` when loaded.

    PANEL8: block rows cut into panels of 256 columns; index = the number of units of each panel, [block rows][panels]
    bytes, then one byte for each unit, its column in the panel. There is none where a panel keeps all 256.
    """

    PANEL8 = 16


AnyForm = Form | FileForm
_FORMS: Final[dict[int, AnyForm]] = {
    form: form for form in (Form.DENSE, Form.BITMAP, Form.INDEX16, Form.LUT, FileForm.PANEL8)
}
TORCH: Final = {DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.I8: torch.int8}
WIDTH: Final = {DType.F32: 4, DType.BF16: 2, DType.I8: 1}


@dataclass(frozen=True)
class Header:
    """What a form holds: a weight [rows, cols] with `units` kept units of `block` rows x 1 column.

    steps: of LUT, of 64 bytes of values each.
    """

    form: AnyForm
    dtype: DType
    block: int
    rows: int
    cols: int
    units: int
    steps: int = 0

    @property
    def block_rows(self) -> int:
        return -(-self.rows // self.block)

    @property
    def words(self) -> int:
        """64-bit words of one row of a bitmap."""
        return -(-self.cols // 64)

    @property
    def panels(self) -> int:
        """Panels of 256 columns."""
        return -(-self.cols // PANEL)

    def lengths(self) -> tuple[int, int, int, int]:
        """Bytes of index, values, scales and starts."""
        if self.form == Form.LUT:
            return self._lut_lengths()
        index = {
            Form.DENSE: 0,
            Form.BITMAP: self.rows * self.words * 8,
            Form.INDEX16: self.units * 2,
            FileForm.PANEL8: self.block_rows * self.panels + self.units,
        }[self.form]
        values = self.units * self.block * WIDTH[self.dtype]
        scales = self.rows * 4 if self.dtype == DType.I8 else 0
        starts = (self.block_rows + 1) * 4 if self.form == Form.INDEX16 else 0
        return index, values, scales, starts

    def _lut_lengths(self) -> tuple[int, int, int, int]:
        """kernels/lookup.h: slices of 16 rows; panels of 32 or 64 columns, listed in 4 bytes each for every slice."""
        slices, panels = -(-self.rows // 16), -(-self.cols // (32 if self.dtype == DType.F32 else 64))
        columns = self.steps * 16 * (4 // WIDTH[self.dtype])
        scales = self.rows * 4 if self.dtype == DType.I8 else 0
        return _up(slices * (panels + 1) * 4) + columns, self.steps * 64, scales, (slices + 1) * 4

    def offsets(self) -> tuple[int, int, int, int, int]:
        """Where index, values, scales and starts begin, and the length of the whole form, in bytes."""
        index, values, scales, starts = self.lengths()
        first = SIZE
        if self.form == Form.LUT:
            listed = first + _up(values)
            begun = listed + _up(index)
            scaled = begun + _up(starts)
            return listed, first, scaled, begun, scaled + _up(scales)
        second = first + _up(index)
        third = second + _up(values)
        fourth = third + _up(scales)
        return first, second, third, fourth, fourth + _up(starts)

    def pack(self) -> bytes:
        """The 128 bytes."""
        pairs = [number for pair in zip(self.offsets(), self.lengths(), strict=False) for number in pair]
        sizes = (self.rows, self.cols, self.units)
        return _FORMAT.pack(MAGIC, VERSION, self.form, self.dtype, self.block, *sizes, *pairs, self.steps, bytes(8))

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """The header that 128 bytes hold. Raises ValueError for anything that `pack` does not write."""
        if len(data) < SIZE:
            raise ValueError(f"a stored weight begins with a header of {SIZE} bytes; got {len(data)}: it is cut short")
        magic, version, form, dtype, block, rows, cols, units, *rest, steps, _ = _FORMAT.unpack(data[:SIZE])
        if magic != MAGIC:
            raise ValueError(f"a stored weight begins with {MAGIC!r}; got {magic!r}: it is something else, or damaged")
        if version != VERSION:
            raise ValueError(f"this rarefy reads version {VERSION} of stored weights; got version {version}")
        _check_kind(form, dtype, block)
        header = cls(_FORMS[form], DType(dtype), block, rows, cols, units, steps)
        header.check()
        if header.pack() != data[:SIZE]:
            raise ValueError(f"offsets and lengths {rest} do not follow from {header}: the header is damaged")
        return header

    def check(self) -> None:
        """Raises ValueError where the sizes cannot be those of a weight in this form."""
        if not (1 <= self.rows < MAX_SIDE and 1 <= self.cols < MAX_SIDE):
            raise ValueError(f"a stored weight has 1 to 2³¹ − 1 rows and columns; got {self.rows} × {self.cols}")
        if self.form not in _FORMS:
            raise ValueError(
                f"{self.form.name} is not stored; what is: {', '.join(each.name for each in _FORMS.values())}"
            )
        allowed = BLOCKS if self.form in (Form.INDEX16, FileForm.PANEL8) else (1,)
        if self.block not in allowed:
            raise ValueError(f"{self.form.name} stores blocks of {allowed} rows; got {self.block}")
        if self.form in (Form.INDEX16, Form.LUT, FileForm.PANEL8) and self.cols > MAX_COLS:
            raise ValueError(
                f"{self.form.name} has up to {MAX_COLS} columns, got {self.cols}; BITMAP has no such limit"
            )
        if not 0 <= self.steps < MAX_UNITS or (self.steps and self.form != Form.LUT):
            raise ValueError(f"{self.form.name} has no {self.steps} steps: LUT has, from 0 to 2³² − 1")
        places = self.block_rows * self.cols
        if self.form == Form.DENSE and self.units != places:
            raise ValueError(f"DENSE keeps all {places} entries of {self.rows} × {self.cols}; got {self.units} units")
        if not 0 <= self.units <= places or (self.form != Form.DENSE and self.units >= MAX_UNITS):
            raise ValueError(
                f"{self.form.name} of {self.rows} × {self.cols} in blocks of {self.block} has 0 to {places} units, "
                f"below 2³²; got {self.units}"
            )


def _up(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _check_kind(form: int, dtype: int, block: int) -> None:
    if form not in _FORMS:
        raise ValueError(f"forms are {', '.join(f'{int(each)} ({each.name})' for each in _FORMS.values())}; got {form}")
    if dtype not in WIDTH:
        raise ValueError(f"dtypes are {', '.join(f'{int(each)} ({each.name})' for each in WIDTH)}; got {dtype}")
    if block not in BLOCKS:
        raise ValueError(f"blocks have {BLOCKS} rows; got {block}")
