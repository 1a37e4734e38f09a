"""Bytes that no `encode` wrote: an error that says so, or a form that is safe to run; never a read out of bounds."""

import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.runtime.forms import FileForm, Header, Stored, encode, from_bytes, quantize
from rarefy.runtime.forms.sections import allocate
from rarefy.runtime.kernels import DType, Form, available

KINDS = [
    (Form.DENSE, 1), (Form.BITMAP, 1), (Form.INDEX16, 1), (Form.INDEX16, 4), (FileForm.PANEL8, 1), (FileForm.PANEL8, 8),
    *([(Form.LUT, 1)] if available() else []),
]  # fmt: skip

# Where the fields of a header are: format and offset.
FIELDS = {
    "version": ("<I", 8), "form": ("<I", 12), "dtype": ("<I", 16), "block": ("<I", 20),
    "rows": ("<q", 24), "cols": ("<q", 32), "units": ("<q", 40),
    "index at": ("<q", 48), "index bytes": ("<q", 56), "values at": ("<q", 64), "values bytes": ("<q", 72),
    "scales at": ("<q", 80), "scales bytes": ("<q", 88), "starts at": ("<q", 96), "starts bytes": ("<q", 104),
    "steps": ("<q", 112), "reserved": ("<q", 120),
}  # fmt: skip


