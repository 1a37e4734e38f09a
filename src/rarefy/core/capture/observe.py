"""The inputs of every watched matrix, whoever multiplies with it: layers, fused experts, attention, functional calls.

Products are watched below the modules, where torch carries them out: mm, addmm, bmm, baddbmm, mv, linear, convolution
and grouped mm. torch's fused attention, inside which no product can be seen, is to be switched off meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy.core.capture.operands import Operands, Rows
from rarefy.core.capture.unfold import convolution

_aten = torch.ops.aten


@runtime_checkable
class Sink(Protocol):
    """Takes what is seen. `source` with `recipe` names the rows that `make` yields: (tokens, in), for convolutions
    (batch, places, groups, in)."""

    def take(self, rows: Rows, source: Tensor, recipe: object, make: Callable[[], Iterator[Tensor]]) -> None: ...

    def reached(self, rows: Rows) -> None:
        """Ran, with no token at all."""

    def over(self) -> bool:
        """Whether nothing that comes in this run is asked for: products are not carried out, but give zeros."""
        ...


class Observer(TorchDispatchMode):
    """Inside `with Observer(operands, sink)` the inputs of all weights in `operands` go to `sink`."""

    def __init__(self, operands: Operands, sink: Sink) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._operands, self._sink = operands, sink

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        look = _LOOKS.get(packet) or (_grouped if packet.__name__ == "grouped_mm_fallback" else None)
        if look is not None:
            look(self, *args, **kwargs)
            if func in _LEFT_OUT and self._sink.over():
                return args[-2].new_zeros(args[-2].shape[0], args[-1].shape[1])
        output = func(*args, **kwargs)
        if packet is _aten._to_copy:
            self._operands.follow(args[0], output)
        elif (
            packet is _aten.index and len(args[1]) == 1 and args[1][0].ndim == 1 and not args[1][0].is_floating_point()
        ):
            self._operands.follow(args[0], output, args[1][0])
        return output

    def product(self, a: Tensor, b: Tensor) -> None:
        """a @ b, matrices or equally long stacks of them. Products of two weights have no inputs."""
        left, right = self._operands.holds(a), self._operands.holds(b)
        if left == right:
            return
        if left:
            a, b = b.mT, a.mT
        if b.ndim == 3 and b.shape[0] > 1 and b.stride(0) == 0:  # one matrix for all of the stack
            self.matrix(a.flatten(0, 1), b[0])
        elif b.ndim == 3 and (picks := self._operands.gathered(b)) is not None:
            for pick in set(cast(list[int], cast(Any, picks).tolist())):
                where = torch.where(picks == pick)[0]
                self.matrix(a[where].flatten(0, 1), b[int(where[0])])
        elif b.ndim == 3:
            for x, weight in zip(a, b, strict=True):
                self.matrix(x, weight)
        else:
            self.matrix(a, b)

    def matrix(self, x: Tensor, weight: Tensor) -> None:
        """x (tokens, in) @ weight (in, out)."""
        rows = self._operands.rows(weight, contracted=0, kept=1)
        if rows is None:
            return
        if not x.numel():
            self._sink.reached(rows)
        else:
            self._sink.take(rows, x, None, lambda: iter((x,)))

    def convolution(self, x: Tensor, weight: Tensor, *arguments: Any) -> None:
        """aten.convolution(x, weight, bias, ...)."""
        if not self._operands.holds(weight):
            return
        how = convolution(weight.shape[2:], arguments[1:])
        rows = self._operands.whole(weight)
        if rows.stop * rows.width != weight.numel():
            raise ValueError(
                f"{rows.site.name!r} is used in a convolution in parts (a weight {tuple(weight.shape)} of "
                f"{rows.site.stored_shape}): skip={rows.site.name!r}, or take a method without data (Magnitude)."
            )
        self._sink.take(rows, x, how, lambda: how.rows(x))


def _mm(observer: Observer, a: Tensor, b: Tensor, **_: Any) -> None:
    observer.product(a, b)


def _addmm(observer: Observer, _: Tensor, a: Tensor, b: Tensor, **__: Any) -> None:
    observer.product(a, b)


def _mv(observer: Observer, a: Tensor, x: Tensor, **_: Any) -> None:
    observer.product(a, x[:, None])


def _addmv(observer: Observer, _: Tensor, a: Tensor, x: Tensor, **__: Any) -> None:
    observer.product(a, x[:, None])


def _linear(observer: Observer, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> None:
    observer.product(x.reshape(-1, x.shape[-1]), weight.mT)


def _convolution(observer: Observer, *args: Any, **kwargs: Any) -> None:
    observer.convolution(*args, *kwargs.values())


def _grouped(observer: Observer, x: Tensor, weight: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> None:
    """x (tokens, in) sorted by matrix, weight (matrices, in, out), offs: where the tokens of each end."""
    if offs is None or x.ndim != 2 or weight.ndim != 3:
        if x.ndim == 3 and weight.ndim == 3:
            observer.product(x, weight)
        return
    start = 0
    for matrix, stop in enumerate(cast(list[int], cast(Any, offs).tolist())):
        observer.matrix(x[start:stop], weight[matrix])
        start = stop


_LEFT_OUT = {_aten.mm.default, _aten.addmm.default}
"""Products that need not be carried out: those of ordinary layers, whose results have a shape that is known."""

_LOOKS: dict[Any, Callable[..., None]] = {
    _aten.mm: _mm,
    _aten.bmm: _mm,
    _aten.addmm: _addmm,
    _aten.baddbmm: _addmm,
    _aten.mv: _mv,
    _aten.addmv: _addmv,
    _aten.linear: _linear,
    _aten.convolution: _convolution,
    _aten._grouped_mm: _grouped,
}
