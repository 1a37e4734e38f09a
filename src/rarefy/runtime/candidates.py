"""What a layer could be: the forms that may hold it, and each way to run them as a call that can be timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from rarefy.runtime import conv, cost, kernels
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


def linear_calls(layer: Layer, seen: Seen, dtype: DType, ways: Sequence[Way]) -> dict[str, Callable[[], object]]:
    """The layer as it is, and these ways to run it, at the shape that was seen; by name."""
    x, weight, bias = _input(layer, seen), layer.weight, layer.bias
    exact = None if bias is None else bias.float()
    calls: dict[str, Callable[[], object]] = {AS_IT_IS: lambda: functional.linear(x, weight, bias)}
    copies: dict[tuple[Form, int], Copies] = {}
    for way in ways:
        source = (Form.BITMAP, 1) if way.form == Form.LUT else (way.form, way.block)  # LUT is made of the bitmap
        if source not in copies:
            copies[source] = Copies(stored_of(layer, *source, dtype))
        table = (way,) * kernels.BUCKETS
        if way.algorithm == TORCH:
            made = runner(copies[source].stored, table, exact)[0]
        else:
            made = copies[source].engine(table, exact)
        calls[str(way)] = lambda made=made: made(x)
    return calls


def conv_calls(
    layer: Layer, geometry: Geometry, seen: Seen, dtype: DType, ways: dict[str, tuple[Storage, str]]
) -> dict[str, Callable[[], object]]:
    """As `linear_calls`, without those for which there turns out to be no kernel."""
    x, bias = _input(layer, seen), layer.bias
    weight = layer.weight.view(geometry.out, geometry.channels, geometry.kernel_h, geometry.kernel_w)
    exact = None if bias is None else bias.float()
    calls: dict[str, Callable[[], object]] = {
        AS_IT_IS: lambda: functional.conv2d(x, weight, bias, geometry.stride, geometry.padding)
    }
    stored: dict[tuple[Form, int], Stored] = {}
    for name, (storage, way) in ways.items():
        key = (storage.form, storage.block)
        if key not in stored:
            stored[key] = stored_of(layer, *key, dtype)
        made = conv.runner(stored[key], geometry, exact, way, strict=True)
        try:
            made(x)
        except RuntimeError:  # no kernel for this one
            continue
        calls[name] = lambda made=made: made(x)
    return calls
