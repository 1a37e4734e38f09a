"""Sparse products for many tokens: every form, block, dtype, instruction set, shape and layout against float64."""

import math

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.reference import check, extreme_masks, product, random_input, random_weight, weight_struct
from rarefy.runtime.kernels import Activation, Algorithm, DType, Form, runs

FORMS = [(Form.BITMAP, 1), *((Form.INDEX16, block) for block in (1, 4, 8, 16))]
DTYPES = [DType.F32, DType.BF16, DType.I8]
# Ragged in every way, less than one vector, several panels and slabs, and powers of two.
SHAPES = [(1, 1), (3, 70), (37, 1), (1, 200), (64, 64), (50, 129), (130, 515)]

pytestmark = pytest.mark.usefixtures("isa")


def inputs_of(dtype: DType) -> list[torch.dtype]:
    """The dtypes of activations that a weight takes."""
    return [torch.float32] if dtype == DType.F32 else [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_there_is_a_kernel_for_every_form(dtype):
    assert runs(Form.BITMAP, dtype, Algorithm.MANY)
    assert runs(Form.INDEX16, dtype, Algorithm.MANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize(("form", "block"), FORMS, ids=lambda v: str(getattr(v, "name", v)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(form, block, dtype, shape):
    rows, cols = shape
    for seed, (tokens, density) in enumerate([(8, 0.5), (17, 0.1), (1, 0.3), (64, 0.9), (33, 0.02), (130, 0.2)]):
        weight, mask = random_weight(rows, cols, density, seed)
        built = weight_struct(weight, mask=mask, form=form, dtype=dtype, block=block)
        for kind in inputs_of(dtype):
            x = reference.laid_out(random_input(tokens, cols, kind, seed), reference.LAYOUTS[seed % 3])
            check(built, x, product(built, Algorithm.MANY, x, layout=reference.LAYOUTS[(seed + seed // 3) % 3]))


@pytest.mark.parametrize("tokens", [1, 7, 8, 15, 16, 31, 33, 40, 47, 63, 65, 100, 128, 129, 193, 400])
@pytest.mark.parametrize(("form", "block"), FORMS, ids=lambda v: str(getattr(v, "name", v)))
def test_any_number_of_tokens(form, block, tokens):
    weight, mask = random_weight(35, 90, 0.2)
    for dtype in DTYPES:
        built = weight_struct(weight, mask=mask, form=form, dtype=dtype, block=block)
        for layout in reference.LAYOUTS:
            x = reference.laid_out(random_input(tokens, 90), layout)
            check(built, x, product(built, Algorithm.MANY, x, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize(("form", "block"), FORMS, ids=lambda v: str(getattr(v, "name", v)))
def test_no_tokens(form, block, dtype):
    built = weight_struct(*random_weight(5, 9, 0.5)[:1], form=form, dtype=dtype, block=block)
    assert product(built, Algorithm.MANY, random_input(0, 9)).shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize(("form", "block"), FORMS, ids=lambda v: str(getattr(v, "name", v)))
def test_empty_rows_and_matrices_without_zeros_or_with_nothing_else(form, block, dtype):
    weight, some = random_weight(70, 300, 0.3)
    for mask in extreme_masks(some):
        built = weight_struct(weight, mask=mask, form=form, dtype=dtype, block=block)
        x = random_input(20, 300)
        check(built, x, product(built, Algorithm.MANY, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize(("form", "block"), FORMS, ids=lambda v: str(getattr(v, "name", v)))
def test_groups_with_every_number_of_units(form, block, dtype):
    """0 to 64 columns of a group of 64, odd and even numbers, with a last group that is not whole."""
    block_rows, cols = 30, 64 * 18 + 5
    weight = random_weight(block_rows * block - block // 2, cols, 1)[0]
    column = np.arange(cols)
    count = (np.arange(block_rows)[:, None] * 5 + column // 64 * 11) % 65
    mask = ((column * 37 % 64) < count).repeat(block, 0)[: len(weight)]
    built = weight_struct(weight, mask=mask, form=form, dtype=dtype, block=block)
    for tokens in (8, 20, 40):
        x = random_input(tokens, cols)
        check(built, x, product(built, Algorithm.MANY, x))


@pytest.mark.parametrize(("form", "block"), FORMS, ids=lambda v: str(getattr(v, "name", v)))
@pytest.mark.parametrize("size", [1.0, 2.0**-90, 2.0**-110, 2.0**-126, 2.0**110], ids=str)
def test_one_group_of_int8_is_exact(form, block, size):
    """Whole sums times the token's scale, times the row's; activations half way between two whole numbers."""
    weight, mask = random_weight(37, 64, 0.4)
    built = weight_struct(weight, mask=mask, form=form, dtype=DType.I8, block=block)
    rng = np.random.default_rng(5)
    x = torch.from_numpy((rng.integers(-253, 254, (35, 64)) / 2 * size).astype(np.float32))
    x[:, 7] = 127 * size  # the scale is the size
    x[3] = 0
    integers, scales = reference.quantized(x)
    assert built.integers is not None
    assert built.scales is not None
    sums = (integers[:, 0] @ built.integers.T.astype(np.int64)).astype(np.float32)
    y = product(built, Algorithm.MANY, x, threads=2)
    np.testing.assert_array_equal(y.numpy(), sums * scales * built.scales)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", list(Activation), ids=lambda a: a.name)
def test_epilogues(activation, kind):
    dtype = DType.F32 if kind == torch.float32 else DType.BF16
    for form, block in FORMS:
        built = weight_struct(*random_weight(37, 80, 0.3)[:1], form=form, dtype=dtype, block=block)
        bias = random_input(1, 37, seed=3)[0]
        for layout, x_layout, other_layout in zip(
            ["tokens", "features", "padded", "features"],
            ["features", "tokens", "padded", "features"],
            ["features", "tokens", "tokens", "features"],
            strict=True,
        ):
            x = reference.laid_out(random_input(21, 80, kind), x_layout)
            other = reference.laid_out(random_input(21, 37, kind, seed=5), other_layout)
            for extra in ({"bias": bias}, {"other": other}, {"bias": bias, "other": other}):
                y = product(built, Algorithm.MANY, x, activation=activation, layout=layout, **extra)
                check(built, x, y, activation=activation, **extra)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize(("form", "block"), FORMS, ids=lambda v: str(getattr(v, "name", v)))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_every_output_that_keeps_a_weight_there(form, block, dtype, bad):
    weight, mask = random_weight(40, 150, 0.1)
    built = weight_struct(weight, mask=mask, form=form, dtype=dtype, block=block)
    x = random_input(19, 150)
    x[2, 7] = x[5, 149] = x[5, 70] = x[18, 0] = bad
    y = product(built, Algorithm.MANY, x)
    reached = torch.tensor(reference.reached(built, x))
    assert not y[reached].isfinite().any()
    untouched = x.isfinite().all(1)
    assert y[untouched].isfinite().all()
    if dtype == DType.I8:
        assert y[~untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize(("form", "block"), FORMS, ids=lambda v: str(getattr(v, "name", v)))
def test_bit_identical_for_any_number_of_threads(form, block, dtype):
    weight, mask = random_weight(300, 400, 0.2)
    built = weight_struct(weight, mask=mask, form=form, dtype=dtype, block=block)
    x = random_input(203, 400)
    for tokens in (9, 33, 203):
        some = x[:tokens]
        outputs = [product(built, Algorithm.MANY, some, threads=threads) for threads in (1, 2, 3, 7)]
        assert reference.same_bits(outputs)
        check(built, some, outputs[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize(("form", "block"), [(Form.BITMAP, 1), (Form.INDEX16, 1), (Form.INDEX16, 4)], ids=str)
def test_long_rows_in_several_slabs(form, block, dtype):
    """More bytes of activations than are packed at once, and columns past 32767."""
    weight, mask = random_weight(20, 65536, 0.01)
    mask[:, -1] = True
    built = weight_struct(weight, mask=mask, form=form, dtype=dtype, block=block)
    x = random_input(200, 65536)
    check(built, x, product(built, Algorithm.MANY, x, threads=2))
