"""`rarefy.pack` makes a sparse model fast on this machine, in place; `rarefy.unpack` makes it dense again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rarefy.core import Sparsity, native
from rarefy.core.live import live_handle
from rarefy.runtime import fastpath, kernels, measure, plan
from rarefy.runtime.cache import opened
from rarefy.runtime.candidates import stored_of
from rarefy.runtime.choose import Chooser, Decision
from rarefy.runtime.direct import DirectLinear
from rarefy.runtime.find import Layer, examples_of, find_layers, watch
from rarefy.runtime.judge import Change, Judge
from rarefy.runtime.kernels import DType
from rarefy.runtime.layers import PackedConv2d, PackedLinear
from rarefy.runtime.packed import Packed
from rarefy.runtime.report import PackReport, Row
from rarefy.runtime.warn import warn_once

Progress = Callable[[int, int, str], object]
"""Is told how many of how many layers are done, and which one comes next."""

_WIDTH = {DType.F32: 4, DType.BF16: 2, DType.I8: 1}
_NAMES = {DType.F32: "float32", DType.BF16: "bfloat16", DType.I8: "int8"}


def pack(
    model: nn.Module,
    *,
    example: Any,
    counts: Sequence[int] | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    threads: int | None = None,
    memory: str = "size",
    sparsity: Sparsity | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Store sparse Linear and Conv2d weights in the form that runs fastest here, in place, and say what was chosen.

    Every layer is measured with torch's dense product and our own at the shapes that the example brings to it; what
    does not win stays dense, and if the whole model does not gain, it is put back bit for bit. Values are lossless,
    unless they are cast or quantised on request. Whoever made the zeros: masks come from `sparsity` (by default the
    live handle on the model), from torch.nn.utils.prune (folded into the weights), else from the weights that are not
    zero.

    Args:
        model: on the CPU; float32, bfloat16 or float16 weights.
        example: an input of the model: a tensor, a tuple of arguments, a dict of keyword arguments, or a list of such,
            of the shapes that matter (batch 1 and 32, decode and prefill).
        counts: how often each example of a list comes up for every time that the others do, such as [256, 1] for 256
            steps of decoding after each prompt; by default all alike.
        dtype: "bfloat16" casts the weights first; activations keep their dtype between layers.
        quantize: "int8" quantises weights per row and activations per token; Linear layers only, and convolutions where
            a kernel takes them.
        threads: to choose for; by default torch.get_num_threads().
        memory: "speed" allows a second copy of a weight for few tokens.
        sparsity: the handle whose masks tell which zero weights are kept.
        progress: called with (layers done, layers, name of the next).

    Raises ValueError, before anything is changed, for what it cannot take.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    >>> report = pack(model, example=torch.randn(1, 64))
    >>> [row.name for row in report.rows]
    ['0', '2']
    """
    stored_as = _stored_dtype(dtype, quantize)
    examples = examples_of(example)
    times = _counts(counts, len(examples))
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: at least one thread is needed")
    if memory not in ("size", "speed"):
        raise ValueError(f"memory={memory!r}: 'size' keeps one copy of a weight, 'speed' may keep a second")
    warn_once()
    with _threads(threads) as count:
        layers = find_layers(model, sparsity or live_handle(model))
        watch(model, layers, examples, times)
        return _Packing(model, layers, examples, stored_as, count, memory).run(progress or _silent)


def unpack(model: nn.Module) -> nn.Module:
    """Make a packed model dense again, in place, and return it: the values that it was packed with, bit for bit.

    Weights that were cast or quantised keep the values that they got. Classes, parameter names, requires_grad, modes
    and hooks are as before. A model that is not packed stays as it is.

    >>> model = nn.Linear(8, 8)
    >>> before = model.weight.detach().clone()
    >>> _ = pack(model, example=torch.randn(1, 8))
    >>> bool((unpack(model).weight == before).all())
    True
    """
    plan.remove(model)
    for module in list(model.modules()):
        if isinstance(module, Packed | DirectLinear):
            module.restore()
    fastpath.reopen(model)
    return model


def _silent(done: int, count: int, name: str) -> None:
    """Nobody wants to be told."""


