"""Masks as bytes and as bits; holding zeros, by torch and by the compiled kernel on every instruction set."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rarefy.core import bits, native

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
]  # fmt: skip
ISAS = ("baseline", "v3", "v4")


@pytest.fixture(params=["torch", *ISAS])
def path(request, monkeypatch, tmp_path):
    """`clear_` by torch, or by a fresh copy of the library that has chosen this instruction set as it was loaded."""
    if request.param == "torch":
        monkeypatch.setenv("RAREFY_NATIVE", "0")
    else:
        built = native.status().path
        if built is None:
            pytest.skip(str(native.status()))
        copy = Path(shutil.copy(built, tmp_path))
        monkeypatch.setenv("RAREFY_ISA", request.param)
        monkeypatch.setattr(native, "_find", lambda: (copy, True))
    native._load.cache_clear()
    yield request.param
    native._load.cache_clear()


@pytest.fixture
def by(path, monkeypatch) -> str:
    """The same, and where the kernel can do it torch may not."""
    if path != "torch":
        if native.status().isa != path:
            pytest.skip(f"this processor has no {path}")
        monkeypatch.setattr(bits, "_clear_by_torch", refuse)
    return path


def refuse(tensor: Tensor, keep: Tensor) -> None:
    raise AssertionError(f"the kernel left {tuple(tensor.shape)}, strides {tensor.stride()} to torch")


def any_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Whatever bit patterns there are: NaNs, infinities, subnormals, −0.0."""
    rng = np.random.default_rng(seed)
    if dtype == torch.bool:
        return torch.from_numpy(rng.integers(0, 2, shape).astype(np.bool_))
    size = math.prod(shape)
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(rng.bytes(size * dtype.itemsize)), dtype=dtype).reshape(shape)


def any_mask(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.from_numpy(np.asarray(np.random.default_rng(seed).random(shape) < 0.4))


def raw(t: Tensor) -> np.ndarray:
    """The bits of a tensor as integers, in row order."""
    return t.detach().contiguous().view(INTEGERS[t.element_size()]).numpy()


def check_clear(tensor: Tensor, mask: Tensor, keep: Tensor | None = None) -> None:
    before, version = raw(tensor).copy(), tensor._version
    keep = bits.encode(mask, tensor) if keep is None else keep
    assert bits.is_clear(tensor, keep) == bool(np.all(mask.numpy() | (before == 0)))
    bits.clear_(tensor, keep)
    assert bits.is_clear(tensor, keep)
    np.testing.assert_array_equal(raw(tensor), np.where(mask.numpy(), before, 0))
    assert tensor._version == version + 1


# --- holding zeros ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_bit_pattern(by, dtype):
    if dtype.is_complex and by != "torch":
        pytest.skip("left to torch, which sees a conjugation that is pending")
    for shape in ((), (1,), (0,), (0, 3), (7, 13), (5, 1, 3), (300, 21)):
        check_clear(any_bits(shape, dtype), any_mask(shape))


@pytest.mark.parametrize("width", INTEGERS)
def test_every_length_and_alignment(by, width):
    """Around the widest vectors, at every offset from the alignment of the mask, and nothing beyond the ends."""
    room = 300
    for n in (*range(70), 127, 128, 129, 255, 256, 257):
        x, mask, keep = any_bits((room,), INTEGERS[width], n), any_mask((room,), n), torch.empty(room, dtype=torch.int8)
        start = n % 5
        inside = torch.zeros(room, dtype=torch.bool)
        inside[start : start + n] = True
        keep[start + 1 : start + 1 + n] = -mask[start : start + n].to(torch.int8)
        before = x.clone()
        bits.clear_(x[start : start + n], keep[start + 1 : start + 1 + n])
        assert torch.equal(x, torch.where(inside & ~mask, torch.zeros_like(x), before))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_memory_that_is_not_aligned(by, dtype):
    memory = bytearray(range(1, 1 + 9 * dtype.itemsize))
    x = torch.frombuffer(memory, dtype=dtype, offset=1, count=8)
    check_clear(x, torch.tensor([True, False] * 4))
    assert memory[0] == 1
    assert memory[-dtype.itemsize + 1 :] == bytes(range(8 * dtype.itemsize + 2, 1 + 9 * dtype.itemsize))


DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 1),
    "permuted": lambda t: t.permute(2, 0, 3, 1),
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "rows": lambda t: t[2:5],
    "rows, channels_last": lambda t: t.to(memory_format=torch.channels_last)[2:5],
    "1x1 kernel, channels_last": lambda t: t[:, :, :1, :1].contiguous().to(memory_format=torch.channels_last),
    "channels_last_3d": lambda t: t[..., None].to(memory_format=torch.channels_last_3d),
    "a parameter": lambda t: torch.nn.Parameter(t),
    "a length of 1 amid": lambda t: t[:, None].transpose(0, 2),
}
SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda t: t[:, 1:3],
    "every other": lambda t: t[::2],
    "last dimension": lambda t: t[..., 0],
    "diagonal": lambda t: t.diagonal(),
    "columns, transposed": lambda t: t[:, :, 1:].transpose(0, 1),
}


@pytest.mark.parametrize("layout", DENSE)
def test_layouts_without_gaps(by, layout):
    check_layout(DENSE[layout])


@pytest.mark.parametrize("layout", SPARSE)
def test_layouts_with_gaps(path, layout):
    check_layout(SPARSE[layout])


