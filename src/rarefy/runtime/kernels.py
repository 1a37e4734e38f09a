"""The kernels of kernels/rarefy.h, as Python calls them: structures of the C interface and one function for each call.

Nothing here checks what memory the pointers lead to: forms are validated where they are made or loaded, activations
where they enter a layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from typing import ClassVar, cast

import torch
from torch import Tensor

from rarefy.core import native

BUCKETS = 5
_FIRST = (2, 8, 32, 128)  # tokens at which the next bucket begins


class DType(IntEnum):
    """What a value is stored as."""

    F32 = 0
    BF16 = 1
    I8 = 2
    I4 = 3  # reserved


class Form(IntEnum):
    """How kept entries are stored."""

    DENSE = 0
    BITMAP = 1
    INDEX16 = 2
    LUT = 3


class Algorithm(IntEnum):
    """How a form is multiplied: for 1 to 7 tokens, for 8 and more, or through dense tiles."""

    FEW = 0
    MANY = 1
    EXPAND = 2


class Operation(IntEnum):
    """What a step of a plan does."""

    LINEAR = 0
    ADD = 1
    MUL = 2
    APPLY = 3


class Activation(IntEnum):
    """What is applied to a sum before it is stored."""

    NONE = 0
    RELU = 1
    GELU = 2
    GELU_TANH = 3
    SILU = 4


class Weight(ctypes.Structure):
    """`rarefy_weight`: pointers into tensors that the holder keeps alive."""

    _fields_: ClassVar = [
        ("form", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("units", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    ]


class Slot(ctypes.Structure):
    """`rarefy_slot`: activations, with strides in entries."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("token", ctypes.c_int64),
        ("feature", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


class Step(ctypes.Structure):
    """`rarefy_step`."""

    _fields_: ClassVar = [
        ("operation", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("x", ctypes.c_int32),
        ("other", ctypes.c_int32),
        ("y", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("bias", ctypes.c_void_p),
        ("weights", ctypes.POINTER(Weight) * BUCKETS),
        ("algorithm", ctypes.c_int32 * BUCKETS),
        ("reserved2", ctypes.c_int32),
    ]


class Conv2d(ctypes.Structure):
    """`rarefy_conv2d`."""

    _fields_: ClassVar = [
        ("weight", ctypes.POINTER(Weight)),
        ("bias", ctypes.c_void_p),
        *(
            (name, ctypes.c_int32)
            for name in (
                "activation", "dtype", "in_channels", "height", "width",
                "kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w",
            )
        ),
    ]  # fmt: skip


def bucket(tokens: int) -> int:
    """The bucket of a number of tokens: 1, 2-7, 8-31, 32-127, 128 and more.

    >>> [bucket(tokens) for tokens in (1, 2, 7, 8, 31, 32, 127, 128)]
    [0, 1, 1, 2, 2, 3, 3, 4]
    """
    return sum(tokens >= first for first in _FIRST)


def available() -> bool:
    """Whether compiled kernels are in use in this process."""
    return native.library() is not None


def runs(form: Form, dtype: DType, algorithm: Algorithm) -> bool:
    """Whether a kernel exists for it in the instruction set in use."""
    found = library()
    return found is not None and bool(found.rarefy_runs(form, dtype, algorithm))


def slot(activations: Tensor | None, features: int, dtype: DType = DType.F32) -> Slot:
    """A slot over a tensor [tokens, features], or over nothing: a value between two steps."""
    if activations is None:
        return Slot(None, 0, 0, features, dtype, 0)
    token, feature = activations.stride()
    return Slot(activations.data_ptr(), token, feature, features, dtype, 0)


def run(steps: ctypes.Array[Step], slots: Sequence[Slot], tokens: int, threads: int | None = None) -> int:
    """All steps for `tokens` tokens; 0 or what kernels/rarefy.h says of other numbers. Slots as the header says."""
    found = library()
    if found is None:
        return 1
    array = (Slot * len(slots))(*slots)
    return cast(int, found.rarefy_run(steps, len(steps), array, len(slots), tokens, threads or torch.get_num_threads()))


def linear(
    weight: Weight,
    algorithm: Algorithm,
    x: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation = Activation.NONE,
    other: Tensor | None = None,
    threads: int | None = None,
) -> int:
    """One product, y = activation(x Wᵀ + bias) + other: x [tokens, cols], y and other [tokens, rows], in one dtype.

    One of the two strides of each is 1. float32 or bfloat16 activations; bias [rows] float32, contiguous. For tests and
    measurements: layers keep their steps.
    """
    kind = DType.BF16 if x.dtype == torch.bfloat16 else DType.F32
    slots = [slot(x, x.shape[1], kind), slot(y, y.shape[1], kind)]
    if other is not None:
        slots.append(slot(other, other.shape[1], kind))
    pointer = ctypes.pointer(weight)
    step = Step(
        Operation.LINEAR, activation, 0, -1 if other is None else 2, 1, 0, None if bias is None else bias.data_ptr(),
        (ctypes.POINTER(Weight) * BUCKETS)(*[pointer] * BUCKETS), (ctypes.c_int32 * BUCKETS)(*[algorithm] * BUCKETS), 0,
    )  # fmt: skip
    return run((Step * 1)(step), slots, len(x), threads)


@cache
def library() -> ctypes.CDLL | None:
    """The library with the signatures of what is called here."""
    found = native.library()
    if found is None:
        return None
    pointer, c32, c64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    signatures: dict[str, tuple[list[type], type]] = {
        "rarefy_runs": ([c32, c32, c32], ctypes.c_int),
        "rarefy_run": ([ctypes.POINTER(Step), c32, ctypes.POINTER(Slot), c32, c64, c32], ctypes.c_int),
        "rarefy_lut_bytes": ([ctypes.POINTER(Weight)], ctypes.c_size_t),
        "rarefy_lut_build": ([ctypes.POINTER(Weight), pointer, ctypes.POINTER(Weight)], ctypes.c_int),
        "rarefy_lut_decode": (
            [ctypes.POINTER(Weight), pointer, pointer, pointer, ctypes.POINTER(Weight)],
            ctypes.c_int,
        ),
        "rarefy_lut_check": ([ctypes.POINTER(Weight), c64], ctypes.c_int),
        "rarefy_conv": ([ctypes.POINTER(Conv2d), pointer, pointer, pointer, c64, c32], ctypes.c_int),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    return found
