"""Packed layers as operators of torch, for torch.compile, torch.export and autograd: `rarefy::linear` and `conv2d`.

An operator is given the bytes of a stored weight. What it makes of them (validation, pointers, a transposed copy for
the gradient of the input) is kept for as long as their storage lives, and made anew when they were written to.
Weights are constants: gradients reach the input and the bias.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from rarefy.runtime import conv, kernels
from rarefy.runtime.engine import Copies, Engine, Runner, dense_of, runner
from rarefy.runtime.forms import Stored, encode, from_bytes
from rarefy.runtime.kernels import Form
from rarefy.runtime.ways import TORCH, Table, Way, plain_table

__all__ = ["conv2d", "direct", "linear"]

_torch: Any = torch
_LIBRARY: Any = torch.library.Library("rarefy", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, SymInt rows, SymInt cols, int[] algorithms) -> Tensor")
_LIBRARY.define("linear_input_gradient(Tensor gradient, Tensor weight, SymInt rows, SymInt cols) -> Tensor")
_LIBRARY.define("conv2d(Tensor x, Tensor weight, Tensor? bias, int[] geometry, str way) -> Tensor")
_LIBRARY.define("conv2d_input_gradient(Tensor gradient, Tensor weight, int[] geometry, SymInt[] size) -> Tensor")

_is_grad_enabled = torch.is_grad_enabled
_modes: Any = torch._C._len_torch_dispatch_stack  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
_transforms: Any = torch._C._functorch.peek_interpreter_stack  # pyright: ignore


def direct(x: Tensor) -> bool:
    """Whether a plain call of a kernel is all that x asks for: a plain tensor on the CPU that nothing watches."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not (x.requires_grad and _is_grad_enabled())
        and not _modes()
        and _transforms() is None
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, cols: int, algorithms: Sequence[int]) -> Tensor:
    """x Wᵀ + bias by the operator. weight: bytes of a stored weight [rows, cols]; bias: [rows], float32."""
    return torch.ops.rarefy.linear(x, weight, bias, rows, cols, list(algorithms))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: conv.Geometry, way: str) -> Tensor:
    """A convolution by the operator. weight: bytes of a stored weight [out, in · kernel_h · kernel_w]."""
    return torch.ops.rarefy.conv2d(x, weight, bias, list(geometry), way)


# --- what is known about bytes ---------------------------------------------------------------------------------------


@dataclass
class _Known:
    """A stored weight that was validated, and what was made of it."""

    stored: Stored
    alive: StorageWeakRef
    state: tuple[int, int]
    engines: dict[Any, Any] = field(default_factory=dict[Any, Any])


_known: dict[tuple[int, int, int], _Known] = {}
_lock = threading.Lock()


def _find(weight: Tensor) -> _Known:
    """A weak reference keeps the address of a storage from being given to another, so it is a key that never lies."""
    storage = weight.untyped_storage()
    key = (int(storage._cdata), int(weight.storage_offset()), weight.numel())  # pyright: ignore
    state = (weight.data_ptr(), _version(weight))
    known = _known.get(key)
    if known is None or known.state != state:
        stored = from_bytes(_view(weight))
        with _lock:
            for old in [k for k, each in _known.items() if each.alive.expired()]:
                del _known[old]
            known = _known[key] = _Known(stored, StorageWeakRef(storage), state)
    return known


def _view(weight: Tensor) -> Tensor:
    """The same memory, not kept alive: what is known goes when the last tensor that owns it has gone."""
    if not weight.is_contiguous() or weight.dtype != torch.uint8 or not weight.numel():
        return weight  # to be refused
    return torch.frombuffer((ctypes.c_uint8 * weight.numel()).from_address(weight.data_ptr()), dtype=torch.uint8)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _engine(weight: Tensor, bias: Tensor | None, algorithms: Sequence[int]) -> Runner:
    known = _find(weight)
    key = tuple(algorithms)
    made = known.engines.get(key)
    if made is None:
        stored = known.stored
        table = tuple(Way(Form(int(stored.form)), a, stored.block) for a in algorithms)
        made = known.engines[key] = runner(stored, table if _possible(table, stored) else None, None)[0]
    return _with_bias(made, known.stored, bias)


def _possible(table: Table, stored: Stored) -> bool:
    return all(way.exists(stored.dtype) for way in table)


def _with_bias(made: Any, stored: Stored, bias: Tensor | None) -> Runner:
    if bias is None:
        return made
    exact = bias.to(torch.float32).contiguous()
    if isinstance(made, Engine):
        return made.with_bias(exact)
    return lambda x: (made(x) + exact.to(x.dtype)).to(x.dtype)


# --- linear ----------------------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, cols: int, algorithms: Sequence[int]) -> Tensor:
    y = _engine(weight, bias, algorithms)(x)
    return y if y.is_contiguous() else y.contiguous()


def _linear_fake(x: Tensor, weight: Tensor, bias: Any, rows: Any, cols: Any, algorithms: Any) -> Tensor:
    _torch._check(x.shape[-1] == cols, lambda: f"a layer of {cols} inputs was given shape {tuple(x.shape)}")
    return x.new_empty((*x.shape[:-1], rows))