def check_layout(view: Callable[[Tensor], Tensor]) -> None:
    base = any_bits((6, 5, 4, 3), torch.float32)
    x = view(base)
    mask = any_mask(tuple(x.shape))
    held = set(x.detach().clone().view(torch.int32).flatten().tolist())
    outside = [v for v in base.detach().view(torch.int32).flatten().tolist() if v not in held]
    check_clear(x, mask)
    assert [v for v in base.detach().view(torch.int32).flatten().tolist() if v not in held | {0}] == outside


def test_a_mask_in_another_memory_order(path):
    x = any_bits((6, 5, 4, 3), torch.float32)
    mask = any_mask((6, 5, 4, 3))
    for order in (torch.contiguous_format, torch.channels_last):
        for other in (torch.contiguous_format, torch.channels_last):
            keep = bits.encode(mask, x.contiguous(memory_format=other))
            check_clear(x.clone(memory_format=order), mask, keep)


def test_strides_that_agree_and_overlap_are_not_taken_for_dense(path):
    """Three by three with strides 2, 2 spans nine entries too, but only five of them are in it."""
    x, keep = torch.arange(1.0, 10.0), torch.zeros(9, dtype=torch.int8)
    bits.clear_(x.as_strided((3, 3), (2, 2)), keep.as_strided((3, 3), (2, 2)))
    assert x.tolist() == [0, 2, 0, 4, 0, 6, 0, 8, 0]


def test_shapes_that_do_not_fit_touch_nothing(path):
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="size of tensor"):
        bits.clear_(x, torch.zeros(2, 4, dtype=torch.int8))
    with pytest.raises(RuntimeError, match=r"broadcast|match"):
        bits.clear_(x, torch.zeros(2, 2, 3, dtype=torch.int8))
    assert bool((x == 1).all())
    bits.clear_(x, torch.tensor([-1, 0, -1], dtype=torch.int8))  # one row for all
    assert x.tolist() == [[1, 0, 1]] * 2


def test_large_tensors(path, monkeypatch):
    """In parts where torch does it, and torch does it where it has many threads."""
    shape = (3, (1 << 19) + 1)
    for large in (1 << 22, 1):
        monkeypatch.setattr(bits, "_LARGE", large)
        monkeypatch.setattr(bits, "_MANY", 1)
        x, mask = any_bits(shape, torch.int16), any_mask(shape)
        before = x.clone()
        bits.clear_(x, bits.encode(mask, x))
        assert torch.equal(x, before * mask)


def test_autograd_sees_the_write(by):
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    bits.clear_(weight, torch.tensor([-1, 0, -1], dtype=torch.int8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_of_inference_mode(by):
    with torch.inference_mode():
        x = torch.ones(3)
        bits.clear_(x, torch.tensor([-1, 0, -1], dtype=torch.int8))
        assert x.tolist() == [1, 0, 1]


def test_tensors_without_memory(path):
    keep = torch.zeros(3, dtype=torch.int8)
    bits.clear_(torch.ones(3, device="meta"), keep.to("meta"))
    with FakeTensorMode():
        bits.clear_(torch.ones(3), torch.zeros(3, dtype=torch.int8))


def test_inside_a_compiled_graph(path):
    def step(x: Tensor, keep: Tensor) -> Tensor:
        x = x * 2
        bits.clear_(x, keep)
        return x

    found = torch.compile(step, backend="eager", fullgraph=True)(torch.ones(2), torch.tensor([-1, 0], dtype=torch.int8))
    assert found.tolist() == [2, 0]


# --- bytes and bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "rows"])
def test_bytes_have_the_memory_order_of_the_weight(layout):
    like = DENSE[layout](torch.empty(6, 5, 4, 3))
    mask = any_mask(tuple(like.shape))
    keep = bits.encode(mask, like)
    assert keep.dtype == torch.int8
    assert keep.stride() == like.stride()
    assert torch.equal(keep, -mask.to(torch.int8))
    assert torch.equal(bits.decode(keep), mask)
    assert bits.decode(keep).is_contiguous()


@given(st.lists(st.booleans(), max_size=40))
def test_packing_is_lossless(entries):
    mask = torch.tensor(entries, dtype=torch.bool)
    packed = bits.pack(mask)
    assert packed.tolist() == [sum(b << i for i, b in enumerate(entries[s : s + 8])) for s in range(0, len(entries), 8)]
    assert torch.equal(bits.unpack(packed, mask.shape), mask)
    assert bits.count(mask) == bits.count_packed(packed) == sum(entries)


VIEWS = [lambda t: t, lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[0, 0], lambda t: t[:0]]


@pytest.mark.parametrize("view", VIEWS)
def test_packing_goes_in_row_order_whatever_the_memory(view):
    mask = view(any_mask((9, 11)))
    packed = bits.pack(mask)
    assert torch.equal(packed, bits.pack(mask.clone(memory_format=torch.contiguous_format)))
    assert torch.equal(bits.unpack(packed, mask.shape), mask)
    assert bits.count(mask) == int(mask.sum())


def test_damaged_masks_are_refused():
    packed = bits.pack(any_mask((3, 5)))
    for wrong, shape in ((packed, (3, 6)), (packed[:1], (3, 5)), (packed.to(torch.int8), (3, 5))):
        with pytest.raises(ValueError, match="damaged or belongs to another model"):
            bits.unpack(wrong, shape)


@pytest.mark.parametrize("shape", [(), (0,), (17,), (4, 9)])
def test_where_masks_differ(shape):
    a, b = any_mask(shape, 1), any_mask(shape, 2)
    assert torch.equal(bits.differ(a, b), a ^ b)
    like = torch.empty(shape)
    assert torch.equal(bits.differ(bits.encode(a, like), bits.encode(b, like)), a ^ b)
