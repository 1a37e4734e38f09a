"""Models with packed layers, and the same models dense, for the tests of files."""

import copy

import torch
from torch import nn

from rarefy.runtime.forms import encode, quantize
from rarefy.runtime.kernels import Form
from rarefy.runtime.layers import PackedConv2d, PackedLinear


def build() -> nn.Sequential:
    """Layers of every kind that is packed, and others; buffers of every kind."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 1, bias=False),
        nn.Flatten(), nn.Linear(12 * 16, 40), nn.ReLU(), nn.Linear(40, 20, bias=False), nn.Linear(20, 9),
    )  # fmt: skip


def sparse(density: float = 0.2, seed: int = 0) -> nn.Sequential:
    """`build`, with random zeros in every weight but that of the last layer."""
    generator = torch.Generator().manual_seed(seed)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for place in (0, 3, 5, 7):
            weight = model[place].weight
            weight.masked_fill_(torch.rand(weight.shape, generator=generator) >= density, 0)
        model[1].running_var.fill_(0.5)
    return model


def pack(model: nn.Sequential) -> nn.Sequential:
    """The model with packed layers in place: bitmaps, blocks and 16-bit columns."""
    PackedConv2d.convert(model[0], encode(model[0].weight.flatten(1)))
    PackedConv2d.convert(model[3], encode(model[3].weight.flatten(1), form=Form.INDEX16))
    PackedLinear.convert(model[5], encode(model[5].weight))
    PackedLinear.convert(model[7], encode(model[7].weight, form=Form.INDEX16, block=4))
    return model


def both(density: float = 0.2, seed: int = 0) -> tuple[nn.Sequential, nn.Sequential]:
    """A dense model and the same packed."""
    model = sparse(density, seed)
    return model, pack(copy.deepcopy(model))


def linear(rows: int, cols: int, density: float, dtype: torch.dtype = torch.float32) -> PackedLinear:
    """One packed layer without bias. int8: quantised."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(rows, cols, generator=generator)
    weight[torch.rand(rows, cols, generator=generator) >= density] = 0
    layer = nn.Linear(cols, rows, bias=False, device="meta", dtype=torch.float32 if dtype == torch.int8 else dtype)
    if dtype == torch.int8:
        values, scales = quantize(weight)
        return PackedLinear.convert(layer, encode(values, mask=weight != 0, scales=scales))
    return PackedLinear.convert(layer, encode(weight.to(dtype)))
