"""What a layer could be: the forms that may hold it, and each way to run them as a call that can be timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from rarefy.runtime import conv, cost, kernels, measure
from rarefy.runtime.conv import Geometry
from rarefy.runtime.engine import Copies, runner
from rarefy.runtime.find import Layer, Seen
from rarefy.runtime.forms import Stored, encode, quantize
from rarefy.runtime.kernels import Algorithm, DType, Form
from rarefy.runtime.ways import TORCH, Way, ways_of

AS_IT_IS = "torch"
"""The candidate that leaves the layer alone."""

KINDS = {torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.float16: DType.F32}
"""What holds the weights of a dtype without loss."""

Calls = dict[str, list[Callable[[], object]]]
"""Candidates by name: what runs each, on as many copies of its weight as are to be read in turn."""

_MANY = 64  # tokens from which on reading a weight takes little of a product: what other candidates read is enough
_SPARSE_FROM = 0.2  # below this share of zeros, sparse forms are not tried


def stored_of(layer: Layer, form: Form, block: int, dtype: DType) -> Stored:
    """The layer's weight in a form, cast or quantised to dtype."""
    mask = None if form == Form.DENSE else layer.mask
    if dtype == DType.I8:
        values, scales = quantize(layer.weight.float(), mask)
        return encode(values, mask=mask, form=form, block=block, scales=scales)
    kind = torch.bfloat16 if dtype == DType.BF16 else torch.float32
    weight = layer.weight.to(kind)
    if mask is not None and layer.given is not None:
        weight = weight.masked_fill(~mask, 0)
    return encode(weight, mask=mask, form=form, block=block)


@dataclass
class Storage:
    """One stored form with its ways, and the entries that it stores."""

    form: Form
    block: int
    kept: int
    ways: list[Way] = field(default_factory=list[Way])


def storages_of(layer: Layer, dtype: DType) -> list[Storage]:
    """The forms that may hold the layer: dense by our kernels; sparse where there are zeros to gain by."""
    rows, cols = layer.weight.shape
    sizes = cost.Sizes(rows, cols, layer.kept, dtype, 1, 1)
    found = [Storage(Form.DENSE, 1, rows * cols, [*ways_of(Form.DENSE, dtype), Way(Form.DENSE, TORCH)])]
    if layer.tied and dtype != KINDS[layer.weight.dtype]:
        return []
    if layer.tied or layer.sparsity < _SPARSE_FROM:
        return found
    if layer.weight.dtype == torch.float16 and dtype == DType.F32:
        found = []  # as wide as it can be held losslessly: dense would only grow
    found.append(Storage(Form.BITMAP, 1, layer.kept, list(ways_of(Form.BITMAP, dtype))))
    if cols <= 1 << 16:
        for block, stored in layer.blocks.items():
            found.append(Storage(Form.INDEX16, block, stored, list(ways_of(Form.INDEX16, dtype, block))))
        if cost.stored_bytes(Form.LUT, sizes) < cost.stored_bytes(Form.DENSE, sizes):
            found.append(Storage(Form.LUT, 1, layer.kept, list(ways_of(Form.LUT, dtype))))
    return [storage for storage in found if storage.ways]


def fits(way: Way, tokens: int) -> bool:
    """FEW is for few tokens and right for a few more, the others are for 8 and more; LUT has one kernel for all."""
    if way.form == Form.LUT:
        return (tokens < 8) == (way.algorithm == Algorithm.FEW)
    return tokens < 32 if way.algorithm == Algorithm.FEW else tokens >= 8 or way.algorithm == TORCH


def _input(layer: Layer, seen: Seen) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if layer.geometry is not None:
        return torch.randn(seen.shape, generator=generator).to(seen.dtype)
    x = torch.randn(seen.tokens, layer.weight.shape[1], generator=generator).to(seen.dtype)
    return x.t().contiguous().t() if seen.feature_major else x


def linear_calls(layer: Layer, seen: Seen, dtype: DType, ways: Sequence[Way], *, cold: bool) -> Calls:
    """The layer as it is, and these ways to run it, at the shape that was seen; by name, on one copy or several."""
    x, bias, cold = _input(layer, seen), layer.bias, cold and seen.tokens < _MANY
    exact = None if bias is None else bias.float()
    calls: Calls = {AS_IT_IS: [lambda w=w: functional.linear(x, w, bias) for w in _weights(layer, cold)]}
    made: dict[tuple[Form, int], list[Stored]] = {}
    for way in ways:
        key = way.form, way.block
        if key not in made:
            made[key] = _again(_made(layer, way, dtype, made), cold)
        table = (way,) * kernels.BUCKETS
        if way.algorithm == TORCH:  # its weights are wider than what is stored
            few = made[key][: measure.copies(4 * layer.weight.numel(), cold)]
            runs = [runner(each, table, exact)[0] for each in few]
        else:
            runs = [Copies(each).engine(table, exact) for each in made[key]]
        calls[str(way)] = [lambda run=run: run(x) for run in runs]
    return calls


def _made(layer: Layer, way: Way, dtype: DType, made: Mapping[tuple[Form, int], Sequence[Stored]]) -> Stored:
    """The layer in the form of a way; look-up is made of the bitmap."""
    if way.form != Form.LUT:
        return stored_of(layer, way.form, way.block, dtype)
    bitmap = made.get((Form.BITMAP, 1))
    return (bitmap[0] if bitmap else stored_of(layer, Form.BITMAP, 1, dtype)).looked_up()


def _again(stored: Stored, cold: bool) -> list[Stored]:
    return [stored, *(copy.deepcopy(stored) for _ in range(measure.copies(stored.nbytes, cold) - 1))]


def _weights(layer: Layer, cold: bool) -> list[Tensor]:
    weight = layer.weight
    return [weight, *(weight.clone() for _ in range(measure.copies(weight.nbytes, cold) - 1))]


def conv_calls(
    layer: Layer, geometry: Geometry, seen: Seen, dtype: DType, ways: dict[str, tuple[Storage, str]], *, cold: bool
) -> Calls:
    """As `linear_calls`, without those for which there turns out to be no kernel."""
    x, bias, cold = _input(layer, seen), layer.bias, cold and seen.tokens < _MANY
    shape = geometry.out, geometry.channels, geometry.kernel_h, geometry.kernel_w
    exact = None if bias is None else bias.float()
    calls: Calls = {
        AS_IT_IS: [
            lambda w=w: functional.conv2d(x, w.view(shape), bias, geometry.stride, geometry.padding)
            for w in _weights(layer, cold)
        ]
    }
    stored: dict[tuple[Form, int], list[Stored]] = {}
    for name, (storage, way) in ways.items():
        key = (storage.form, storage.block)
        if key not in stored:
            stored[key] = _again(stored_of(layer, *key, dtype), cold)
        runs = [conv.runner(each, geometry, exact, way, strict=True) for each in stored[key]]
        try:
            runs[0](x)
        except RuntimeError:  # no kernel for this one
            continue
        calls[name] = [lambda run=run: run(x) for run in runs]
    return calls
