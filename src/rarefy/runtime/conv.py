"""Convolutions with a packed weight: by the kernel for convolutions, or, where the kernel is 1×1, as products."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rarefy.runtime import kernels
from rarefy.runtime.engine import KINDS, Copies, Engine, check, library
from rarefy.runtime.engine import runner as linear_runner
from rarefy.runtime.forms import Stored
from rarefy.runtime.kernels import Activation, Algorithm, Conv2d, DType, Form
from rarefy.runtime.ways import Way

Runner = Callable[[Tensor], Tensor]

CONV, TORCH = "conv", "torch"
_PRODUCTS = {f"product {name}": a for name, a in (("many", Algorithm.MANY), ("expand", Algorithm.EXPAND))}


class Geometry(NamedTuple):
    """What a convolution is, beside its weight: channels out and in, kernel, stride, zero padding."""

    out: int
    channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int = 1
    stride_w: int = 1
    pad_h: int = 0
    pad_w: int = 0

    @property
    def stride(self) -> tuple[int, int]:
        return self.stride_h, self.stride_w

    @property
    def padding(self) -> tuple[int, int]:
        return self.pad_h, self.pad_w

    @property
    def pointwise(self) -> bool:
        """Whether it is a product of a matrix and the pixels."""
        return (self.kernel_h, self.kernel_w, *self.stride, *self.padding) == (1, 1, 1, 1, 0, 0)

    def pixels(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Height and width of the result; ints, or symbols while torch traces."""
        return (
            (height + 2 * self.pad_h - self.kernel_h) // self.stride_h + 1,
            (width + 2 * self.pad_w - self.kernel_w) // self.stride_w + 1,
        )

    def result(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        """The shape of the result for images [..., channels, height, width]."""
        return (*shape[:-3], self.out, *self.pixels(shape[-2], shape[-1]))

    def dense(self, stored: Stored) -> Tensor:
        """The weight [out, channels, kernel_h, kernel_w]."""
        return stored.dense().view(self.out, self.channels, self.kernel_h, self.kernel_w)


def runner(stored: Stored, geometry: Geometry, bias: Tensor | None, way: str, *, strict: bool = False) -> Runner:
    """What a layer calls, images [n, channels, h, w] or [channels, h, w] → the same with `out` channels, contiguous.

    strict: where no kernel applies, the call raises RuntimeError; else torch multiplies the unpacked weight.
    """
    if way == TORCH or not kernels.available():
        linear_runner(stored, None, None)  # says what is missing
        return _ByTorch(geometry.dense(stored), geometry, bias)
    if way in _PRODUCTS:
        algorithm = int(_PRODUCTS[way])
        table = (Way(Form(int(stored.form)), algorithm, stored.block),) * kernels.BUCKETS
        return _Product(Copies(stored).engine(table, bias), geometry)
    return _ByKernel(stored, geometry, bias, strict)


def ways(geometry: Geometry, form: Form, block: int, dtype: DType) -> list[str]:
    """How a convolution could run with its weight in a form. Whether the kernel for convolutions has it, it tells."""
    products = [n for n, a in _PRODUCTS.items() if geometry.pointwise and Way(form, int(a), block).exists(dtype)]
    return [CONV, *products] if kernels.available() else []


def plain_way(geometry: Geometry, form: Form, block: int, dtype: DType) -> str:
    """What is usual where nothing was measured."""
    found = ways(geometry, form, block, dtype)
    return next((way for way in found if way != CONV), CONV) if found else TORCH


class _ByTorch:
    def __init__(self, weight: Tensor, geometry: Geometry, bias: Tensor | None) -> None:
        self.weight, self.geometry = weight, geometry
        self.bias = None if bias is None else bias.to(weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        g = self.geometry
        y = functional.conv2d(x.to(self.weight.dtype), self.weight, self.bias, g.stride, g.padding)
        return y.to(x.dtype).contiguous()


def _checked(x: Tensor, geometry: Geometry) -> Tensor:
    """Contiguous images in a dtype that kernels take. channels_last is converted here, once."""
    if x.ndim not in (3, 4) or x.shape[-3] != geometry.channels:
        raise ValueError(f"a convolution of {geometry.channels} channels was given images of shape {tuple(x.shape)}")
    return x.contiguous()


class _Product:
    """A 1×1 convolution: an image is a feature-major matrix already, its pixels are the tokens."""

    def __init__(self, engine: Engine, geometry: Geometry) -> None:
        self.geometry, self.engine = geometry, engine

    def __call__(self, x: Tensor) -> Tensor:
        x = _checked(x, self.geometry)
        dtype = x.dtype
        if not self.engine.takes(dtype):
            return self(x.float()).to(dtype)
        height, width = x.shape[-2:]
        y = torch.empty((*x.shape[:-3], self.geometry.out, height, width), dtype=dtype)
        images, results = (t.view(-1, t.shape[-3], height * width) for t in (x, y))
        for image, result in zip(images, results, strict=True):
            self.engine.into(image.t(), result.t())
        return y


class _ByKernel:
    """`rarefy_conv`. The structure for a call is made in it: its cost is small beside a convolution's."""

    def __init__(self, stored: Stored, geometry: Geometry, bias: Tensor | None, strict: bool) -> None:
        self.stored, self.geometry, self.bias = stored, geometry, bias
        self._strict = strict
        self._instead: Runner | None = None
        self.weight = stored.weight()
        self._only_float = stored.dtype == DType.F32

    def __call__(self, x: Tensor) -> Tensor:
        if self._instead is not None:
            return self._instead(x)
        g, x = self.geometry, _checked(x, self.geometry)
        if x.dtype not in KINDS or (self._only_float and x.dtype is not torch.float32):
            return self(x.float()).to(x.dtype)
        height, width = x.shape[-2:]
        y = torch.empty(g.result(x.shape), dtype=x.dtype)
        description = Conv2d(
            ctypes.pointer(self.weight), None if self.bias is None else self.bias.data_ptr(), Activation.NONE,
            KINDS[x.dtype], g.channels, height, width, *g[2:],
        )  # fmt: skip
        images = x.shape[0] if x.ndim == 4 else 1
        status = library().rarefy_conv(
            ctypes.byref(description), x.data_ptr(), None, y.data_ptr(), images, torch.get_num_threads()
        )
        if status == 1 and not self._strict:
            self._instead = _ByTorch(g.dense(self.stored), g, self.bias)
            return self._instead(x)
        check(status)
        return y


__all__ = ["CONV", "TORCH", "Geometry", "plain_way", "runner", "ways"]
