"""The products of a training step on the non-zeros alone, against float64."""

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from rarefy.core import native

# rows, cols, tokens, density: ragged, one of each, empty and full, several slabs of tokens, several panels of columns.
CASES = [
    (5, 7, 3, 0.5),
    (64, 100, 128, 0.1),
    (130, 257, 200, 0.2),
    (40, 3000, 16, 0.01),
    (1, 1, 1, 1.0),
    (300, 64, 256, 0.3),
    (33, 65, 300, 0.0),
    (17, 31, 40, 1.0),
    (7, 4000, 48, 0.2),
]


@dataclass
class Structure:
    mask: np.ndarray
    columns: np.ndarray
    starts: np.ndarray


def structure(rows: int, cols: int, density: float) -> Structure:
    mask = np.random.default_rng(rows * cols).random((rows, cols)) < density
    starts = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.uint32)
    return Structure(mask, np.nonzero(mask)[1].astype(np.uint16), starts)


def activations(tokens: int, features: int, feature_major: bool, seed: int) -> Tensor:
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed))
    return x.T.contiguous().T if feature_major else x


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = native.library()
    if library is None:
        pytest.skip("no compiled kernels")
    p, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.rarefy_train_weight_gradient.argtypes = [p, p, i64, i64, p, i64, i64, p, i64, i64, p, i64, i32]
    library.rarefy_train_forward.argtypes = [p, p, p, i64, i64, p, i64, i64, p, i64, i64, p, i64, i32]
    library.rarefy_train_gather.argtypes = [p, p, p, i64, i32]
    return library


def weight_gradient(library: ctypes.CDLL, s: Structure, x: Tensor, dy: Tensor, threads: int) -> np.ndarray:
    gradient = np.full(len(s.columns), 7, np.float32)
    status = library.rarefy_train_weight_gradient(
        s.columns.ctypes.data, s.starts.ctypes.data, *s.mask.shape, x.data_ptr(), *x.stride(), dy.data_ptr(),
        *dy.stride(), gradient.ctypes.data, len(x), threads,
    )  # fmt: skip
    assert status == 0
    return gradient


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("x_major", [False, True], ids=["x token-major", "x feature-major"])
@pytest.mark.parametrize("y_major", [False, True], ids=["dy token-major", "dy feature-major"])
def test_the_weights_gradient_is_that_of_dense(library, case, x_major, y_major):
    rows, cols, tokens, density = case
    s = structure(rows, cols, density)
    x, dy = activations(tokens, cols, x_major, 1), activations(tokens, rows, y_major, 2)
    gradient = weight_gradient(library, s, x, dy, 2)
    wanted = (dy.double().T @ x.double()).numpy()[s.mask]
    # Sums of `tokens` products of standard normals, each rounding at most 2⁻²⁴ of the partial sum.
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=tokens * 1e-6)
    for threads in (1, 3):
        assert np.array_equal(weight_gradient(library, s, x, dy, threads), gradient)


def test_without_tokens_the_gradient_is_zero(library):
    s = structure(16, 16, 0.5)
    assert not weight_gradient(library, s, torch.empty(0, 16), torch.empty(0, 16), 2).any()


def test_a_gradient_that_is_not_finite_stays_with_its_row(library):
    s = structure(20, 40, 0.5)
    x, dy = activations(32, 40, True, 1), activations(32, 20, True, 2)
    dy[3, 7] = float("nan")
    gradient = np.zeros_like(s.mask, dtype=np.float32)
    gradient[s.mask] = weight_gradient(library, s, x, dy, 2)
    assert np.isnan(gradient[7][s.mask[7]]).all()
    assert np.isfinite(np.delete(gradient, 7, axis=0)).all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("x_major", [False, True], ids=["x token-major", "x feature-major"])
@pytest.mark.parametrize("y_major", [False, True], ids=["y token-major", "y feature-major"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_the_forward_product_is_that_of_dense(library, case, x_major, y_major, biased):
    rows, cols, tokens, density = case
    s = structure(rows, cols, density)
    values = np.random.default_rng(3).standard_normal(len(s.columns)).astype(np.float32)
    x = activations(tokens, cols, x_major, 1)
    bias = activations(1, rows, False, 4)[0] if biased else None
    y = activations(tokens, rows, y_major, 5)

    def forward(threads: int) -> Tensor:
        status = library.rarefy_train_forward(
            values.ctypes.data, s.columns.ctypes.data, s.starts.ctypes.data, rows, cols, x.data_ptr(), *x.stride(),
            y.data_ptr(), *y.stride(), None if bias is None else bias.data_ptr(), tokens, threads,
        )  # fmt: skip
        assert status == 0
        return y.clone()

    weight = torch.zeros(rows, cols, dtype=torch.float64)
    weight[torch.from_numpy(s.mask)] = torch.from_numpy(values).double()
    wanted = x.double() @ weight.T + (0 if bias is None else bias.double())
    torch.testing.assert_close(forward(2).double(), wanted, rtol=0, atol=max(1, cols * density) * 2e-6)
    assert torch.equal(forward(1), forward(3))


def test_values_are_gathered_in_order(library):
    generator = np.random.default_rng(0)
    values = generator.standard_normal(70_001).astype(np.float32)
    order = generator.permutation(len(values)).astype(np.uint32)
    out = np.empty_like(values)
    assert library.rarefy_train_gather(values.ctypes.data, order.ctypes.data, out.ctypes.data, len(out), 2) == 0
    assert np.array_equal(out, values[order])
