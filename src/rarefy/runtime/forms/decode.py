"""From a stored form to a matrix and its mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rarefy.runtime.forms.header import WIDTH
from rarefy.runtime.forms.places import Places, Reader, chunks, spread, starts_of
from rarefy.runtime.forms.sections import BITS, Sections
from rarefy.runtime.kernels import Form


def entries(stored: Sections) -> NDArray[Any]:
    """The weight [rows, cols] as the bits of its values; 0 where nothing is kept. A fresh array."""
    header = stored.header
    if stored.form == Form.DENSE:
        return stored.value_bits().reshape(stored.shape).copy()
    out = np.zeros(stored.shape, dtype=BITS[WIDTH[stored.dtype]])
    values, starts = stored.value_bits(), _starts(stored)
    read = Reader(header, stored.index.numpy(), starts)
    for first, last in chunks(header):
        places = read(first, last)
        flat = out[first * header.block : last * header.block].reshape(-1)
        _put(flat, stored, first, last, places, starts, values[starts[first] : starts[last]])
    return out


def mask(stored: Sections) -> NDArray[np.bool_]:
    """Which entries are kept, bool [rows, cols], in whole units; a fresh array. DENSE keeps all."""
    header = stored.header
    out = np.ones(stored.shape, dtype=np.bool_)
    if stored.form == Form.DENSE:
        return out
    out[:] = False
    starts = _starts(stored)
    read = Reader(header, stored.index.numpy(), starts)
    for first, last in chunks(header):
        places = read(first, last)
        flat = out[first * header.block : last * header.block].reshape(-1)
        every = np.ones((len(places), header.block), dtype=np.bool_)
        _put(flat, stored, first, last, places, starts, every)
    return out


def _put(
    flat: NDArray[Any], stored: Sections, first: int, last: int, places: Places, starts: NDArray[np.int64],
    values: NDArray[Any],
) -> None:  # fmt: skip
    """Write values [units, block] to where their units lie in the rows of a chunk."""
    block, cols = stored.block, stored.shape[1]
    if block == 1:
        flat[places] = values[:, 0]
        return
    top = places + spread(np.arange(last - first) * ((block - 1) * cols), starts[first : last + 1])
    for row in range(block):
        entry = top + row * cols
        inside = entry < len(flat)  # rows past the end are in the form, not in the weight
        flat[entry[inside]] = values[inside, row]


def _starts(stored: Sections) -> NDArray[np.int64]:
    return stored.first_units() if stored.starts is not None else starts_of(stored.header, stored.index.numpy())
