"""Where the non-zeros of a matrix lie: compressed rows with 16-bit columns, and the same of the transposed matrix.

Per non-zero 2 bytes for its column, 2 for its row in the transposed order and 4 for its place there; per row and column
4 bytes for where it starts. *Positions* are row · cols + column, ascending: the order of the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.axes.top_k import from_array

LIMIT = 1 << 16
"""Rows and columns that 16 bits can tell apart."""

_CHUNK = 1 << 20  # entries of a row chunk: 4 MiB of float32


@dataclass
class Compressed:
    """One matrix row by row. columns: uint16 (non-zeros,), ascending in a row. starts: uint32 (rows + 1,)."""

    rows: int
    cols: int
    columns: Tensor
    starts: Tensor

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first row, row after the last) of four parts or more, each of at most 2²⁰ entries, or of one row."""
        rows = max(1, min(_CHUNK // max(1, self.cols), -(-self.rows // 4)))
        for first in range(0, self.rows, rows):
            yield first, min(first + rows, self.rows)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Which non-zeros lie in rows `first` up to `last`."""
        starts = self.starts.numpy()
        return int(starts[first]), int(starts[last])

    def positions(self, first: int = 0, last: int | None = None) -> Tensor:
        """int64, ascending: row · cols + column of each non-zero of these rows, counted from row `first`."""
        last = self.rows if last is None else last
        begin, end = self.span(first, last)
        lengths = np.diff(self.starts.numpy()[first : last + 1])
        rows = np.repeat(np.arange(last - first, dtype=np.int64) * self.cols, lengths)
        return from_array(rows + self.columns.numpy()[begin:end])

    def expand(self, values: Tensor, first: int, last: int) -> Tensor:
        """Rows `first` up to `last` as a dense matrix."""
        begin, end = self.span(first, last)
        dense = values.new_zeros((last - first) * self.cols)
        dense[self.positions(first, last)] = values[begin:end]
        return dense.view(last - first, self.cols)


@dataclass
class Structure:
    """A matrix by rows, its transposed by rows, and which value of the first is the i-th of the second.

    >>> structure = Structure.of_mask(torch.tensor([[True, False, True], [False, False, True]]))
    >>> structure.by_row.columns.tolist(), structure.by_row.starts.tolist(), structure.positions().tolist()
    ([0, 2, 2], [0, 2, 3], [0, 2, 5])
    >>> structure.by_column.columns.tolist(), structure.order.tolist()
    ([0, 0, 1], [0, 1, 2])
    """

    by_row: Compressed
    by_column: Compressed
    order: Tensor  # uint32 (non-zeros,)

    @classmethod
    def of_positions(cls, positions: Tensor, rows: int, cols: int) -> Structure:
        """positions: int64, ascending, each once, in [0, rows · cols); rows and cols at most 65536."""
        where = positions.numpy()
        row, column = where // cols, (where % cols).astype(np.uint16)
        by_row = Compressed(rows, cols, from_array(column), _starts(row, rows))
        order = np.argsort(column, kind="stable")  # a radix sort for 16 bits
        transposed = Compressed(cols, rows, from_array(row[order].astype(np.uint16)), _starts(column, cols))
        return cls(by_row, transposed, from_array(order.astype(np.uint32)))

    @classmethod
    def of_mask(cls, mask: Tensor) -> Structure:
        """mask: bool (rows, cols)."""
        return cls.of_positions(from_array(np.flatnonzero(mask.numpy())), *mask.shape)

    @classmethod
    def of_columns(cls, columns: Tensor, starts: Tensor, rows: int, cols: int) -> Structure:
        """From compressed rows as a file may hold them. Raises ValueError unless they are such of a rows × cols matrix.

        columns: whole numbers (non-zeros,). starts: whole numbers (rows + 1,).
        """
        found, begin = _whole(columns), _whole(starts)
        lengths = np.diff(begin)
        if len(begin) != rows + 1 or begin[0] != 0 or begin[-1] != len(found) or bool((lengths < 0).any()):
            raise ValueError(f"starts must be {rows + 1} numbers that rise from 0 to {len(found)}")
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < cols:
            raise ValueError(f"columns must lie from 0 to {cols - 1}; they reach from {found.min()} to {found.max()}")
        positions = np.repeat(np.arange(rows, dtype=np.int64) * cols, lengths) + found
        if bool((np.diff(positions) <= 0).any()):
            raise ValueError("the columns of each row must ascend, each at most once")
        return cls.of_positions(from_array(positions), rows, cols)

    def __reduce__(self) -> Any:
        """Copied and pickled by its rows, in types that pickle knows."""
        rows = self.by_row
        return Structure.of_columns, (rows.columns.to(torch.int32), rows.starts.to(torch.int64), rows.rows, rows.cols)

    @property
    def rows(self) -> int:
        return self.by_row.rows

    @property
    def cols(self) -> int:
        return self.by_row.cols

    @property
    def nonzeros(self) -> int:
        return self.order.numel()

    def positions(self) -> Tensor:
        """See `Compressed.positions`: of all non-zeros."""
        return self.by_row.positions()

    def mask(self) -> Tensor:
        """Dense bool (rows, cols)."""
        mask = torch.zeros(self.rows * self.cols, dtype=torch.bool)
        mask[self.positions()] = True
        return mask.view(self.rows, self.cols)

    def bits(self) -> Tensor:
        """The mask as `bits.pack` packs it, without the mask: uint8 of ceil(rows · cols / 8) entries."""
        packed = np.zeros((self.rows * self.cols + 7) // 8, dtype=np.uint8)
        where = self.positions().numpy()
        np.bitwise_or.at(packed, where >> 3, (1 << (where & 7)).astype(np.uint8))
        return from_array(packed)

    def become(self, other: Structure) -> None:
        """Take over another structure; in place where lengths allow, so that what refers to it sees the new one."""
        for mine, new in ((self.by_row, other.by_row), (self.by_column, other.by_column)):
            mine.columns = _written(mine.columns, new.columns)
            mine.starts = _written(mine.starts, new.starts)
        self.order = _written(self.order, other.order)

    def nbytes(self) -> int:
        """Bytes of all index arrays."""
        parts = (self.by_row.columns, self.by_row.starts, self.by_column.columns, self.by_column.starts, self.order)
        return sum(part.numel() * part.element_size() for part in parts)

    def same_as(self, other: Structure) -> bool:
        """Whether both are the structure of one mask."""
        return torch.equal(self.by_row.starts, other.by_row.starts) and torch.equal(
            self.by_row.columns, other.by_row.columns
        )


def _starts(sorted_or_not: NDArray[Any], n: int) -> Tensor:
    starts = np.zeros(n + 1, dtype=np.uint32)
    np.cumsum(np.bincount(sorted_or_not, minlength=n), out=starts[1:])
    return from_array(starts)


def _whole(numbers: Tensor) -> NDArray[np.int64]:
    if numbers.ndim != 1 or numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise ValueError(f"expected a vector of whole numbers, got {numbers.dtype} of shape {tuple(numbers.shape)}")
    return numbers.detach().cpu().to(torch.int64).numpy()


def _written(mine: Tensor, new: Tensor) -> Tensor:
    return mine.copy_(new) if mine.shape == new.shape else new
