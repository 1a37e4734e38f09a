"""What is stored comes back bit for bit, in every form, block and dtype; index sections against numpy and scipy."""

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.runtime.forms import FileForm, Stored, convert, encode, from_bytes, quantize, runnable, smallest
from rarefy.runtime.kernels import DType, Form, Weight, available

BLOCKED = [(form, block) for form in (Form.INDEX16, FileForm.PANEL8) for block in (1, 4, 8, 16)]
LOOKED_UP = [(Form.LUT, 1)] if available() else []  # made by compiled kernels
FORMS = [(Form.DENSE, 1), (Form.BITMAP, 1), *LOOKED_UP, *BLOCKED]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.int8: torch.int8}
SIDES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 255, 256, 257, 513, 1000]))


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(INTEGERS[t.dtype])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def positive(t: torch.Tensor) -> torch.Tensor:
    """+0.0 for −0.0, in bits."""
    if t.dtype == torch.int8:
        return t.clone()
    lowest = torch.iinfo(INTEGERS[t.dtype]).min
    return bits(t).masked_fill(bits(t) == lowest, 0).view(t.dtype)


def matrix(seed: int, rows: int, cols: int, density: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of any bits (NaN with payloads, infinities, denormals, −0.0) and a mask; +0.0 outside it."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(INTEGERS[dtype])
    low = -127 if dtype == torch.int8 else info.min
    raw = torch.randint(low, info.max + 1, (rows, cols), generator=generator).to(INTEGERS[dtype])
    special = torch.tensor([info.min if low != -127 else 0, 0, 1, info.max], dtype=INTEGERS[dtype])
    where = torch.rand(rows, cols, generator=generator)
    raw = torch.where(where < 0.1, special[torch.randint(0, 4, (rows, cols), generator=generator)], raw)
    mask = torch.rand(rows, cols, generator=generator) < density
    return raw.masked_fill(~mask, 0).view(dtype), mask


def in_units(mask: torch.Tensor, block: int) -> torch.Tensor:
    """The mask with every unit that keeps one entry kept whole."""
    rows, cols = mask.shape
    padded = torch.nn.functional.pad(mask, (0, 0, 0, -rows % block)).view(-1, block, cols)
    return padded.any(dim=1, keepdim=True).expand_as(padded).reshape(-1, cols)[:rows]


matrices = st.builds(
    matrix, st.integers(0, 2**31), SIDES, SIDES, st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]),
    st.sampled_from(list(INTEGERS)),
)  # fmt: skip


def scales_for(weight: torch.Tensor) -> torch.Tensor | None:
    return torch.linspace(0.5, 2.0, len(weight)) if weight.dtype == torch.int8 else None


@given(matrices, st.sampled_from(FORMS), st.booleans())
@settings(max_examples=200)
def test_entries_and_mask_come_back(made: tuple[torch.Tensor, torch.Tensor], how: tuple[Form, int], masked: bool):
    weight, mask = made
    form, block = how
    kept = mask if masked else positive(weight).view(INTEGERS[weight.dtype]) != 0
    try:
        stored = encode(
            weight, mask=mask if masked and form != Form.DENSE else None, form=form, block=block,
            scales=scales_for(weight),
        )  # fmt: skip
    except ValueError:
        units = in_units(kept, block)[::block]
        assert form == FileForm.PANEL8
        assert any(p.shape[1] == 256 and p.all(1).any() for p in units.split(256, dim=1))
        return
    assert same(stored.entries(), positive(weight))
    assert torch.equal(stored.mask(), torch.ones_like(kept) if form == Form.DENSE else in_units(kept, block))
    again = from_bytes(stored.bytes)
    assert again.header == stored.header
    assert (again.starts is None) == (stored.starts is None)
    assert again.starts is None or torch.equal(again.starts, stored.starts)


@given(matrices, st.sampled_from(FORMS[1:]), st.sampled_from(FORMS[1:]))
@settings(max_examples=120)
def test_every_form_becomes_every_other(
    made: tuple[torch.Tensor, torch.Tensor], how: tuple[Form, int], other: tuple[Form, int]
):
    weight, mask = made
    stored = encode(weight, mask=mask, scales=scales_for(weight))
    try:
        between = convert(stored, *how)
        last = convert(between, *other)
    except ValueError as error:
        assert "PANEL8" in str(error)  # noqa: PT017
        return
    assert same(last.entries(), positive(weight))
    assert torch.equal(last.mask(), in_units(in_units(mask, how[1]), other[1]))
    assert last.scales is None or torch.equal(last.scales, scales_for(weight))


