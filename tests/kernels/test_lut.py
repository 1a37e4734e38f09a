"""The look-up form for any number of tokens against float64, and back to the bitmap that it was built from."""

import ctypes
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.reference import (
    Built,
    check,
    extreme_masks,
    looked_up,
    product,
    random_input,
    random_weight,
    weight_struct,
)
from rarefy.runtime import kernels
from rarefy.runtime.kernels import Activation, Algorithm, DType, Form, Weight, runs

DTYPES = [DType.F32, DType.BF16, DType.I8]
# Ragged in every way, one panel and several, one row, one column.
SHAPES = [(1, 1), (3, 70), (37, 1), (1, 200), (64, 64), (50, 129), (130, 515)]
BYTES = {DType.F32: np.uint32, DType.BF16: np.uint16, DType.I8: np.uint8}

pytestmark = pytest.mark.usefixtures("isa")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)


def build(weight: np.ndarray, mask: np.ndarray, dtype: DType) -> Built:
    return looked_up(weight_struct(weight, mask=mask, form=Form.BITMAP, dtype=dtype))


def many(built: Built, x: torch.Tensor, **options) -> torch.Tensor:
    return product(built, Algorithm.MANY, x, **options)


def inputs_of(dtype: DType) -> list[torch.dtype]:
    """The dtypes of activations that a weight takes."""
    return [torch.float32] if dtype == DType.F32 else [torch.float32, torch.bfloat16]