class _Packing:
    """One call of `pack`."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        examples: Sequence[Any],
        stored_as: DType | None,
        threads: int,
        memory: str,
    ) -> None:
        self.model, self.layers, self.examples, self.stored_as = model, layers, examples, stored_as
        self.cold = _footprint(model, layers, stored_as) > measure.last_level() / 2
        self.cache = opened()
        self.chooser = Chooser(self.cache, threads=threads, cold=self.cold, memory=memory)
        self.threads = threads
        self.changes: list[Change] = []

    def run(self, progress: Progress) -> PackReport:
        decisions: list[tuple[Layer, DType, Decision]] = []
        for done, layer in enumerate(self.layers):
            progress(done, len(self.layers), layer.name)
            dtype = self._dtype(layer)
            decisions.append((layer, dtype, self.chooser.choose(layer, dtype)))
        progress(len(self.layers), len(self.layers), "")
        self.cache.save()
        rows = tuple(self._apply(*each) for each in decisions)
        if not self.changes:
            return self._report(rows)
        for module in fastpath.concerned(self.model, {change.module for change in self.changes}):
            self.changes.append(Change(module))
            fastpath.close(module)
        planned = plan.install(self.model)
        judge = Judge(self.model, self.changes, self.examples)
        whole, stays = judge.decide()
        if not stays:
            rows = tuple(_put_back(row) for row in rows)
        return self._report(rows, whole=whole, reverted=not stays, plans=planned if judge.plans else ())

    def _report(self, rows: tuple[Row, ...], **found: Any) -> PackReport:
        isa = native.status().isa
        return PackReport(rows, threads=self.threads, cold=self.cold, notes=self._notes(), isa=isa, **found)

    def _dtype(self, layer: Layer) -> DType:
        if self.stored_as is not None and not layer.tied:
            return self.stored_as
        return DType.BF16 if layer.weight.dtype == torch.bfloat16 else DType.F32

    def _apply(self, layer: Layer, dtype: DType, decision: Decision) -> Row:
        """Let a decision take effect; the row that reports it."""
        weight = layer.weight
        before = weight.numel() * weight.element_size()
        row = Row(
            layer.name, type(layer.module).__name__, tuple(cast(Tensor, layer.module.weight).shape), layer.sparsity,
            layer.pattern, str(weight.dtype).removeprefix("torch."), str(decision), decision.candidates,
            decision.before, decision.after, before, before,
        )  # fmt: skip
        if decision.form is None and decision.table is None:
            return row
        self.changes.append(Change(layer.module))
        if decision.form is None:
            DirectLinear.convert(cast(nn.Linear, layer.module), cast(Any, decision.table))
        else:
            stored = stored_of(layer, decision.form, decision.block, dtype)
            largest, usual = _errors(layer, stored.dense())
            row = replace(row, bytes_after=stored.nbytes, dtype=_NAMES[dtype], max_error=largest, rms_error=usual)
            _convert(layer, stored, decision)
        return row

    def _notes(self) -> tuple[str, ...]:
        unseen = [layer.name for layer in self.layers if not layer.seen]
        notes: list[str] = []
        if unseen:
            notes.append(f"not reached by the example, so left dense: {', '.join(unseen)}")
        if not kernels.available():
            notes.append(f"nothing but torch to choose from ({native.status()})")
        return tuple(notes)


def _convert(layer: Layer, stored: Any, decision: Decision) -> None:
    if decision.way is not None:
        cast(PackedConv2d, PackedConv2d.convert(layer.module, stored)).choose(decision.way)
    else:
        cast(PackedLinear, PackedLinear.convert(layer.module, stored)).choose(cast(Any, decision.table))


def _errors(layer: Layer, dense: Tensor) -> tuple[float, float]:
    """Largest and root mean square error of the stored values, against those that the layer had."""
    exact = layer.weight.float()
    if layer.given is not None:
        exact = exact.masked_fill(~layer.mask, 0)
    difference = (dense.float() - exact).double()
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


def _put_back(row: Row) -> Row:
    return replace(row, choice="torch", after=row.before, bytes_after=row.bytes_before, max_error=0.0, rms_error=0.0)


def _footprint(model: nn.Module, layers: Sequence[Layer], stored_as: DType | None) -> float:
    """About the bytes of all weights once packed: what has to fit the caches for weights to be found there."""
    total = float(sum(p.numel() * p.element_size() for p in model.parameters()))
    for layer in layers:
        weight = layer.weight
        width = weight.element_size() if stored_as is None or layer.tied else _WIDTH[stored_as]
        packed = min(weight.numel() * width, weight.numel() / 8 + layer.kept * width)
        total += packed - weight.numel() * weight.element_size()
    return total


def _counts(counts: Any, examples: int) -> list[int]:
    found = [1] * examples if counts is None else list(counts)
    if len(found) != examples or any(type(n) is not int or n < 1 for n in found):
        raise ValueError(f"counts={counts!r}: {examples} whole numbers from 1 on, one for each example")
    return found


def _stored_dtype(dtype: Any, quantize: Any) -> DType | None:
    if dtype is not None and quantize is not None:
        raise ValueError(f"dtype={dtype!r} and quantize={quantize!r}: weights are cast or quantised, give one of them")
    if dtype not in (None, "bfloat16", torch.bfloat16):
        raise ValueError(f"dtype={dtype!r}: 'bfloat16' is the dtype that weights can be cast to; None keeps their own")
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r}: 'int8' is what weights can be quantised to")
    if quantize is not None:
        return DType.I8
    return None if dtype is None else DType.BF16


@contextmanager
def _threads(count: int | None) -> Generator[int]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