@given(matrices)
@settings(max_examples=50)
def test_smallest_is_the_smaller_and_changes_nothing(made: tuple[torch.Tensor, torch.Tensor]):
    weight, mask = made
    rows, cols = weight.shape
    for block in (1, 4, 16):
        stored = encode(weight, mask=mask, form=Form.INDEX16, block=block, scales=scales_for(weight))
        small = smallest(stored)
        assert same(small.entries(), positive(weight))
        assert torch.equal(small.mask(), stored.mask())
        width, kept = weight.element_size(), int(stored.mask().sum())
        bitmap = rows * -(-cols // 64) * 8 + kept * width
        panels = -(-rows // block) * -(-cols // 256) + stored.units * (1 + block * width)
        length = sum(small.header.lengths()[:2])
        if length != min(bitmap, panels):
            assert length == bitmap
            with pytest.raises(ValueError, match="keeps all"):
                convert(stored, FileForm.PANEL8)


@given(matrices)
def test_index16_is_what_scipy_stores(made: tuple[torch.Tensor, torch.Tensor]):
    weight, mask = made
    stored = encode(weight, mask=mask, form=Form.INDEX16, scales=scales_for(weight))
    reference = scipy.sparse.csr_array(mask.numpy())
    assert np.array_equal(stored.starts.numpy().view(np.uint32), reference.indptr)
    assert np.array_equal(stored.index.numpy().view(np.uint16), reference.indices)
    assert same(stored.values.flatten(), positive(weight)[mask])


@pytest.mark.parametrize("block", [4, 8, 16])
@given(matrices)
@settings(max_examples=40)
def test_blocks_are_what_scipy_stores(block: int, made: tuple[torch.Tensor, torch.Tensor]):
    weight, mask = made
    rows = len(weight)
    padded = torch.nn.functional.pad(mask, (0, 0, 0, -rows % block))
    numbers = torch.arange(1, padded.numel() + 1, dtype=torch.float32).view(padded.shape)[:rows]
    stored = encode(numbers * mask, mask=mask, form=Form.INDEX16, block=block)
    entries = torch.nn.functional.pad(numbers * mask, (0, 0, 0, -rows % block))
    reference = scipy.sparse.csr_array(padded.numpy().astype(np.float32)).tobsr(blocksize=(block, 1))
    reference.sort_indices()
    assert np.array_equal(stored.starts.numpy().view(np.uint32), reference.indptr)
    assert np.array_equal(stored.index.numpy().view(np.uint16), reference.indices)
    row = np.repeat(np.arange(len(reference.indptr) - 1), np.diff(reference.indptr)) * block
    expected = entries.numpy()[row[:, None] + np.arange(block), reference.indices[:, None]]
    assert np.array_equal(stored.values.numpy(), expected)


@given(matrices)
def test_bitmap_is_what_numpy_packs(made: tuple[torch.Tensor, torch.Tensor]):
    weight, mask = made
    stored = encode(weight, mask=mask, scales=scales_for(weight))
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 64))
    assert np.array_equal(stored.index.numpy(), np.packbits(padded.numpy(), bitorder="little"))
    assert stored.starts.tolist() == [0, *mask.sum(dim=1).cumsum(0).tolist()]