@every_dtype
def test_there_are_kernels_for_few_and_many_tokens(dtype):
    assert runs(Form.LUT, dtype, Algorithm.FEW)
    assert runs(Form.LUT, dtype, Algorithm.MANY)
    assert not runs(Form.LUT, dtype, Algorithm.EXPAND)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(dtype, shape):
    for seed, (tokens, density) in enumerate([(8, 0.5), (17, 0.1), (1, 0.3), (64, 0.9), (33, 0.02), (130, 0.2)]):
        built = build(*random_weight(*shape, density, seed), dtype)
        for kind in inputs_of(dtype):
            x = reference.laid_out(random_input(tokens, shape[1], kind, seed), reference.LAYOUTS[seed % 3])
            check(built, x, many(built, x, layout=reference.LAYOUTS[(seed + seed // 3) % 3]))


@every_dtype
def test_any_number_of_tokens(dtype):
    built = build(*random_weight(35, 150, 0.2), dtype)
    for tokens in (*range(41), 128):
        for x_layout, layout in zip(reference.LAYOUTS, ("features", "tokens", "padded"), strict=True):
            x = reference.laid_out(random_input(tokens, 150), x_layout)
            y = many(built, x, layout=layout)
            assert y.shape == (tokens, 35)
            check(built, x, y)


@every_dtype
@pytest.mark.parametrize("density", [0.02, 0.4])
def test_wide_rows_and_many_slices(dtype, density):
    """Activations that the first-level cache does not hold, and columns in more panels than a piece of packing."""
    built = build(*random_weight(200, 2100, density), dtype)
    for tokens in (9, 40):
        x = random_input(tokens, 2100)
        check(built, x, many(built, x, threads=2))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", list(Activation), ids=lambda a: a.name)
def test_epilogues(activation, kind):
    bias = random_input(1, 37, seed=3)[0]
    for dtype in [d for d in DTYPES if kind in inputs_of(d)]:
        built = build(*random_weight(37, 80, 0.3), dtype)
        for layout, x_layout, other_layout in (
            ("tokens", "features", "features"),
            ("features", "tokens", "tokens"),
            ("padded", "padded", "tokens"),
            ("features", "features", "features"),
        ):
            x = reference.laid_out(random_input(21, 80, kind), x_layout)
            other = reference.laid_out(random_input(21, 37, kind, seed=5), other_layout)
            for extra in ({"bias": bias}, {"other": other}, {"bias": bias, "other": other}):
                y = many(built, x, activation=activation, layout=layout, **extra)
                check(built, x, y, activation=activation, **extra)


@every_dtype
def test_empty_rows_and_matrices_without_zeros_or_with_nothing_else(dtype):
    weight, some = random_weight(70, 300, 0.3)
    for mask in extreme_masks(some):
        built = build(weight, mask, dtype)
        x = random_input(20, 300)
        check(built, x, many(built, x))


@every_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_every_output_that_keeps_a_weight_there(dtype, bad):
    weight, mask = random_weight(40, 150, 0.1)
    mask[16:32] = False
    built = build(weight, mask, dtype)
    for layout in reference.LAYOUTS:
        x = reference.laid_out(random_input(19, 150), layout)
        x[2, 7] = x[5, 149] = x[5, 70] = x[18, 0] = bad
        y = many(built, x)
        assert not y[torch.from_numpy(reference.reached(built, x).copy())].isfinite().any()
        untouched = x.isfinite().all(1)
        check(built, x[untouched], y[untouched])
        if dtype == DType.I8:
            assert y[~untouched].isnan().all()


@every_dtype
@pytest.mark.parametrize("tokens", [1, 5, 8, 23, 200])
def test_bit_identical_for_any_number_of_threads(dtype, tokens):
    built = build(*random_weight(300, 400, 0.2), dtype)
    for layout in ("tokens", "features"):
        x = reference.laid_out(random_input(tokens, 400), layout)
        outputs = [many(built, x, layout=layout, threads=threads) for threads in (1, 2, 3, 9)]
        assert reference.same_bits(outputs)
        check(built, x, outputs[0])


@every_dtype
def test_few_and_many_are_the_same_products(dtype):
    built = build(*random_weight(60, 300, 0.2), dtype)
    for tokens in (1, 7, 20):
        x = random_input(tokens, 300)
        assert reference.same_bits([product(built, a, x) for a in (Algorithm.FEW, Algorithm.MANY)])


# ------------------------------------------------------------------------------------------------------------ decoding


def decoded(built: Built) -> tuple[Weight, np.ndarray, np.ndarray, np.ndarray]:
    """What a look-up form says: the structure, starts, words and the bytes of the values, one behind each checked."""
    rows, cols, units = built.struct.rows, built.struct.cols, built.struct.units
    sizes = (rows + 1, rows * -(-cols // 64), units)
    kinds = (np.uint32, np.uint64, BYTES[built.dtype])
    arrays = [np.full(size + 1, 0xA5, kind) for size, kind in zip(sizes, kinds, strict=True)]
    struct = Weight()
    library = kernels.library()
    assert library is not None
    code = library.rarefy_lut_decode(ctypes.byref(built.struct), *(a.ctypes.data for a in arrays), ctypes.byref(struct))
    assert code == 0
    assert all(a[-1] == 0xA5 for a in arrays)
    assert [struct.starts, struct.index, struct.values] == [a.ctypes.data for a in arrays]
    starts, words, values = (a[:-1] for a in arrays)
    return struct, starts, words, values


def check_round_trip(weight: np.ndarray, mask: np.ndarray, dtype: DType, form: Form = Form.BITMAP) -> None:
    bitmap = weight_struct(weight, mask=mask, form=Form.BITMAP, dtype=dtype)
    source = bitmap if form == Form.BITMAP else weight_struct(weight, mask=mask, form=form, dtype=dtype)
    built = looked_up(source)
    struct, starts, words, values = decoded(built)
    assert (struct.form, struct.dtype, struct.block) == (Form.BITMAP, dtype, 1)
    assert (struct.rows, struct.cols, struct.units) == (*weight.shape, int(mask.sum()))
    index, stored, first = bitmap.memory[:3]
    np.testing.assert_array_equal(starts, first)
    np.testing.assert_array_equal(words, index.reshape(-1))
    np.testing.assert_array_equal(values, stored.reshape(-1).view(BYTES[dtype]))
    if dtype == DType.I8:
        scales = np.ctypeslib.as_array(ctypes.cast(struct.scales, ctypes.POINTER(ctypes.c_float)), (len(weight),))
        np.testing.assert_array_equal(scales, source.scales)
    else:
        assert struct.scales is None


@every_dtype
@pytest.mark.parametrize("form", [Form.BITMAP, Form.INDEX16], ids=lambda f: f.name)
def test_decoding_gives_back_the_bitmap(dtype, form):
    for shape in [*SHAPES, (40, 1000)]:
        for density in (0.0, 0.03, 0.5, 1.0):
            check_round_trip(*random_weight(*shape, density), dtype, form)


@every_dtype
def test_kept_zeros_survive(dtype):
    weight, mask = random_weight(40, 200, 0.3)
    weight[:, ::2] = 0
    mask[3] = True
    weight[3] = 0
    check_round_trip(weight, mask, dtype)
    built = build(weight, mask, dtype)
    for algorithm in (Algorithm.FEW, Algorithm.MANY):
        x = random_input(9, 200)
        check(built, x, product(built, algorithm, x))


@every_dtype
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 50), cols=st.integers(1, 200), density=st.floats(0, 1), seed=st.integers(0, 2**20))
def test_any_mask_comes_back(dtype, rows, cols, density, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, cols)).astype(np.float32) * (rng.random((rows, cols)) < 0.9)
    mask = rng.random((rows, cols)) < density * rng.random((rows, 1)) * 2  # rows of different density
    check_round_trip(weight.astype(np.float32), mask, dtype)


def test_only_a_look_up_form_is_decoded():
    built = weight_struct(*random_weight(4, 4, 0.5)[:1], form=Form.BITMAP)
    library = kernels.library()
    assert library is not None
    struct = Weight()
    memory = np.full(64, 0xA5, np.uint8)
    at = memory.ctypes.data
    assert library.rarefy_lut_decode(ctypes.byref(built.struct), at, at, at, ctypes.byref(struct)) == 1
    assert (memory == 0xA5).all()
