"""Dense products, own kernels: few tokens, many tokens, and a bitmap made dense tile by tile."""

import itertools
import math

import numpy as np
import pytest
import torch

from kernels.reference import (
    LAYOUTS,
    Built,
    check,
    laid_out,
    product,
    random_input,
    random_weight,
    reached,
    same_bits,
    weight_struct,
)
from rarefy.runtime import kernels
from rarefy.runtime.kernels import Activation, Algorithm, DType, Form

KERNELS = [(Form.DENSE, Algorithm.FEW), (Form.DENSE, Algorithm.MANY), (Form.BITMAP, Algorithm.EXPAND)]
SHAPES = [(1, 1), (1, 70), (33, 1), (7, 31), (16, 64), (17, 129), (50, 300), (97, 1030)]
TOKENS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 33, 48, 65, 130]


def build(form: Form, dtype: DType, rows: int, cols: int, density: float = 0.4) -> Built:
    weight, mask = random_weight(rows, cols, 1.0 if form == Form.DENSE else density)
    return weight_struct(weight, mask=mask, form=form, dtype=dtype)


def activations(dtype: DType) -> list[torch.dtype]:
    return [torch.float32] if dtype == DType.F32 else [torch.float32, torch.bfloat16]


every_dtype = pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.I8], ids=lambda d: d.name)
every_kernel = pytest.mark.parametrize(("form", "algorithm"), KERNELS, ids=lambda k: k.name)


@every_dtype
@every_kernel
def test_every_shape_and_number_of_tokens(isa, form, algorithm, dtype):
    for (rows, cols), tokens in itertools.product(SHAPES, TOKENS):
        built = build(form, dtype, rows, cols)
        kind = activations(dtype)[(rows + tokens) % len(activations(dtype))]
        x = laid_out(random_input(tokens, cols, kind), LAYOUTS[(rows + cols + tokens) % 3])
        check(built, x, product(built, algorithm, x, layout=LAYOUTS[(rows + tokens) % 3]))


@every_dtype
@every_kernel
def test_layouts_and_what_follows_the_sum(isa, form, algorithm, dtype):
    rows, cols = 35, 130
    built = build(form, dtype, rows, cols)
    bias = random_input(1, rows, seed=3)[0]
    layouts = list(itertools.product(LAYOUTS, LAYOUTS, (None, *LAYOUTS)))
    for (tokens, kind), (of_x, of_y, of_other) in itertools.product(
        itertools.product((3, 21), activations(dtype)), layouts
    ):
        x = laid_out(random_input(tokens, cols, kind), of_x)
        other = None if of_other is None else laid_out(random_input(tokens, rows, kind, seed=2), of_other)
        for activation in Activation if of_x == of_y != of_other else (Activation.RELU,):
            follows = {"bias": bias, "activation": activation, "other": other}
            check(built, x, product(built, algorithm, x, layout=of_y, **follows), **follows)


@every_dtype
@every_kernel
def test_the_number_of_threads_changes_no_bit(isa, form, algorithm, dtype):
    """Shapes large enough for a team, a number of tokens that needs two rounds of packing, and both layouts."""
    for tokens, rows, cols in ((1, 400, 333), (5, 400, 333), (9, 400, 333), (70, 260, 333), (530, 70, 90)):
        built = build(form, dtype, rows, cols)
        for layout in ("tokens", "features"):
            x = laid_out(random_input(tokens, cols), layout)
            outputs = [product(built, algorithm, x, layout=layout, threads=threads) for threads in (1, 2, 3)]
            assert same_bits(outputs)
            check(built, x, outputs[0])


@every_dtype
@every_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives(isa, form, algorithm, dtype, bad):
    """At every output that keeps a weight there; with int8 at every output of the token; other tokens are untouched."""
    for tokens, layout in itertools.product((2, 7, 20), ("tokens", "features")):
        built = build(form, dtype, 19, 150)
        x = laid_out(random_input(tokens, 150), layout)
        clean = product(built, algorithm, x)
        spoilt = x.clone()
        spoilt[1, 77] = bad
        y = product(built, algorithm, spoilt)
        must = torch.from_numpy(reached(built, spoilt).copy())
        assert must.any()
        assert not y[must].isfinite().any()
        if dtype == DType.I8:
            assert y[must].isnan().all()
        others = [t for t in range(tokens) if t != 1]
        assert same_bits([y[others], clean[others]])


@every_dtype
@every_kernel
def test_weights_that_are_not_finite_arrive(isa, form, algorithm, dtype):
    if dtype == DType.I8:
        pytest.skip("integers are finite")
    weight, _ = random_weight(20, 70, 1.0)
    weight[7, 33] = math.nan
    weight[12, 69] = math.inf
    built = weight_struct(weight, form=form, dtype=dtype)
    for tokens in (1, 18):
        y = product(built, algorithm, random_input(tokens, 70))
        assert y[:, 7].isnan().all()
        assert y[:, 12].isinf().all()
        assert y.isfinite().sum() == 18 * tokens


@every_dtype
@every_kernel
def test_nothing_kept_and_no_tokens(isa, form, algorithm, dtype):
    weight = np.zeros((21, 140), np.float32)
    built = weight_struct(weight, mask=np.zeros_like(weight, bool), form=form, dtype=dtype)
    bias = random_input(1, 21, seed=4)[0]
    for tokens in (0, 1, 17):
        y = product(built, algorithm, random_input(tokens, 140), bias=bias)
        assert torch.equal(y, bias.expand(tokens, 21))


@every_kernel
def test_int8_activations_are_rounded_as_defined(isa, form, algorithm):
    """Half to even, never past 127, and right where the scale is next to nothing: seen through one weight a row."""
    cols = 128
    weight = np.eye(cols, dtype=np.float32) * 127  # scale 1, every row one entry of 127
    built = weight_struct(weight, form=form, dtype=DType.I8)
    assert built.scales is not None
    rng = np.random.default_rng(5)
    ties = rng.integers(-254, 255, (20, cols)) / 2  # with scale 1: whole numbers and the middles between them
    ties[:, [0, 64]] = 127
    ties[3] *= 2.0**-140  # subnormal
    ties[4] *= 2.0**100
    ties[5, 64:] = 0
    ties[6] = 2.0**-149
    ties[7] *= 0.731
    for tokens in (4, 20):
        for layout in LAYOUTS:
            x = laid_out(torch.from_numpy(ties[-tokens:].astype(np.float32)), layout)
            if tokens == 20:
                x = laid_out(torch.from_numpy(ties.astype(np.float32)), layout)
            check(built, x, product(built, algorithm, x))


def test_float32_weights_take_no_bfloat16(isa):
    built = build(Form.DENSE, DType.F32, 20, 30)
    for algorithm in (Algorithm.FEW, Algorithm.MANY):
        x = random_input(20, 30, torch.bfloat16)
        assert kernels.linear(built.struct, algorithm, x, torch.empty(20, 20, dtype=torch.bfloat16)) == 1