def example(form: Form | FileForm, block: int, dtype: torch.dtype = torch.bfloat16) -> Stored:
    """10 × 300 with a quarter kept: ragged rows, words and panels."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(10, 300, generator=generator)
    weight[torch.rand(10, 300, generator=generator) > 0.25] = 0
    if dtype == torch.int8:
        values, scales = quantize(weight)
        return encode(values, form=form, block=block, scales=scales)
    return encode(weight.to(dtype), form=form, block=block)


def safe(stored: Stored) -> bool:
    """What kernels rely on, one unit after the other, in plain Python."""
    header, data = stored.header, stored.bytes.numpy()
    places = header.offsets()
    assert places[-1] == len(data)
    assert all(place % 64 == 0 and place <= len(data) for place in places)
    block_rows = -(-header.rows // header.block)
    if header.form == Form.DENSE:
        return header.units == header.rows * header.cols
    if header.form == FileForm.PANEL8:
        panels = -(-header.cols // 256)
        counts = data[128 : 128 + block_rows * panels].reshape(block_rows, panels)
        inside = iter(data[128 + block_rows * panels :][: header.units].tolist())
        rows = [[256 * p + next(inside) for p in range(panels) for _ in range(row[p])] for row in counts.tolist()]
        return sum(map(len, rows)) == header.units and all(ascending(row, header.cols) for row in rows)
    if header.form == Form.LUT:
        return safe_look_up(stored)
    starts = stored.starts.numpy().view(np.uint32).tolist()
    if starts[0] != 0 or starts[-1] != header.units or sorted(starts) != starts or len(starts) != block_rows + 1:
        return False
    if header.form == Form.BITMAP:
        words = -(-header.cols // 64) * 64
        bitmap = np.unpackbits(data[128:][: header.rows * words // 8], bitorder="little").reshape(header.rows, words)
        return bool((bitmap.sum(1) == np.diff(starts)).all()) and not bitmap[:, header.cols :].any()
    columns = data[128:][: 2 * header.units].view(np.uint16).tolist()
    return all(ascending(columns[a:b], header.cols) for a, b in pairwise(starts))


def safe_look_up(stored: Stored) -> bool:
    """Slices of 16 rows list their panels, most steps first; a step has some columns of each row, 0x80 fills up."""
    header = stored.header
    panel, depth = (32, 1) if header.dtype == DType.F32 else (64, 2 if header.dtype == DType.BF16 else 4)
    slices, panels = -(-header.rows // 16), -(-header.cols // panel)
    starts = stored.starts.numpy().view(np.uint32).tolist()
    listed = -(-slices * (panels + 1) * 4 // 64) * 64
    lists = stored.index.numpy()[: slices * (panels + 1) * 4].view([("panel", "<u2"), ("steps", "u1"), ("zero", "u1")])
    columns = stored.index.numpy()[listed:].reshape(-1, 16, depth)
    if starts[0] != 0 or starts[-1] != header.steps or len(starts) != slices + 1 or len(columns) != header.steps:
        return False
    units = 0
    for at, entries in enumerate(lists.reshape(slices, panels + 1)):
        used = entries[entries["steps"] > 0]
        first = starts[at]
        if sorted(used["steps"], reverse=True) != list(used["steps"]) or len(set(used["panel"])) != len(used):
            return False
        if (entries[: len(used)] != used).any() or entries["zero"].any() or (used["panel"] >= panels).any():
            return False
        for here in used:
            width = min(panel, header.cols - panel * int(here["panel"]))
            rows = columns[first : first + here["steps"]].transpose(1, 0, 2).reshape(16, -1)
            first += int(here["steps"])
            for row in rows.tolist():
                kept = [c for c in row if c != 0x80]
                if row[: len(kept)] != kept or not ascending(kept, width):
                    return False
                units += len(kept)
        if first != starts[at + 1]:
            return False
    return units == header.units


def ascending(columns: list[int], below: int) -> bool:
    return sorted(set(columns)) == columns and all(column < below for column in columns)


def changed(stored: Stored, field: str, value: int) -> torch.Tensor:
    data = stored.bytes.clone()
    kind, offset = FIELDS[field]
    size = struct.calcsize(kind)
    packed = np.frombuffer(struct.pack(kind, value), dtype=np.uint8)
    data[offset : offset + size] = torch.from_numpy(packed.copy())
    return data


def read_or_refuse(data: torch.Tensor) -> bool:
    """Whether it was refused; what is not is safe and can be unpacked."""
    try:
        stored = from_bytes(data)
    except ValueError:
        return True
    assert safe(stored)
    stored.dense()
    stored.mask()
    return False


@pytest.mark.parametrize(("form", "block"), KINDS)
def test_a_flip_of_any_bit_of_header_and_index_is_refused_or_safe(form: Form, block: int):
    stored = example(form, block)
    offsets, lengths = stored.header.offsets(), stored.header.lengths()
    places = [place for which in (0, 3) for place in range(offsets[which], offsets[which] + lengths[which])]
    refused = 0
    for place in [*range(128), *places[::11]]:
        for bit in range(8):
            data = stored.bytes.clone()
            data[place] ^= 1 << bit
            refused += read_or_refuse(data)
    assert refused >= 128 * 8  # the header's bits are all noticed


@pytest.mark.parametrize(("form", "block"), KINDS)
def test_flips_of_many_bits(form: Form, block: int):
    stored = example(form, block, torch.int8)
    generator = np.random.default_rng(5)
    for _ in range(300):
        data = stored.bytes.clone()
        places = torch.from_numpy(generator.integers(128, len(data), size=generator.integers(1, 30)))
        data[places] = torch.from_numpy(generator.integers(0, 256, size=len(places), dtype=np.uint8))
        read_or_refuse(data)


@pytest.mark.parametrize(("form", "block"), KINDS)
def test_cut_anywhere(form: Form, block: int):
    stored = example(form, block)
    for length in [
        *range(130),
        *range(130, len(stored.bytes), 61),
        stored.header.offsets()[1],
        len(stored.bytes) - 1,
    ]:
        with pytest.raises(ValueError, match="cut short"):
            from_bytes(stored.bytes[:length].clone())
    with pytest.raises(ValueError, match="cut short or damaged"):
        from_bytes(torch.cat([stored.bytes, torch.zeros(64, dtype=torch.uint8)]))


NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, -1, 2**16, 2**31, 2**32, 2**62, 2**63 - 1])
)


@given(st.sampled_from(KINDS), st.sampled_from(["rows", "cols", "units", *list(FIELDS)[7:]]), NUMBERS)
@settings(max_examples=300)
def test_hostile_sizes(kind: tuple[Form, int], field: str, value: int):
    stored = example(*kind)
    _, offset = FIELDS[field]
    now = int(np.frombuffer(stored.bytes.numpy()[offset : offset + 8].tobytes(), "<q")[0])
    refused = read_or_refuse(changed(stored, field, value))
    # As many bytes may hold a row or a column more: what is read is another weight, and safe.
    assert refused or value == now or field in ("rows", "cols")


@given(st.sampled_from(KINDS), NUMBERS, NUMBERS, NUMBERS, st.integers(0, 2))
def test_hostile_sizes_that_agree_with_each_other(kind: tuple[Form, int], rows: int, cols: int, units: int, dtype: int):
    """Offsets and lengths are what the sizes give, as far as they fit into 64 bits; bytes behind them are not there."""
    numbers = [rows, cols, units]
    head = struct.pack("<8s4I3q", b"rarefy\x00\x01", 1, kind[0], dtype, kind[1], *numbers)
    data = torch.zeros(1024, dtype=torch.uint8)
    data[:48] = torch.from_numpy(np.frombuffer(head, dtype=np.uint8).copy())
    assert read_or_refuse(data)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("version", 2, "reads version 1 of stored weights; got version 2"),
        ("form", 4, "forms are 0 .DENSE., 1 .BITMAP., 2 .INDEX16., 3 .LUT., 16 .PANEL8.; got 4"),
        ("form", 3, "do not follow"),
        ("form", 999, "got 999"),
        ("dtype", 3, "dtypes are"),
        ("block", 2, "blocks have"),
        ("block", 4, "BITMAP stores blocks of"),
        ("rows", -1, "1 to 2³¹ − 1 rows and columns; got -1"),
        ("cols", 2**40, "1 to 2³¹ − 1 rows and columns"),
        ("units", -1, "has 0 to 3000 units"),
        ("units", 3001, "has 0 to 3000 units"),
        ("units", 7, "do not follow"),
        ("values at", 64, "do not follow"),
        ("steps", 1, "has no 1 steps"),
        ("reserved", 1, "damaged"),
    ],
)
def test_what_a_header_may_say(field: str, value: int, says: str):
    with pytest.raises(ValueError, match=says):
        from_bytes(changed(example(Form.BITMAP, 1), field, value))


def test_something_else():
    with pytest.raises(ValueError, match="something else, or damaged"):
        from_bytes(torch.zeros(1024, dtype=torch.uint8))
    for data in (torch.zeros(128), torch.zeros(2, 128, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)[::2]):
        with pytest.raises(ValueError, match="contiguous 1-D uint8"):
            from_bytes(data)
    with pytest.raises(ValueError, match="on meta"):
        from_bytes(torch.zeros(128, dtype=torch.uint8, device="meta"))


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
