"""Products of few tokens on sparse forms, against float64."""

import ctypes
import math
import mmap

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.reference import Built, product, random_input, random_weight
from rarefy.runtime import kernels
from rarefy.runtime.kernels import Activation, Algorithm, DType, Form, Weight

FORMS = [(Form.BITMAP, 1), (Form.INDEX16, 1), (Form.INDEX16, 4), (Form.INDEX16, 8), (Form.INDEX16, 16), (Form.LUT, 1)]
DTYPES = [DType.F32, DType.BF16, DType.I8]
SHAPES = [(1, 1), (1, 130), (40, 1), (7, 63), (16, 64), (17, 65), (35, 128), (50, 200), (33, 1030)]
TOKENS = [1, 2, 3, 4, 5, 6, 7]

pytestmark = pytest.mark.usefixtures("isa")
every_form = pytest.mark.parametrize(("form", "block"), FORMS, ids=lambda v: v.name if isinstance(v, Form) else str(v))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)


def build(weight: np.ndarray, mask: np.ndarray, form: Form, dtype: DType, block: int) -> Built:
    """A weight in a form; the look-up form is built from a bitmap."""
    if form != Form.LUT:
        return reference.weight_struct(weight, mask=mask, form=form, dtype=dtype, block=block)
    return reference.looked_up(reference.weight_struct(weight, mask=mask, form=Form.BITMAP, dtype=dtype))


def few(built: Built, x: torch.Tensor, **options) -> torch.Tensor:
    return product(built, Algorithm.FEW, x, **options)


def check(built: Built, x: torch.Tensor, y: torch.Tensor, **options) -> None:
    """As the reference does, but int8 with 16-bit indices sums single products, not whole groups."""
    if built.struct.form == Form.INDEX16 and built.dtype == DType.I8:
        assert built.integers is not None
        assert built.scales is not None
        q, s = reference.quantized(x)
        inputs = (q * s[..., None].astype(np.float64)).reshape(len(x), q.shape[1] * reference.GROUP)
        built = Built(built.struct, built.dense, built.mask, DType.F32, None, None, built.memory)
        x = torch.from_numpy(inputs[:, : x.shape[1]].copy())
    reference.check(built, x, y, **options)


@every_form
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_number_of_tokens(form, block, dtype, shape):
    for density in (0.15, 0.6):
        built = build(*random_weight(*shape, density), form, dtype, block)
        for tokens in TOKENS:
            x = random_input(tokens, shape[1])
            check(built, x, few(built, x))


@every_dtype
def test_the_look_up_form_is_the_same_from_a_bitmap_and_from_columns(dtype):
    weight, mask = random_weight(37, 300, 0.2)
    built = [
        reference.looked_up(reference.weight_struct(weight, mask=mask, form=form, dtype=dtype))
        for form in (Form.BITMAP, Form.INDEX16)
    ]
    x = random_input(3, 300)
    assert reference.same_bits([few(one, x) for one in built])


def test_what_has_no_look_up_form():
    weight, mask = random_weight(32, 100, 0.2)
    library = kernels.library()
    assert library is not None
    for form, block in ((Form.DENSE, 1), (Form.INDEX16, 4)):
        built = reference.weight_struct(weight, mask=mask, form=form, block=block)
        assert library.rarefy_lut_bytes(ctypes.byref(built.struct)) == 0
        memory = np.full(64, 0xA5, np.uint8)
        struct = Weight()
        assert library.rarefy_lut_build(ctypes.byref(built.struct), memory.ctypes.data, ctypes.byref(struct)) == 1
        assert (memory == 0xA5).all()


@every_form
@every_dtype
def test_more_tokens_than_one_reading_serves(form, block, dtype):
    built = build(*random_weight(37, 90, 0.3), form, dtype, block)
    for tokens in (8, 15):
        x = random_input(tokens, 90)
        check(built, x, few(built, x))


@every_form
@every_dtype
def test_without_tokens_nothing_is_written(form, block, dtype):
    built = build(*random_weight(20, 70, 0.3), form, dtype, block)
    assert few(built, torch.empty(0, 70)).shape == (0, 20)


