"""The three products of a training step on compressed rows: y = x Wᵀ, values in another order, dW at the non-zeros.

By the compiled kernels where they apply (float32), else by torch, which expands a chunk of rows at a time to a dense
matrix: correct for any size, with a bounded scratch, at about the speed of dense products.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rarefy.axes.top_k import from_array
from rarefy.core import native
from rarefy.core.sparse.structure import Compressed

_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_ARGUMENTS: dict[str, list[Any]] = {
    "rarefy_train_forward": [_P, _P, _P, _L, _L, _P, _L, _L, _P, _L, _L, _P, _L, _I],
    "rarefy_train_gather": [_P, _P, _P, _L, _I],
    "rarefy_train_weight_gradient": [_P, _P, _L, _L, _P, _L, _L, _P, _L, _L, _P, _L, _I],
}


@cache
def _kernel(name: str) -> Any:
    """The compiled function, or None."""
    function = getattr(native.library(), name, None)
    if function is not None:
        function.argtypes, function.restype = _ARGUMENTS[name], _I
    return function


def walkable(t: Tensor) -> Tensor:
    """`t`, a matrix, as it is where one of its strides is 1 and the other leaves no overlap, else a contiguous copy."""
    (rows, cols), (over, along) = t.shape, t.stride()
    if (along == 1 and over >= cols) or (over == 1 and along >= rows):
        return t
    return t.contiguous()


def empty(tokens: int, features: int, like: Tensor, *, feature_major: bool) -> Tensor:
    """(tokens, features), uninitialised; feature-major: the transposed view of a (features, tokens) buffer."""
    return like.new_empty(features, tokens).t() if feature_major else like.new_empty(tokens, features)


def multiply(values: Tensor, matrix: Compressed, x: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
    """y[t, r] = bias[r] + Σ values[i] · x[t, columns[i]] over the non-zeros i of row r.

    x: (tokens, cols), y: (tokens, rows), both `walkable`; all of one dtype, on the CPU.
    """
    kernel = _kernel("rarefy_train_forward") if values.dtype is torch.float32 else None
    if kernel is not None:
        failed = kernel(
            values.data_ptr(),
            matrix.columns.data_ptr(),
            matrix.starts.data_ptr(),
            matrix.rows,
            matrix.cols,
            x.data_ptr(),
            *x.stride(),
            y.data_ptr(),
            *y.stride(),
            None if bias is None else bias.data_ptr(),
            len(x),
            torch.get_num_threads(),
        )
        if not failed:
            return
    for first, last in matrix.chunks():
        torch.mm(x, matrix.expand(values, first, last).t(), out=y[:, first:last])
    if bias is not None:
        y.add_(bias)


def permute(values: Tensor, order: Tensor) -> Tensor:
    """values[order], a new tensor. order: uint32."""
    kernel = _kernel("rarefy_train_gather") if values.dtype is torch.float32 else None
    if kernel is not None:
        out = torch.empty_like(values)
        found = values.data_ptr(), order.data_ptr(), out.data_ptr(), len(values), torch.get_num_threads()
        if not kernel(*found):
            return out
    return values[from_array(order.numpy().astype("int64"))]


def weight_gradient(matrix: Compressed, x: Tensor, dy: Tensor) -> Tensor:
    """gradient[i] = Σ over tokens of dy[t, row of i] · x[t, columns[i]], a new vector.

    x: (tokens, cols), dy: (tokens, rows), both `walkable`, of one dtype, on the CPU.
    """
    gradient = x.new_empty(matrix.columns.numel())
    kernel = _kernel("rarefy_train_weight_gradient") if x.dtype is torch.float32 else None
    if kernel is not None:
        failed = kernel(
            matrix.columns.data_ptr(),
            matrix.starts.data_ptr(),
            matrix.rows,
            matrix.cols,
            x.data_ptr(),
            *x.stride(),
            dy.data_ptr(),
            *dy.stride(),
            gradient.data_ptr(),
            len(x),
            torch.get_num_threads(),
        )
        if not failed:
            return gradient
    for first, last in matrix.chunks():
        begin, end = matrix.span(first, last)
        rows = dy[:, first:last].t() @ x
        gradient[begin:end] = rows.view(-1)[matrix.positions(first, last)]
    return gradient
