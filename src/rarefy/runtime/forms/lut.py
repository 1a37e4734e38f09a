"""LUT: the look-up form of the kernels (kernels/lookup.h), made of a bitmap by them, and turned back into one.

It is a layout for running: many more bytes of index than a bitmap's, nothing to decode. Files hold the bitmap.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from rarefy.core import native
from rarefy.runtime import kernels
from rarefy.runtime.forms.header import MAX_COLS, SIZE, Header
from rarefy.runtime.forms.sections import Sections, aligned, allocate
from rarefy.runtime.kernels import Form, Weight


def nbytes(weight: Weight) -> int:
    """Bytes of the look-up form of a BITMAP or INDEX16 weight without blocks, without the header; 0 where none."""
    return int(_library().rarefy_lut_bytes(ctypes.byref(weight)))


def build(header: Header, weight: Weight) -> tuple[Header, Tensor]:
    """Header and bytes of the look-up form of `weight`, whose header is given. Raises ValueError where it has none."""
    size = nbytes(weight)
    if not size:
        raise ValueError(f"{header.rows} × {header.cols} has no LUT form: up to {MAX_COLS} columns, below 2³² steps")
    data = aligned(torch.zeros(SIZE + size, dtype=torch.uint8))
    made = Weight()
    status = _library().rarefy_lut_build(ctypes.byref(weight), data.data_ptr() + SIZE, ctypes.byref(made))
    if status:
        raise ValueError(f"{header.rows} × {header.cols} has no LUT form (status {status})")
    steps = ctypes.cast(int(made.starts), ctypes.POINTER(ctypes.c_uint32))[-(-header.rows // 16)]
    filled = replace(header, form=Form.LUT, block=1, steps=int(steps))
    data[:SIZE] = torch.frombuffer(bytearray(filled.pack()), dtype=torch.uint8)
    return filled, data


def bitmap(sections: Sections, weight: Weight) -> tuple[Header, Tensor, Tensor]:
    """Header, bytes and starts of the same weight as a bitmap."""
    header = replace(sections.header, form=Form.BITMAP, steps=0)
    data = allocate(header)
    starts = torch.zeros(header.rows + 1, dtype=torch.int32)
    made = Sections(header, data, starts)
    status = _library().rarefy_lut_decode(
        ctypes.byref(weight), starts.data_ptr(), made.index.data_ptr(), made.values.data_ptr(), ctypes.byref(Weight())
    )
    if status:
        raise ValueError(f"the look-up form could not be read (status {status})")
    if sections.scales is not None and made.scales is not None:
        made.scales.copy_(sections.scales)
    return header, data, starts


def check(weight: Weight, header: Header) -> None:
    """Raises ValueError unless every count and column of the form is sound, so that kernels stay within it."""
    if _library().rarefy_lut_check(ctypes.byref(weight), header.steps):
        raise ValueError(
            f"the look-up form of {header.rows} × {header.cols} does not hold {header.units} units in {header.steps} "
            "steps: it is damaged"
        )


def _library() -> ctypes.CDLL:
    found = kernels.library()
    if found is None:
        raise ValueError(f"LUT is made and read by the compiled kernels: {native.status()}. Use BITMAP or INDEX16.")
    return found
