"""Where the units of a form lie: the one thing in which forms differ, read and written a chunk of block rows at a time.

The place of a unit within a chunk is its flat index in the grid [block rows of the chunk, cols], ascending. Each form
turns its index into places and places into its index, so that every form becomes every other one by one loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rarefy.runtime.forms.header import PANEL, FileForm, Header
from rarefy.runtime.kernels import Form

_CHUNK = 1 << 20  # entries looked at together: their masks and places stay in the cache

Places = NDArray[np.int64]
Bytes = NDArray[np.uint8]


def chunks(header: Header) -> Iterator[tuple[int, int]]:
    """Block rows [first, last) that together have about a million entries, at least one each."""
    step = max(1, _CHUNK // (header.cols * header.block))
    for first in range(0, header.block_rows, step):
        yield first, min(first + step, header.block_rows)


def spread(per_row: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The entry of a row for each of its units: starts [rows + 1], units before each row."""
    return np.repeat(per_row, np.diff(starts))


class FullPanelError(ValueError):
    """PANEL8 cannot hold the weight: one of its panels keeps all its columns."""


class Reader:
    """Places out of an index. `starts`: units before each block row, int64 [block rows + 1]."""

    def __init__(self, header: Header, index: Bytes, starts: NDArray[np.int64]) -> None:
        self.header, self.index, self.starts = header, index, starts
        self._read = {  # not bound: an object that holds its own method, and the index, waits for the garbage collector
            Form.DENSE: Reader._dense, Form.BITMAP: Reader._bitmap, Form.INDEX16: Reader._index16,
            FileForm.PANEL8: Reader._panel8,
        }[header.form]  # fmt: skip

    def __call__(self, first: int, last: int) -> Places:
        """Places of the units in block rows [first, last)."""
        return self._read(self, first, last)

    def _dense(self, first: int, last: int) -> Places:
        return np.arange((last - first) * self.header.cols)

    def _bitmap(self, first: int, last: int) -> Places:
        rows = self.index.reshape(self.header.rows, -1)[first:last]
        return np.flatnonzero(np.unpackbits(rows, axis=1, count=self.header.cols, bitorder="little").view(np.bool_))

    def _index16(self, first: int, last: int) -> Places:
        starts = self.starts[first : last + 1]
        columns = self.index.view("<u2")[starts[0] : starts[-1]]
        return columns + spread(np.arange(last - first) * self.header.cols, starts)

    def _panel8(self, first: int, last: int) -> Places:
        header, units = self.header, self.starts[[first, last]]
        split = header.block_rows * header.panels
        counts = self.index[:split].reshape(-1, header.panels)[first:last]
        origins = np.arange(last - first)[:, None] * header.cols + np.arange(header.panels) * PANEL
        return self.index[split + units[0] : split + units[1]] + np.repeat(origins.ravel(), counts.ravel())


class Writer:
    """An index out of places; the inverse of `Reader`."""

    def __init__(self, header: Header, index: Bytes, starts: NDArray[np.int64]) -> None:
        self.header, self.index, self.starts = header, index, starts
        self._write = {  # not bound, as in Reader
            Form.BITMAP: Writer._bitmap, Form.INDEX16: Writer._index16, FileForm.PANEL8: Writer._panel8,
        }[header.form]  # fmt: skip

    def __call__(self, first: int, last: int, places: Places) -> None:
        """Write the units in block rows [first, last)."""
        self._write(self, first, last, places)

    def _bitmap(self, first: int, last: int, places: Places) -> None:
        kept = np.zeros((last - first, self.header.cols), dtype=np.bool_)
        kept.reshape(-1)[places] = True
        packed = np.packbits(kept, axis=1, bitorder="little")
        self.index.reshape(self.header.rows, -1)[first:last, : packed.shape[1]] = packed

    def _columns(self, first: int, last: int, places: Places) -> Places:
        return places - spread(np.arange(last - first) * self.header.cols, self.starts[first : last + 1])

    def _index16(self, first: int, last: int, places: Places) -> None:
        units = self.starts[[first, last]]
        self.index.view("<u2")[units[0] : units[1]] = self._columns(first, last, places)

    def _panel8(self, first: int, last: int, places: Places) -> None:
        header, units = self.header, self.starts[[first, last]]
        split = header.block_rows * header.panels
        columns = self._columns(first, last, places)
        panel = columns // PANEL + spread(np.arange(last - first) * header.panels, self.starts[first : last + 1])
        counts = np.bincount(panel, minlength=(last - first) * header.panels)
        if counts.max(initial=0) >= PANEL:
            raise FullPanelError(
                f"PANEL8 stores up to {PANEL - 1} units of {PANEL} columns; a panel here keeps all. Use BITMAP."
            )
        self.index[first * header.panels : last * header.panels] = counts
        self.index[split + units[0] : split + units[1]] = columns % PANEL


def starts_of(header: Header, index: Bytes) -> NDArray[np.int64]:
    """Units before each block row, computed from a BITMAP or PANEL8 index; for DENSE too."""
    if header.form == Form.DENSE:
        return np.arange(header.rows + 1) * header.cols
    if header.form == Form.BITMAP:
        counts = popcount(index.view(np.uint64).reshape(header.rows, -1))
    elif header.form == FileForm.PANEL8:
        counts = index[: header.block_rows * header.panels].reshape(-1, header.panels)
    else:
        raise ValueError(f"{header.form.name} stores its starts")
    return cumulated(counts.sum(axis=1, dtype=np.int64))


def cumulated(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 and the running sums of counts: one entry more."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def popcount(words: NDArray[np.uint64]) -> NDArray[Any]:
    """Set bits of each word, or, before numpy 2, of each of its bytes."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words)
    return _ONES[words.view(np.uint8)]
