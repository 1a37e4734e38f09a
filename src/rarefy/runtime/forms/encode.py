"""From a matrix and its mask to a stored form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.runtime.forms.header import MAX_UNITS, AnyForm, FileForm, Header
from rarefy.runtime.forms.places import Places, Reader, Writer, chunks, cumulated, spread, starts_of
from rarefy.runtime.forms.sections import Sections, allocate, bits_of, starts_tensor
from rarefy.runtime.forms.stored import Stored
from rarefy.runtime.kernels import DType, Form

_DTYPES = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.int8: DType.I8}


def encode(
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    form: AnyForm = Form.BITMAP,
    block: int = 1,
    scales: Tensor | None = None,
) -> Stored:
    """Store the kept entries of a weight, losslessly; −0.0 becomes +0.0, NaN and infinities keep their bits.

    weight: [rows, cols] float32 or bfloat16, or int8 in [−127, 127] with scales [rows] float32: the weight is then
    scale × value. mask: bool [rows, cols], true where an entry is kept, whatever its value; by default the entries
    that are not zero. form: BITMAP, INDEX16 (up to 65 536 columns), LUT (as many, by compiled kernels), DENSE (keeps
    every entry, takes no mask) or PANEL8.
    block: rows of a unit, 1, 4, 8 or 16 (INDEX16 and PANEL8); a unit is kept whole where one of its entries is.
    Raises ValueError for other dtypes and shapes, for entries outside the mask that are not zero, and where the form
    cannot hold the weight.

    >>> stored = encode(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    >>> stored.units, stored.values.flatten().tolist()
    (2, [2.0, 3.0])
    >>> stored.dense()
    tensor([[0., 2.],
            [3., 0.]])
    """
    if form == Form.LUT:
        return encode(weight, mask=mask, scales=scales).looked_up()
    dtype = _check(weight, mask, scales)
    bits = bits_of(weight.detach().contiguous())
    kept = None if mask is None else mask.detach().contiguous().numpy()
    if form == Form.DENSE:
        return _dense(bits, kept, dtype, block, scales)
    rows, cols = bits.shape
    Header(form, dtype, block, rows, cols, 0).check()
    source = _Matrix(Header(form, dtype, block, rows, cols, 0), bits, kept)
    starts = cumulated(source.counts())
    if starts[-1] >= MAX_UNITS:
        raise ValueError(f"a form has fewer than 2³² units; {rows} × {cols} keeps {starts[-1]}. Use DENSE.")
    return build(Header(form, dtype, block, rows, cols, int(starts[-1])), source, starts, scales)


class _Matrix:
    """A dense matrix and its mask, read as units."""

    def __init__(self, header: Header, bits: NDArray[Any], mask: NDArray[np.bool_] | None) -> None:
        self.header, self.bits, self.mask = header, bits, mask

    def counts(self) -> NDArray[np.int64]:
        """Kept units of each block row. Raises ValueError where an entry outside the mask is not zero."""
        counts = np.empty(self.header.block_rows, dtype=np.int64)
        for first, last in chunks(self.header):
            counts[first:last] = np.count_nonzero(self._units(first, last), axis=1)
            if self.mask is not None:
                self._check_outside(first * self.header.block, last * self.header.block)
        return counts

    def places(self, first: int, last: int) -> Places:
        return np.flatnonzero(self._units(first, last))

    def values(self, first: int, last: int, places: Places, starts: NDArray[np.int64]) -> NDArray[Any]:
        """[units, block] values of the units at these places; rows past the end are zeros."""
        block, cols = self.header.block, self.header.cols
        bits = self.bits[first * block : last * block].reshape(-1)
        if block == 1:
            return positive(bits.take(places))[:, None]
        top = places + spread(np.arange(last - first) * ((block - 1) * cols), starts[first : last + 1])
        entries = top[:, None] + np.arange(block) * cols
        values = bits.take(entries, mode="clip")
        values[entries >= len(bits)] = 0
        return positive(values)

    def _units(self, first: int, last: int) -> NDArray[np.bool_]:
        """[block rows, cols]: whether a unit is kept, because one of its entries is."""
        block = self.header.block
        rows = slice(first * block, last * block)
        kept = _nonzero(self.bits[rows]) if self.mask is None else self.mask[rows]
        if block == 1:
            return kept
        full = np.zeros(((last - first) * block, self.header.cols), dtype=np.bool_)
        full[: len(kept)] = kept
        return np.logical_or.reduce(full.reshape(last - first, block, -1), axis=1)

    def _check_outside(self, first: int, last: int) -> None:
        assert self.mask is not None
        outside = _nonzero(self.bits[first:last])
        outside &= ~self.mask[first:last]
        if outside.any():
            row, column = (int(each[0]) for each in np.nonzero(outside))
            raise ValueError(
                f"the mask leaves out entries that are not zero, the first at [{first + row}, {column}]: storing the "
                "kept ones would change the weight. Clear it first: weight.masked_fill_(~mask, 0)."
            )


class _Form:
    """A stored form, read as units of the same block."""

    def __init__(self, stored: Sections, starts: NDArray[np.int64]) -> None:
        self.places = Reader(stored.header, stored.index.numpy(), starts)
        self.bits = stored.value_bits()

    def values(self, first: int, last: int, places: Places, starts: NDArray[np.int64]) -> NDArray[Any]:
        return self.bits[starts[first] : starts[last]]


def build(header: Header, source: _Matrix | _Form, starts: NDArray[np.int64], scales: Tensor | None) -> Stored:
    """A form with the units of a source."""
    data = allocate(header)
    beside = None if header.form == FileForm.PANEL8 else starts_tensor(starts)
    stored = Stored(header, data, beside)
    write, values = Writer(header, stored.index.numpy(), starts), stored.value_bits()
    for first, last in chunks(header):
        places = source.places(first, last)
        write(first, last, places)
        values[starts[first] : starts[last]] = source.values(first, last, places, starts)
    if scales is not None and stored.scales is not None:
        stored.scales.copy_(scales)
    return stored.with_starts(beside)


def rebuild(stored: Sections, form: AnyForm) -> Stored:
    """The same units, of the same block, in another form that has an index."""
    old = stored.header
    starts = stored.first_units() if stored.starts is not None else starts_of(old, stored.index.numpy())
    header = Header(form, old.dtype, old.block, old.rows, old.cols, old.units)
    header.check()
    return build(header, _Form(stored, starts), starts, stored.scales)


def positive(bits: NDArray[Any]) -> NDArray[Any]:
    """The same values with +0.0 for −0.0 (int8, which has none, is left alone), in place."""
    if bits.itemsize > 1:
        negative_zero = bits == (1 << (8 * bits.itemsize - 1))
        if negative_zero.any():
            bits[negative_zero] = 0
    return bits


def _nonzero(bits: NDArray[Any]) -> NDArray[np.bool_]:
    """Where values are not zero: in bits, so that denormals and NaN count whatever the processor's mode is."""
    return bits != 0 if bits.itemsize == 1 else (bits << 1) != 0


def _dense(
    bits: NDArray[Any], mask: NDArray[np.bool_] | None, dtype: DType, block: int, scales: Tensor | None
) -> Stored:
    if mask is not None:
        raise ValueError("DENSE keeps every entry and takes no mask. Leave mask= out, or use form=Form.BITMAP.")
    rows, cols = bits.shape
    header = Header(Form.DENSE, dtype, block, rows, cols, rows * cols)
    header.check()
    stored = Stored(header, allocate(header), None)
    values = stored.value_bits().reshape(rows, cols)
    for first, last in chunks(header):
        values[first:last] = bits[first:last]
        positive(values[first:last])
    if scales is not None and stored.scales is not None:
        stored.scales.copy_(scales)
    return stored


def _check(weight: Tensor, mask: Tensor | None, scales: Tensor | None) -> DType:
    if weight.dtype not in _DTYPES:
        raise ValueError(
            f"values are stored as float32, bfloat16 or int8; got {weight.dtype}. Cast first, for instance with "
            "dtype=torch.float32 or dtype=torch.bfloat16 (exact for float16 in float32)."
        )
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"a form holds a matrix [rows, cols] with at least one entry; got shape {tuple(weight.shape)}")
    if weight.device.type != "cpu":
        raise ValueError(f"forms are made on the CPU; got a weight on {weight.device}. Move it: weight.cpu().")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape or mask.device != weight.device):
        raise ValueError(
            f"a mask is boolean, on the CPU, of the weight's shape {tuple(weight.shape)}; "
            f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )
    _check_scales(weight, scales)
    return _DTYPES[weight.dtype]


def _check_scales(weight: Tensor, scales: Tensor | None) -> None:
    if (weight.dtype == torch.int8) != (scales is not None):
        raise ValueError(f"int8 weights have scales=, others none; got {weight.dtype} and scales {scales is not None}")
    if scales is None:
        return
    if scales.dtype != torch.float32 or scales.shape != weight.shape[:1] or not bool(scales.isfinite().all()):
        raise ValueError(
            f"scales are finite float32 [{weight.shape[0]}]; got {scales.dtype} {tuple(scales.shape)}, "
            f"{'finite' if bool(scales.isfinite().all()) else 'not finite'}"
        )
    if int(weight.amin()) < -127:
        raise ValueError("int8 values are in [-127, 127]; got -128. rarefy.runtime.forms.quantize makes such values.")
