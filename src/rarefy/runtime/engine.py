"""The shortest way from a tensor to a kernel: steps prepared once for a layer, one call of the library.

A frame is what one call fills in (two slots, and a copy of the step). Frames wait in a list between calls; taking one
out and putting it back are single operations of a list, so that several threads may call one layer at once.
"""

from __future__ import annotations

import copy
import ctypes
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rarefy.core import native
from rarefy.runtime import kernels
from rarefy.runtime.forms import Stored, runnable
from rarefy.runtime.kernels import BUCKETS, Activation, DType, Form, Operation, Slot, Step, Weight
from rarefy.runtime.ways import TORCH, Table

_empty = torch.empty
_threads = torch.get_num_threads

Runner = Callable[[Tensor], Tensor]
"""x [..., cols] on the CPU → [..., rows], in the dtype of x."""

KINDS = {torch.float32: DType.F32, torch.bfloat16: DType.BF16}
"""The dtypes of activations that kernels take, as they call them."""


@cache
def call() -> Callable[..., int]:
    """`rarefy_run` without declared arguments: they are given as ctypes values, which saves converting them."""
    return library()["rarefy_run"]


def library() -> ctypes.CDLL:
    """The compiled kernels. Raises RuntimeError where they are not in use."""
    found = kernels.library()
    if found is None:
        raise RuntimeError(f"this needs the compiled kernels: {native.status()}")
    return found


def check(status: int) -> None:
    """Raise for a call that did not do its work."""
    if status == 2:
        raise MemoryError("a packed layer could not get the memory that it needs while it runs")
    if status:
        raise RuntimeError("a packed layer could not run: this library has no kernel for its form. Pack it again.")


class Frame:
    """What one call fills in."""

    __slots__ = ("at", "key", "slots", "step", "step_at", "steps", "tokens", "x", "y")

    def __init__(self, template: Step) -> None:
        self.slots = (Slot * 2)()
        self.x, self.y = self.slots[0], self.slots[1]
        self.at = ctypes.c_void_p(ctypes.addressof(self.slots))
        self.steps = (Step * 1)(template)
        self.step = self.steps[0]
        self.step_at = ctypes.c_void_p(ctypes.addressof(self.steps))
        self.tokens = ctypes.c_int64(0)
        self.key: tuple[Any, ...] = ()


class Engine:
    """y = x Wᵀ + bias. Keeps alive what it points to.

    weights, algorithms: one for each bucket (the same weight several times, mostly). bias: [rows] float32, contiguous.
    owner: whatever else must live as long.
    """

    def __init__(
        self, weights: Sequence[Weight], algorithms: Sequence[int], bias: Tensor | None, owner: Any = None
    ) -> None:
        self.weights, self.algorithms, self.bias, self.owner = list(weights), list(algorithms), bias, owner
        self.rows, self.cols = int(weights[0].rows), int(weights[0].cols)
        self._only_float = any(w.dtype == DType.F32 for w in weights)
        self._frames: list[Frame] = []
        self._run = call()
        self.template = Step(
            Operation.LINEAR, Activation.NONE, 0, -1, 1, 0, None if bias is None else bias.data_ptr(),
            (ctypes.POINTER(Weight) * BUCKETS)(*map(ctypes.pointer, self.weights)),
            (ctypes.c_int32 * BUCKETS)(*algorithms), 0,
        )  # fmt: skip

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether activations of this dtype go to the kernels as they are; others pass through float32."""
        return dtype is torch.float32 or (dtype is torch.bfloat16 and not self._only_float)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., cols] on the CPU → [..., rows], in the dtype of x. Feature-major in, feature-major out."""
        dtype = x.dtype
        if dtype is not torch.float32 and not self.takes(dtype):
            return self(x.to(torch.float32)).to(dtype)
        if not x.is_contiguous():
            return self._strided(x)
        shape = x.shape
        if not shape or shape[-1] != self.cols:
            raise _misfit(x, self.cols)
        if len(shape) == 2:
            tokens = shape[0]
            y = _empty(tokens, self.rows, dtype=dtype)
        else:
            y = _empty(*shape[:-1], self.rows, dtype=dtype)
            tokens = y.numel() // self.rows
        try:
            frame = self._frames.pop()
        except IndexError:
            frame = Frame(self.template)
        if frame.key != (tokens, dtype):
            self._shape(frame, (tokens, dtype), (self.cols, 1), (self.rows, 1))
        frame.x.data, frame.y.data = x.data_ptr(), y.data_ptr()
        status = self._run(frame.step_at, 1, frame.at, 2, frame.tokens, _threads())
        self._frames.append(frame)
        if status:
            check(status)
        return y

    def _shape(self, frame: Frame, key: tuple[Any, ...], x: tuple[int, ...], y: tuple[int, ...]) -> None:
        tokens, dtype = key[:2]
        frame.tokens.value = tokens
        for slot, strides, features in ((frame.x, x, self.cols), (frame.y, y, self.rows)):
            slot.token, slot.feature = strides
            slot.features, slot.dtype = features, KINDS[dtype]
        frame.key = key

    def _strided(self, x: Tensor) -> Tensor:
        """A transposed view is taken as it is and answered in kind; what is strided otherwise is copied once."""
        if not x.ndim or x.shape[-1] != self.cols:
            raise _misfit(x, self.cols)
        flat = x if x.ndim == 2 else x.reshape(-1, self.cols)
        token, feature = flat.stride()
        if flat.is_contiguous() or (feature != 1 and token != 1):
            return self(x.contiguous())
        tokens = flat.shape[0]
        across = feature != 1
        y = _empty(*((self.rows, tokens) if across else (tokens, self.rows)), dtype=x.dtype)
        y = y.t() if across else y
        self.into(flat, y)
        return y.view(*x.shape[:-1], self.rows)

    def into(self, x: Tensor, y: Tensor) -> None:
        """x [tokens, cols] → y [tokens, rows], both in one dtype that the kernels take, each with a stride of 1."""
        frame = self._take()
        token, feature = x.stride()
        self._shape(frame, (len(x), x.dtype, token, feature), (token, feature), y.stride())
        frame.x.data, frame.y.data = x.data_ptr(), y.data_ptr()
        status = self._run(frame.step_at, 1, frame.at, 2, frame.tokens, _threads())
        self._frames.append(frame)
        check(status)

    def _take(self) -> Frame:
        try:
            return self._frames.pop()
        except IndexError:
            return Frame(self.template)

    def with_bias(self, bias: Tensor | None) -> Engine:
        """The same with another bias [rows], float32, contiguous."""
        twin = copy.copy(self)
        twin.bias, twin._frames = bias, []
        twin.template = Step.from_buffer_copy(self.template)
        twin.template.bias = None if bias is None else bias.data_ptr()
        return twin