def test_bytes_by_hand():
    # Row 0 keeps columns 0 and 2 (bits 101 = 5), row 1 keeps column 1 (bits 010 = 2).
    stored = encode(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    data = stored.bytes.numpy().tobytes()
    assert data[:8] == b"rarefy\x00\x01"
    assert np.frombuffer(data[8:24], "<u4").tolist() == [1, Form.BITMAP, DType.F32, 1]
    assert np.frombuffer(data[24:48], "<i8").tolist() == [2, 3, 3]
    assert np.frombuffer(data[48:112], "<i8").tolist() == [128, 16, 192, 12, 256, 0, 256, 0]
    assert data[112:128] == bytes(16)
    assert data[128:144] == bytes([5, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0])
    assert np.frombuffer(data[192:204], "<f4").tolist() == [1, 2, 3]
    assert len(data) == 256


def test_panels_by_hand():
    # Two panels of 256 columns; row 0 keeps columns 1 and 258, row 1 keeps 255 and 256.
    weight = torch.zeros(2, 300)
    weight[0, 1], weight[0, 258], weight[1, 255], weight[1, 256] = 1, 2, 3, 4
    stored = encode(weight, form=FileForm.PANEL8)
    assert stored.index.tolist() == [1, 1, 1, 1, 1, 2, 255, 0]
    assert stored.values.flatten().tolist() == [1, 2, 3, 4]


def test_blocks_by_hand():
    # Five rows in blocks of four: the second block row has one row, the rest of its unit is zeros.
    weight = torch.zeros(5, 3)
    weight[1, 2], weight[4, 0] = 7, 8
    stored = encode(weight, form=Form.INDEX16, block=4)
    assert stored.starts.tolist() == [0, 1, 2]
    assert stored.index.view(torch.int16).tolist() == [2, 0]
    assert stored.values.tolist() == [[0, 7, 0, 0], [8, 0, 0, 0]]
    assert stored.mask().sum() == 5


def test_many_chunks():
    """More entries than are looked at together, and a row longer than that."""
    for rows, cols in ((1100, 1000), (1, 3_000_000), (3, 1_100_000)):
        weight, mask = matrix(1, rows, cols, 0.3, torch.bfloat16)
        stored = encode(weight, mask=mask)
        assert same(stored.entries(), positive(weight))
        assert torch.equal(stored.mask(), mask)
        assert from_bytes(stored.bytes).units == int(mask.sum())


def test_negative_zero_kept_is_positive_zero():
    weight = torch.tensor([[-0.0, 1.0]])
    stored = encode(weight, mask=torch.tensor([[True, True]]))
    assert stored.units == 2
    assert bits(stored.values).flatten().tolist() == [0, 0x3F800000]
    assert bits(encode(weight, form=Form.DENSE).dense()).flatten().tolist() == [0, 0x3F800000]
    assert encode(weight).units == 1


def test_denormals_are_kept_whatever_the_processor_does_with_them():
    weight = torch.tensor([[1, 0, 0x80000001 - 2**32]], dtype=torch.int32).view(torch.float32)
    flushes = torch.set_flush_denormal(True)
    try:
        assert encode(weight).units == 2
    finally:
        torch.set_flush_denormal(False)
    assert flushes in (True, False)


def test_views_and_parameters_are_taken():
    weight = torch.randn(6, 8)[::2, ::2].t()
    stored = encode(torch.nn.Parameter(weight))
    assert torch.equal(stored.dense(), weight)


def test_dense_of_int8_is_scale_times_value():
    values, scales = quantize(torch.randn(5, 70, generator=torch.Generator().manual_seed(0)))
    for form, block in FORMS[:2] + BLOCKED:
        dense = encode(values, form=form, block=block, scales=scales).dense()
        assert torch.equal(dense, values.float() * scales[:, None])


@pytest.mark.parametrize(("form", "block"), [(f, b) for f, b in FORMS if f != FileForm.PANEL8])
def test_kernels_are_given_pointers_into_the_form(form: Form, block: int):
    stored = encode(torch.eye(9), form=form, block=block)
    weight = stored.weight()
    assert isinstance(weight, Weight)
    assert (weight.form, weight.dtype, weight.block, weight.rows, weight.cols) == (form, DType.F32, block, 9, 9)
    assert weight.units == stored.units
    assert weight.values == stored.values.data_ptr()
    assert weight.values % 64 == 0
    assert (weight.index is None) == (form == Form.DENSE)
    assert weight.index is None or weight.index % 64 == 0
    assert weight.starts == (None if form == Form.DENSE else stored.starts.data_ptr())
    assert weight.scales is None


def test_no_kernel_reads_a_form_of_files():
    with pytest.raises(ValueError, match=r"runnable\(stored, Form.INDEX16\)"):
        encode(torch.eye(3), form=FileForm.PANEL8).weight()


def test_what_is_in_a_form_already_stays_itself():
    stored = encode(torch.eye(3))
    assert runnable(stored, Form.BITMAP) is stored
    assert smallest(encode(torch.ones(3, 3), form=Form.DENSE)).form == Form.DENSE


def test_bytes_count_what_is_in_memory():
    stored = encode(torch.eye(3))
    assert stored.nbytes == 128 + 64 + 64 + 16
    assert convert(stored, Form.INDEX16).nbytes == 128 + 64 + 64 + 64


def test_bytes_at_odd_addresses_are_copied_and_others_are_not():
    stored = encode(torch.eye(3))
    room = torch.zeros(stored.bytes.numel() + 128, dtype=torch.uint8)
    first = -room.data_ptr() % 64
    for offset in (first, first + 1):
        data = room[offset : offset + stored.bytes.numel()].copy_(stored.bytes)
        read = from_bytes(data)
        assert (read.bytes.data_ptr() == data.data_ptr()) == (offset == first)
        assert read.values.data_ptr() % 64 == 0
        assert torch.equal(read.dense(), torch.eye(3))
    assert isinstance(read, Stored)


def test_an_older_numpy_counts_the_same(monkeypatch: pytest.MonkeyPatch):
    weight, mask = matrix(2, 50, 300, 0.3, torch.float32)
    stored = encode(weight, mask=mask)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert torch.equal(from_bytes(stored.bytes).starts, stored.starts)
