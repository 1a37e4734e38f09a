"""Bytes that no `encode` wrote: an error that says so, or a form that is safe to run; never a read out of bounds."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.runtime.forms import Stored, from_bytes
from rarefy.runtime.kernels import Form
from runtime.forms.damaged import KINDS, example, read_or_refuse

# Where the fields of a header are: format and offset.
FIELDS = {
    "version": ("<I", 8), "form": ("<I", 12), "dtype": ("<I", 16), "block": ("<I", 20),
    "rows": ("<q", 24), "cols": ("<q", 32), "units": ("<q", 40),
    "index at": ("<q", 48), "index bytes": ("<q", 56), "values at": ("<q", 64), "values bytes": ("<q", 72),
    "scales at": ("<q", 80), "scales bytes": ("<q", 88), "starts at": ("<q", 96), "starts bytes": ("<q", 104),
    "steps": ("<q", 112), "reserved": ("<q", 120),
}  # fmt: skip


def changed(stored: Stored, field: str, value: int) -> torch.Tensor:
    data = stored.bytes.clone()
    kind, offset = FIELDS[field]
    size = struct.calcsize(kind)
    packed = np.frombuffer(struct.pack(kind, value), dtype=np.uint8)
    data[offset : offset + size] = torch.from_numpy(packed.copy())
    return data


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