def _misfit(x: Tensor, cols: int) -> ValueError:
    return ValueError(f"a layer of {cols} inputs was given activations of shape {tuple(x.shape)}")


class Copies:
    """A stored weight and what else its table asks for: other forms of it, made once, not saved."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self._made: dict[tuple[int, int], Stored] = {(int(stored.form), stored.block): stored}

    def get(self, form: Form, block: int) -> Stored:
        """The weight in a form. Raises ValueError where it has none."""
        key = (int(form), block)
        if key not in self._made:
            self._made[key] = runnable(self.stored, form, block)
        return self._made[key]

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(each.nbytes for each in self._made.values())

    def engine(self, table: Table, bias: Tensor | None) -> Engine:
        """One engine for all buckets; none of them torch's."""
        weights = [self.get(way.form, way.block).weight() for way in table]
        return Engine(weights, [way.algorithm for way in table], bias, self)


class ByTorch:
    """torch's product with the unpacked weight, which is kept: for buckets where it is faster, and without kernels."""

    def __init__(self, stored: Stored, bias: Tensor | None) -> None:
        self.weight = dense_of(stored)
        self.bias = None if bias is None else bias.to(self.weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., cols] on the CPU → [..., rows], in the dtype of x."""
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class Mixed:
    """Kernels for some buckets, torch for the others."""

    def __init__(self, table: Table, engine: Engine, torchs: ByTorch) -> None:
        self._native = [way.algorithm != TORCH for way in table]
        self.engine, self.torchs = engine, torchs

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., cols] on the CPU → [..., rows], in the dtype of x."""
        tokens = x.numel() // max(1, self.engine.cols)
        return self.engine(x) if self._native[kernels.bucket(tokens)] else self.torchs(x)


def dense_of(stored: Stored) -> Tensor:
    """The weight [rows, cols]; a view of it where it is stored so, else a fresh tensor."""
    if stored.form == Form.DENSE and stored.dtype != DType.I8:
        kind = torch.bfloat16 if stored.dtype == DType.BF16 else torch.float32
        return stored.values.view(torch.uint8).view(-1).view(kind).view(stored.shape)
    return stored.dense()


def runner(stored: Stored, table: Table | None, bias: Tensor | None) -> tuple[Runner, Engine | None]:
    """What a layer calls, and the engine in it, if all of its buckets run on kernels. table None: the usual ways."""
    if not kernels.available():
        _warn_without_kernels()
        return ByTorch(stored, bias), None
    if table is None:
        return ByTorch(stored, bias), None
    if all(way.algorithm != TORCH for way in table):
        engine = Copies(stored).engine(table, bias)
        return engine, engine
    if all(way.algorithm == TORCH for way in table):
        return ByTorch(stored, bias), None
    kernel = next(way for way in table if way.algorithm != TORCH)
    filled = tuple(kernel if way.algorithm == TORCH else way for way in table)
    return Mixed(table, Copies(stored).engine(filled, bias), ByTorch(stored, bias)), None


@cache
def _warn_without_kernels() -> None:
    warnings.warn(
        f"packed layers run through torch, with their weights unpacked ({native.status()}): as right, but slower than "
        "the dense model was. rarefy.unpack(model) makes it dense again.",
        stacklevel=4,
    )