@every_form
@every_dtype
@pytest.mark.parametrize("layout", reference.LAYOUTS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_epilogues_and_strides(form, block, dtype, layout, kind):
    if dtype == DType.F32 and kind == torch.bfloat16:
        pytest.skip("float32 weights take float32 activations alone")
    rows, cols = 39, 150
    built = build(*random_weight(rows, cols, 0.2), form, dtype, block)
    for tokens, activation in zip((1, 2, 3, 5, 7), Activation, strict=True):
        x = reference.laid_out(random_input(tokens, cols, kind), layout)
        options = {
            "activation": activation,
            "bias": random_input(1, rows, seed=1)[0],
            "other": reference.laid_out(random_input(tokens, rows, kind, seed=2), layout),
        }
        check(built, x, few(built, x, layout=layout, **options), **options)
        check(built, x, few(built, x, layout=layout, bias=options["bias"]), bias=options["bias"])
        check(built, x, few(built, x, layout=layout, other=options["other"]), other=options["other"])


@every_form
@every_dtype
@pytest.mark.parametrize("what", ["zero", "dense", "empty rows", "one entry"])
def test_extreme_masks(form, block, dtype, what):
    weight, mask = random_weight(50, 140, 0.5)
    if what == "empty rows":
        mask[:20] = mask[33:] = False
    elif what == "one entry":
        mask[:] = False
        mask[41, 139] = True
    else:
        mask[:] = what == "dense"
    built = build(weight, mask, form, dtype, block)
    for tokens in (1, 3, 7):
        x = random_input(tokens, 140)
        check(built, x, few(built, x))


@every_form
@every_dtype
def test_kept_weights_that_are_zero(form, block, dtype):
    weight, mask = random_weight(20, 100, 0.5)
    weight[:, ::2] = 0
    built = build(weight, mask, form, dtype, block)
    x = random_input(2, 100)
    check(built, x, few(built, x))


@every_form
@every_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_every_output_that_keeps_a_weight_there(form, block, dtype, bad):
    weight, mask = random_weight(37, 150, 0.2)
    mask[5] = False
    built = build(weight, mask, form, dtype, block)
    for tokens in (1, 2, 5):
        x = random_input(tokens, 150)
        x[tokens // 2, 77] = bad
        y = few(built, x)
        assert not y[torch.from_numpy(reference.reached(built, x).copy())].isfinite().any()
        others = torch.arange(tokens) != tokens // 2
        check(built, x[others], y[others])
        if dtype == DType.I8:
            assert y[tokens // 2].isnan().all()


@every_form
@every_dtype
@pytest.mark.parametrize("tokens", [1, 3, 7, 11])
def test_bit_identical_for_any_number_of_threads(form, block, dtype, tokens):
    built = build(*random_weight(150, 1100, 0.3), form, dtype, block)
    x = random_input(tokens, 1100)
    assert reference.same_bits([few(built, x, threads=threads) for threads in (1, 2, 3, 5)])


def flush(array: np.ndarray) -> tuple[mmap.mmap, int]:
    """A copy that ends where a page ends, before one that must not be read; its address."""
    page = mmap.PAGESIZE
    size = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    ctypes.memmove(address + size - array.nbytes, array.ctypes.data, array.nbytes)
    assert libc.mprotect(address + size, page, 0) == 0
    return memory, address + size - array.nbytes


@pytest.mark.parametrize(("form", "block"), FORMS[:-1])
@every_dtype
@pytest.mark.parametrize("density", [0.03, 0.3, 1.0])
def test_nothing_is_read_past_the_end(form, block, dtype, density):
    """Of the values and the index: one of a map's last pages may be the last that there is."""
    for rows, cols in ((1, 5), (5, 64), (33, 130)):
        built = build(*random_weight(rows, cols, density), form, dtype, block)
        index, values = (flush(array) for array in built.memory[:2])
        built.struct.index, built.struct.values = index[1], values[1]
        for tokens in (1, 2, 4, 7):
            x = random_input(tokens, cols)
            check(built, x, few(built, x))
        if form == Form.BITMAP:
            library = kernels.library()
            assert library is not None
            assert library.rarefy_lut_bytes(ctypes.byref(built.struct)) > 0
