"""What makes a form safe to run: kernels check nothing, so whatever was read is checked here, once.

A header that was accepted and bytes of its length are given; no entry of an index is used as an address before it is
known to lie inside. Values of floating forms may be anything: every pattern of bits is a number, NaN or an infinity.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rarefy.runtime.forms.header import FileForm, Header
from rarefy.runtime.forms.places import Reader, spread, starts_of
from rarefy.runtime.forms.sections import Sections
from rarefy.runtime.kernels import DType, Form


def checked_starts(sections: Sections) -> NDArray[np.int64]:
    """Units before each block row, int64 [block rows + 1], after a look at everything else in the form.

    Raises ValueError where the index, the starts, the values or the scales cannot be those of the header.
    """
    header = sections.header
    starts = sections.first_units() if header.form == Form.INDEX16 else starts_of(header, sections.index.numpy())
    if starts[0] != 0 or starts[-1] != header.units or (np.diff(starts) < 0).any():
        raise ValueError(
            f"the {header.form.name} index of {header.rows} × {header.cols} has {header.units} units; it counts from "
            f"{starts[0]} to {starts[-1]}{'' if starts[-1] != header.units else ', not ascending'}: it is damaged"
        )
    _check_places(sections, starts)
    _check_values(sections, starts)
    return starts


def _check_places(sections: Sections, starts: NDArray[np.int64]) -> None:
    header = sections.header
    if header.form == Form.BITMAP:
        _check_tail(header, sections.index.numpy())
    elif header.form in (Form.INDEX16, FileForm.PANEL8):
        read = Reader(header, sections.index.numpy(), starts)
        for first, last in _spans(starts):
            places = read(first, last)
            ends = spread(np.arange(1, last - first + 1) * header.cols, starts[first : last + 1])
            if (places >= ends).any():
                raise ValueError(f"a column in block rows {first} to {last} is not below {header.cols}: damaged index")
            if (places[1:] <= places[:-1]).any():
                raise ValueError(f"columns in block rows {first} to {last} do not ascend: the index is damaged")


_SPAN = 1 << 20


def _spans(starts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Block rows [first, last) of at most a million rows and, but for a single row, units: the time that a check takes
    goes with the bytes that are there, not with the sizes that are claimed.
    """
    first, end = 0, len(starts) - 1
    while first < end:
        enough = int(starts.searchsorted(int(starts[first]) + _SPAN, side="right")) - 1
        last = max(first + 1, min(enough, first + _SPAN, end))
        yield first, last
        first = last


def _check_tail(header: Header, index: NDArray[np.uint8]) -> None:
    """Bits past the last column are 0."""
    words = index.view("<u8").reshape(header.rows, header.words)
    used = header.cols % 64
    if used and (words[:, -1] >= 1 << used).any():
        raise ValueError(f"a bitmap of {header.cols} columns has bits past the last one: the index is damaged")


def _check_values(sections: Sections, starts: NDArray[np.int64]) -> None:
    header, values = sections.header, sections.value_bits()
    beyond = header.block_rows * header.block - header.rows
    if beyond and values[starts[-2] :, header.block - beyond :].any():
        raise ValueError(f"blocks reach {beyond} rows past the last row and are not zero there: the values are damaged")
    if header.dtype == DType.I8 and values.size and int(values.view(np.int8).min()) == -128:
        raise ValueError("int8 values are in [-127, 127]; got -128: the values are damaged")
    scales = sections.scales
    if scales is not None and not bool(scales.isfinite().all()):
        raise ValueError("the scales of an int8 weight are finite; got NaN or an infinity: they are damaged")
