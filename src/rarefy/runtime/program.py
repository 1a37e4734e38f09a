"""Several steps in one call of the library: packed layers, activations, sums and products between them.

A program is made of values numbered in the order in which they come to be: its inputs first, then one for each step. It
holds modules, no addresses: those are looked up when it first runs, and again when a layer was packed anew.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as globally

from rarefy.runtime import ops
from rarefy.runtime.direct import DirectLinear
from rarefy.runtime.engine import KINDS, Engine, call, check
from rarefy.runtime.kernels import BUCKETS, Activation, Operation, Slot, Step, Weight, bucket
from rarefy.runtime.layers import PackedLinear
from rarefy.runtime.ways import TORCH

_empty = torch.empty
_GLOBAL: Any = globally
_OBSERVERS = (_GLOBAL._global_forward_hooks, _GLOBAL._global_forward_pre_hooks)


@dataclass(frozen=True)
class Line:
    """One step: y = activation(layer(x)) + other, or without a layer; values by number, other -1 for none."""

    operation: Operation
    x: int
    y: int
    other: int = -1
    activation: Activation = Activation.NONE
    layer: nn.Module | None = None


@dataclass
class _Bound:
    """A program with addresses: steps, features of every value, and which engines they come from."""

    steps: Any
    engines: list[tuple[nn.Module, Engine]]
    features: list[int]
    frames: list[_Frame]
    only_float: bool
    served: tuple[bool, ...]
    """For each bucket of tokens, whether kernels are the choice of all layers."""


class _Frame:
    """What one call fills in."""

    __slots__ = ("array", "at", "key", "slots", "tokens")

    def __init__(self, features: list[int]) -> None:
        self.array = (Slot * len(features))()
        self.slots = [self.array[i] for i in range(len(features))]
        for slot, count in zip(self.slots, features, strict=True):
            slot.features = count
        self.at = ctypes.c_void_p(ctypes.addressof(self.array))
        self.tokens = ctypes.c_int64(0)
        self.key: tuple[Any, ...] = ()


class Program:
    """lines over `inputs` tensors; the last value is the result. modules: all that it stands for, whose hooks count."""

    def __init__(self, inputs: int, lines: list[Line], modules: list[nn.Module]) -> None:
        self.inputs, self.lines, self.modules = inputs, lines, modules
        self._bound: _Bound | None = None
        self._watched: tuple[Any, ...] | None = None
        self._blocked: tuple[Any, ...] | None = None
        self._droppers = [m for m in modules if isinstance(m, nn.Dropout) and m.p > 0]

    def __getstate__(self) -> dict[str, Any]:
        """Without addresses."""
        return {**self.__dict__, "_bound": None, "_watched": None, "_blocked": None}

    def run(self, *given: Tensor) -> Tensor | None:
        """The result; None where the modules have to run by themselves: training, hooks, gradients, other dtypes."""
        x = given[0]
        bound = self._bound
        if not self._plain(given) or x.dtype not in KINDS:
            return None
        if bound is None or not _current(bound):
            bound = self._bound = self._bind_anew()
            if bound is None:
                return None
        if bound.only_float and x.dtype is not torch.float32:
            return None
        return self._call(bound, given)

    def _plain(self, given: tuple[Tensor, ...]) -> bool:
        watched = self._watched
        if watched is None:
            inner = cast(list[Any], self.modules)
            own: list[Any] = [h for m in inner for h in (m._forward_hooks, m._forward_pre_hooks)]
            watched = self._watched = (*own, *_OBSERVERS)
        if any(watched) or any(m.training for m in self._droppers):
            return False
        return all(map(ops.direct, given))

    def _call(self, bound: _Bound, given: tuple[Tensor, ...]) -> Tensor | None:
        x = given[0]
        shape, dtype = x.shape, x.dtype
        cols = bound.features[0]
        if not shape or shape[-1] != cols:
            return None
        tokens = x.numel() // cols
        if not tokens or not bound.served[bucket(tokens)] or not _alike(given, bound.features):
            return None
        y = _empty(*shape[:-1], bound.features[-1], dtype=dtype)
        try:
            frame = bound.frames.pop()
        except IndexError:
            frame = _Frame(bound.features)
        if frame.key != (tokens, dtype):
            _shape(frame, tokens, dtype, len(given))
        kept: list[Tensor] = []
        for slot, tensor in zip(frame.slots, given, strict=False):
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
                kept.append(tensor)  # alive until the call is over
            slot.data = tensor.data_ptr()
        frame.slots[-1].data = y.data_ptr()
        status = call()(
            bound.steps[1], len(self.lines), frame.at, len(frame.slots), frame.tokens, torch.get_num_threads()
        )
        bound.frames.append(frame)
        check(status)
        return y

    def _bind_anew(self) -> _Bound | None:
        """Not tried again where it has failed, until something about the layers is another."""
        layers = [line.layer for line in self.lines if line.layer is not None]
        state = (torch.is_grad_enabled(), *map(_about, layers))
        if state == self._blocked:
            return None
        bound = self._bind()
        # What it looked at may have prepared itself meanwhile.
        self._blocked = None if bound is not None else (torch.is_grad_enabled(), *map(_about, layers))
        return bound

    def _bind(self) -> _Bound | None:
        """Addresses for now; None where a layer cannot run by kernels alone."""
        engines: list[tuple[nn.Module, Engine]] = []
        values = self.inputs + len(self.lines)
        features = [0] * values
        steps = (Step * len(self.lines))()
        for step, line in zip(steps, self.lines, strict=True):
            engine: Engine | None = None
            if line.layer is not None:
                if isinstance(line.layer, PackedLinear | DirectLinear):
                    engine = line.layer.engine()
                if engine is None:
                    return None
                engines.append((line.layer, engine))
                features[line.x], features[line.y] = engine.cols, engine.rows
            _fill(step, line, engine)
        if not _spread(features, self.lines):
            return None
        only_float = any(not engine.takes(torch.bfloat16) for _, engine in engines)
        return _Bound(
            (steps, ctypes.c_void_p(ctypes.addressof(steps))), engines, features, [], only_float, _served(engines)
        )


def _about(layer: nn.Module) -> tuple[Any, ...]:
    """What decides whether a layer has an engine."""
    state = layer.__dict__
    weight = state["_parameters"].get("weight")
    seen = None if weight is None else (weight.dtype, weight.device, weight.requires_grad)
    return type(layer), state.get("_ready"), state.get("table"), seen


def _served(engines: list[tuple[nn.Module, Engine]]) -> tuple[bool, ...]:
    tables = [cast(PackedLinear | DirectLinear, layer).table or () for layer, _ in engines]
    return tuple(all(table[b].algorithm != TORCH for table in tables if table) for b in range(BUCKETS))


def _current(bound: _Bound) -> bool:
    """Whether every layer still runs by the engine whose addresses are in the steps."""
    for layer, engine in bound.engines:
        if isinstance(layer, PackedLinear):
            if layer.__dict__.get("_ready") is not engine:
                return False
        elif not isinstance(layer, DirectLinear) or layer.engine() is not engine:
            return False
    return True


def _fill(step: Step, line: Line, engine: Engine | None) -> None:
    step.operation, step.activation = line.operation, line.activation
    step.x, step.other, step.y = line.x, line.other, line.y
    if engine is not None:
        step.bias = engine.template.bias
        step.weights = (ctypes.POINTER(Weight) * BUCKETS)(*engine.template.weights)
        step.algorithm = (ctypes.c_int32 * BUCKETS)(*engine.algorithms)


def _spread(features: list[int], lines: list[Line]) -> bool:
    """Give values that no layer reads or makes the features of those that they meet. False where sizes do not meet."""
    for _ in range(len(lines) + 1):
        for line in lines:
            equal = [line.y, *([line.other] if line.other >= 0 else []), *([] if line.layer else [line.x])]
            known = {features[i] for i in equal} - {0}
            if len(known) > 1:
                return False
            for i in equal if known else ():
                features[i] = next(iter(known))
    return all(features)


def _alike(given: tuple[Tensor, ...], features: list[int]) -> bool:
    """Whether the other inputs have the tokens and the dtype of the first, and the features that they should."""
    first = given[0]
    return all(
        t.dtype is first.dtype and t.shape[:-1] == first.shape[:-1] and t.shape[-1] == features[i + 1]
        for i, t in enumerate(given[1:])
    )


def _shape(frame: _Frame, tokens: int, dtype: torch.dtype, inputs: int) -> None:
    last = len(frame.slots) - 1
    for i, slot in enumerate(frame.slots):
        slot.dtype = KINDS[dtype]
        slot.token, slot.feature = slot.features, 1
        if inputs <= i < last:
            slot.data = None
    frame.tokens.value = tokens
    frame.key = (tokens, dtype)


def fused(inputs: int, lines: list[Line]) -> list[Line]:
    """Activations move into the step before them, and sums into a layer's own, where nobody else reads what is between.

    >>> lines = [Line(Operation.LINEAR, 0, 1, layer=nn.Identity()), Line(Operation.APPLY, 1, 2, -1, Activation.RELU)]
    >>> [(line.operation.name, line.activation.name) for line in fused(1, lines)]
    [('LINEAR', 'RELU')]
    """
    done: list[Line] = []
    reads = [v for line in lines for v in (line.x, line.other) if v >= 0]
    for line in lines:
        found = _merged(line, done, reads)
        if found is None:
            done.append(line)
        else:
            before, after = found
            done.remove(before)
            done.append(after)
    return _renumbered(inputs, done)


def _merged(line: Line, done: list[Line], reads: list[int]) -> tuple[Line, Line] | None:
    """An earlier line and what it becomes together with this one, moved here."""
    for value, rest in ((line.x, line.other), (line.other, line.x)):
        before = next((b for b in done if b.y == value), None)
        if before is None or reads.count(value) != 1:
            continue
        taken = before.other < 0 or before.operation == Operation.ADD
        if line.operation == Operation.APPLY and before.activation == Activation.NONE and taken:
            return before, replace(before, y=line.y, activation=line.activation)
        if line.operation == Operation.ADD and before.operation == Operation.LINEAR and before.other < 0:
            return before, replace(before, y=line.y, other=rest)
        if line.operation == Operation.MUL and before.operation == Operation.APPLY:
            return before, replace(line, x=before.x, other=rest, activation=before.activation)
    return None


def _renumbered(inputs: int, lines: list[Line]) -> list[Line]:
    """Values in the order of their lines, without gaps."""
    number = {i: i for i in range(inputs)} | {-1: -1}
    number |= {line.y: inputs + i for i, line in enumerate(lines)}
    return [replace(each, x=number[each.x], y=number[each.y], other=number[each.other]) for each in lines]
