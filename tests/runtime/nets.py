"""Small networks with zeros in them, and times that a test makes up."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.runtime import kernels, measure, plan
from rarefy.runtime.forms import encode
from rarefy.runtime.kernels import DType
from rarefy.runtime.layers import PackedConv2d, PackedLinear
from rarefy.runtime.ways import Way


def sparse(shape: tuple[int, ...], density: float = 0.2, seed: int = 0, block: int = 1) -> Tensor:
    """Normal values, zero but for a share of units of `block` rows, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    rows = -(-shape[0] // block)
    keep = (torch.rand(rows, *shape[1:], generator=generator) < density).repeat_interleave(block, 0)[: shape[0]]
    return torch.randn(shape, generator=generator) * keep


def thin(model: nn.Module, density: float = 0.2, seed: int = 0, block: int = 1) -> nn.Module:
    """The model, with sparse weights from the seed in its Linear and Conv2d layers."""
    for i, module in enumerate(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)):
        with torch.no_grad():
            module.weight.copy_(sparse(tuple(module.weight.shape), density, seed + i, block))
            if module.bias is not None:
                module.bias.copy_(sparse(tuple(module.bias.shape), 1.0, seed + i))
    return model.eval()


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), as in a Llama."""

    def __init__(self, width: int = 24, inner: int = 40, bias: bool = False):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Images(nn.Module):
    """Two convolutions and a head."""

    def __init__(self):
        super().__init__()
        self.conv, self.point, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.point(torch.relu(self.conv(x)))).mean((2, 3)))


def packed(model: nn.Module) -> nn.Module:
    """Every Linear and Conv2d of a model packed as a bitmap, and plans installed."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            PackedLinear.convert(module, encode(module.weight.detach()))
        elif isinstance(module, nn.Conv2d):
            PackedConv2d.convert(module, encode(module.weight.detach().flatten(1)))
    plan.install(model)
    return model


class Clock:
    """Stands in for `measure.times`: `price(name)` seconds for each candidate; remembers which there were."""

    def __init__(self, price: Callable[[str], float]):
        self.price = price
        self.asked: list[list[str]] = []
        self.cold: list[bool] = []

    def times(self, calls: Mapping[str, Sequence[Callable[[], Any]]], *, cold: bool = False) -> dict[str, float]:
        """Each candidate is called once, so that one that cannot run is seen."""
        for call, *_ in calls.values():
            call()
        self.asked.append(list(calls))
        self.cold.append(cold)
        return {name: self.price(name) for name in calls}


def ratio(value: float) -> Callable[..., measure.Ratio]:
    """Stands in for `measure.ratios`: dense / packed is always this."""

    def ratios(first: Any, second: Any, **options: Any) -> measure.Ratio:
        for prepare, call in (first, second):
            prepare()
            call()
        return measure.Ratio(value, value, value, 15, value, 1.0)

    return ratios


def exists(text: str, dtype: DType = DType.F32) -> bool:
    """Whether this build has a way."""
    return Way.parse(text).exists(dtype)


def have_kernels() -> bool:
    """Whether compiled kernels are in use."""
    return kernels.available()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
