"""Sections that no `encode` wrote, in bytes of the right size: refused with what is wrong."""

import numpy as np
import pytest
import torch

from rarefy.runtime.forms import FileForm, Header, Stored, encode, from_bytes
from rarefy.runtime.forms.sections import allocate
from rarefy.runtime.kernels import DType, Form
from runtime.forms.damaged import example, read_or_refuse


def section(stored: Stored, which: int, dtype: str) -> tuple[torch.Tensor, np.ndarray]:
    """A copy of the bytes and a section of it that can be written to."""
    data = stored.bytes.clone()
    first, length = stored.header.offsets()[which], stored.header.lengths()[which]
    return data, data.numpy()[first : first + length].view(dtype)


def test_a_column_that_is_not_there():
    data, columns = section(example(Form.INDEX16, 1), 0, "<u2")
    columns[-1] = 300
    with pytest.raises(ValueError, match="not below 300"):
        from_bytes(data)
    columns[-1] = 65535
    with pytest.raises(ValueError, match="not below 300"):
        from_bytes(data)


def test_columns_that_do_not_ascend():
    data, columns = section(example(Form.INDEX16, 1), 0, "<u2")
    columns[[3, 4]] = columns[[4, 3]]
    with pytest.raises(ValueError, match="do not ascend"):
        from_bytes(data)
    columns[3] = columns[4]
    with pytest.raises(ValueError, match="do not ascend"):
        from_bytes(data)


@pytest.mark.parametrize(("place", "value"), [(0, 1), (-1, 0), (3, 2**32 - 1), (2, 0), (-1, 2**32 - 1)])
def test_starts_that_do_not_ascend_to_the_units(place: int, value: int):
    data, starts = section(example(Form.INDEX16, 1), 3, "<u4")
    starts[place] = value
    with pytest.raises(ValueError, match="it counts from"):
        from_bytes(data)


def test_starts_that_give_a_unit_to_the_row_before():
    """Still ascending: only the columns, which then do not ascend within the row, tell."""
    stored = example(Form.INDEX16, 1)
    data, starts = section(stored, 3, "<u4")
    starts[1] += 1
    with pytest.raises(ValueError, match="do not ascend"):
        from_bytes(data)


def test_a_bitmap_that_counts_otherwise():
    data, words = section(example(Form.BITMAP, 1), 0, "<u8")
    words[0] ^= np.uint64(1)
    with pytest.raises(ValueError, match="it counts from 0 to"):
        from_bytes(data)


def test_a_bitmap_with_bits_past_the_last_column():
    data, words = section(example(Form.BITMAP, 1), 0, "<u8")
    words[0] &= words[0] - np.uint64(1)  # one bit less, so that the count is right
    words[4] |= np.uint64(1) << np.uint64(63)
    with pytest.raises(ValueError, match="bits past the last one"):
        from_bytes(data)


def test_panels_that_count_otherwise():
    data, index = section(example(FileForm.PANEL8, 1), 0, "u1")
    index[0] += 1
    with pytest.raises(ValueError, match="it counts from 0 to"):
        from_bytes(data)
    index[1] -= 1  # the sum is right, and a column of the second panel belongs to the first
    assert read_or_refuse(data)


def test_a_column_past_the_end_of_the_last_panel():
    data, index = section(example(FileForm.PANEL8, 1), 0, "u1")
    index[-1] = 300 - 256
    with pytest.raises(ValueError, match="not below 300"):
        from_bytes(data)


def test_values_past_the_last_row():
    stored = example(Form.INDEX16, 4)
    data, values = section(stored, 1, "<u2")
    values[-1] = 1
    with pytest.raises(ValueError, match="2 rows past the last row"):
        from_bytes(data)


def test_int8_values_and_scales():
    stored = example(Form.BITMAP, 1, torch.int8)
    assert stored.dtype == DType.I8
    data, values = section(stored, 1, "i1")
    values[5] = -128
    with pytest.raises(ValueError, match="got -128"):
        from_bytes(data)
    for bad in (np.nan, np.inf):
        data, scales = section(stored, 2, "<f4")
        scales[2] = bad
        with pytest.raises(ValueError, match="scales of an int8 weight are finite"):
            from_bytes(data)


def test_sizes_without_bytes_behind_them_take_no_time():
    """A million empty rows of 65 536 columns are a form of 4 MB; walking through its entries would take minutes."""
    header = Header(Form.INDEX16, DType.F32, 1, 1_000_000, 65_536, 0)
    assert from_bytes(allocate(header)).units == 0


def test_many_units_are_looked_at_in_parts():
    """More units than a part has, the damage in the last one; wide rows and short ones."""
    for shape in ((90, 65_536), (2_000_000, 1)):
        stored = encode(torch.ones(shape, dtype=torch.bfloat16), form=Form.INDEX16, block=4)
        assert from_bytes(stored.bytes).units == stored.units
        data, columns = section(stored, 0, "<u2")
        columns[-1] = 65_535 if shape[1] == 1 else 0
        with pytest.raises(ValueError, match="not below" if shape[1] == 1 else "do not ascend"):
            from_bytes(data)
