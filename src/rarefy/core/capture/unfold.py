"""The inputs of a convolution as rows: every place that the kernel stands on, in the order of the weight's columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 1 << 24  # entries of the rows made at a time


@dataclass(frozen=True)
class Convolution:
    """How aten.convolution was called; sequences hold one number for each spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def rows(self, x: Tensor) -> Iterator[Tensor]:
        """Of x (batch, in, *space): chunks (batch, places, groups, in/groups · kernel), columns in the order c, i, j.

        >>> plain = Convolution((2,), (1,), (0,), (1,), False, (0,), 1)
        >>> next(plain.rows(torch.arange(3.0).view(1, 1, 3))).tolist()
        [[[[0.0, 1.0]], [[1.0, 2.0]]]]
        """
        places = x[0, 0].numel() * (torch.Size(self.stride).numel() if self.transposed else 1)
        images = max(1, _CHUNK // max(1, places * x.shape[1] * torch.Size(self.kernel).numel()))
        for start in range(0, len(x), images):
            yield self._unfolded(x[start : start + images])

    def _unfolded(self, x: Tensor) -> Tensor:
        axes = len(self.kernel)
        stride = self.stride
        if (
            self.transposed
        ):  # a plain convolution of stride 1, of x with zeros between its entries, by the turned kernel
            x, stride = _spread(x, self.stride), (1,) * axes
        x = functional.pad(x, self._pad())
        for axis in range(axes):
            size, step = self.kernel[axis], self.dilation[axis]
            x = x.unfold(2 + axis, (size - 1) * step + 1, stride[axis])[..., ::step]
        if self.transposed:
            x = x.flip(tuple(range(-axes, 0)))
        x = cast(Any, x).unflatten(1, (self.groups, -1))  # (batch, groups, in/groups, *places, *kernel)
        places = range(3, 3 + axes)
        x = x.permute(0, *places, 1, 2, *range(3 + axes, 3 + 2 * axes))
        return x.flatten(axes + 2).flatten(1, axes)

    def _pad(self) -> list[int]:
        """As torch's pad takes it: the last axis first, before and after."""
        found: list[int] = []
        for axis in reversed(range(len(self.kernel))):
            before = after = self.padding[axis]
            if self.transposed:
                before = self.dilation[axis] * (self.kernel[axis] - 1) - self.padding[axis]
                after = before + self.output_padding[axis]
            found += [before, after]
        return found


def convolution(kernel: Sequence[int], arguments: Sequence[object]) -> Convolution:
    """kernel: of the weight as it is given. arguments: of aten.convolution after the bias."""
    stride, padding, dilation, transposed, output_padding, groups = arguments
    each = [_each(value, len(kernel)) for value in (stride, padding, dilation, output_padding)]
    assert isinstance(groups, int)
    return Convolution(tuple(kernel), each[0], each[1], each[2], bool(transposed), each[3], groups)


def _each(value: object, axes: int) -> tuple[int, ...]:
    assert isinstance(value, Sequence)
    numbers = tuple(int(n) for n in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return numbers * axes if len(numbers) == 1 else numbers


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    if all(step == 1 for step in stride):
        return x
    space = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *space)
    wide[(..., *(slice(None, None, step) for step in stride))] = x
    return wide