def _input_gradient(gradient: Tensor, weight: Tensor, rows: int, cols: int) -> Tensor:
    """dX = dY W, by the transposed weight, in float32 values: made at the first call, kept with the bytes."""
    known = _find(weight)
    made = known.engines.get("gradient")
    if made is None:
        made = known.engines["gradient"] = _transposed(known.stored)
    return made(gradient.contiguous())


def _input_gradient_fake(gradient: Tensor, weight: Tensor, rows: Any, cols: Any) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], cols))


def _transposed(stored: Stored) -> Runner:
    if stored.form == Form.DENSE or not kernels.available():
        weight = dense_of(stored)
        return lambda gradient: functional.linear(gradient, weight.to(gradient.dtype).t())
    form = Form.INDEX16 if stored.shape[0] <= 1 << 16 else Form.BITMAP
    dense = stored.dense().to(torch.float32).t().contiguous()
    twin = encode(dense, mask=stored.mask().t().contiguous(), form=form)
    table = plain_table(twin.form, twin.dtype)  # pyright: ignore[reportArgumentType]
    return _by_torch(dense) if table is None else Copies(twin).engine(table, None)


def _by_torch(weight: Tensor) -> Runner:
    return lambda x: functional.linear(x.to(weight.dtype), weight).to(x.dtype)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, bias, rows, cols, algorithms = inputs
    ctx.save_for_backward(weight)
    ctx.sizes, ctx.algorithms, ctx.bias = (rows, cols), algorithms, bias is not None


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    (weight,) = ctx.saved_tensors
    dx = torch.ops.rarefy.linear_input_gradient(gradient, weight, *ctx.sizes) if ctx.needs_input_grad[0] else None
    db = gradient.flatten(0, -2).sum(0).float() if ctx.bias and ctx.needs_input_grad[2] else None
    return dx, None, db, None, None, None


def _setup_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, rows, cols = inputs
    ctx.save_for_backward(weight)
    ctx.sizes = (rows, cols)


def _gradient_backward(ctx: Any, second: Tensor) -> tuple[Any, ...]:
    (weight,) = ctx.saved_tensors
    # The table of the layer is not known here; any way is right.
    return torch.ops.rarefy.linear(second, weight, None, *ctx.sizes, [TORCH] * kernels.BUCKETS), None, None, None


_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("linear_input_gradient", _input_gradient, "CPU")
_torch.library.register_fake("rarefy::linear", _linear_fake, lib=_LIBRARY)
_torch.library.register_fake(
    "rarefy::linear_input_gradient",
    _input_gradient_fake,
    lib=_LIBRARY,
)
_torch.library.register_autograd("rarefy::linear", _linear_backward, setup_context=_setup_linear, lib=_LIBRARY)
_torch.library.register_autograd(
    "rarefy::linear_input_gradient", _gradient_backward, setup_context=_setup_gradient, lib=_LIBRARY
)

# --- conv2d ----------------------------------------------------------------------------------------------------------


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int], way: str) -> Tensor:
    known, shape = _find(weight), conv.Geometry(*geometry)
    exact = None if bias is None else bias.to(torch.float32).contiguous()
    return conv.runner(known.stored, shape, exact, way)(x)


def _conv2d_fake(x: Tensor, weight: Tensor, bias: Any, geometry: Sequence[int], way: str) -> Tensor:
    return x.new_empty(conv.Geometry(*geometry).result(x.shape))


def _conv2d_gradient(gradient: Tensor, weight: Tensor, geometry: Sequence[int], size: Sequence[int]) -> Tensor:
    shape = conv.Geometry(*geometry)
    dense = shape.dense(_find(weight).stored).to(gradient.dtype)
    return _torch.nn.grad.conv2d_input(size, dense, gradient, shape.stride, shape.padding).contiguous()


def _conv2d_gradient_fake(gradient: Tensor, weight: Tensor, geometry: Any, size: Any) -> Tensor:
    return gradient.new_empty(list(size))


def _setup_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, geometry, _ = inputs
    ctx.save_for_backward(weight)
    ctx.geometry, ctx.size, ctx.bias = geometry, x.shape, bias is not None


def _conv2d_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    (weight,) = ctx.saved_tensors
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.rarefy.conv2d_input_gradient(gradient, weight, ctx.geometry, list(ctx.size))
    db = gradient.sum((0, 2, 3)).float() if ctx.bias and ctx.needs_input_grad[2] else None
    return dx, None, db, None, None


_LIBRARY.impl("conv2d", _conv2d, "CPU")
_LIBRARY.impl("conv2d_input_gradient", _conv2d_gradient, "CPU")
_torch.library.register_fake("rarefy::conv2d", _conv2d_fake, lib=_LIBRARY)
_torch.library.register_fake(
    "rarefy::conv2d_input_gradient",
    _conv2d_gradient_fake,
    lib=_LIBRARY,
)
_torch.library.register_autograd("rarefy::conv2d", _conv2d_backward, setup_context=_setup_conv2d, lib=_LIBRARY)
