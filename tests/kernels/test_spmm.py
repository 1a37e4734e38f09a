"""Sparse products for many tokens: every form, block, dtype, instruction set, shape and layout against float64."""

import math

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.reference import check, product, random_input, random_weight, weight_struct
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


@pytest.mark.parametrize("tokens", [1, 7, 8, 15, 16, 31, 47, 63, 65, 100, 193, 400])
@pytest.mark.parametrize(("form", "block"), [(Form.BITMAP, 1), (Form.INDEX16, 1), (Form.INDEX16, 4)], ids=str)
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
    empty_rows = some.copy()
    empty_rows[::3] = empty_rows[16:48] = False
    late = np.zeros_like(some)
    late[:, 290:] = True
    for mask in (empty_rows, late, np.zeros_like(some), np.ones_like(some)):
        built = weight_struct(weight, mask=mask, form=form, dtype=dtype, block=block)
        x = random_input(20, 300)
        check(built, x, product(built, Algorithm.MANY, x))


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
    outputs = [product(built, Algorithm.MANY, x, threads=threads) for threads in (1, 2, 3, 7)]
    assert reference.same_bits(outputs)
    check(built, x, outputs[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize(("form", "block"), [(Form.BITMAP, 1), (Form.INDEX16, 1), (Form.INDEX16, 4)], ids=str)
def test_long_rows_in_several_slabs(form, block, dtype):
    """More bytes of activations than are packed at once, and columns past 32767."""
    weight, mask = random_weight(20, 65536, 0.01)
    mask[:, -1] = True
    built = weight_struct(weight, mask=mask, form=form, dtype=dtype, block=block)
    x = random_input(200, 65536)
    check(built, x, product(built, Algorithm.MANY, x, threads=2))
