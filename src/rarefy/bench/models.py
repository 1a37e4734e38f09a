"""The networks of the tasks. First weights come from an explicit generator; global ones are left as they were."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["SmallResNet", "initialise", "mlp", "quiet"]


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between: (batch, ...) is flattened to (batch, sizes[0]) → (batch, sizes[-1])."""
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        layers |= {f"fc{i}": nn.Linear(fan_in, fan_out), f"relu{i}": nn.ReLU()}
    layers.popitem()  # the last layer gives the logits
    return nn.Sequential(OrderedDict(layers))


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride, self.wider = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        # The shortcut has no weights: strided, new channels zero (He et al. 2015, option A).
        short = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.wider))
        return functional.relu(y + short)


class SmallResNet(nn.Module):
    """A residual network of 8 layers for (batch, 1, 28, 28): a strided stem, blocks of `width`, 2 and 4 times it."""

    def __init__(self, width: int = 16, classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            _Block(width, width, 1), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.norm(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))


def quiet(make: Callable[[], nn.Module]) -> nn.Module:
    """`make()`, with torch's global generator afterwards as it was before: modules draw from it as they are built."""
    with torch.random.fork_rng(devices=[]):
        return make()


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """He et al. 2015, in place: weights from N(0, 2 / fan-in), drawn in float64 module by module; biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight
            drawn = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
            weight.copy_(drawn * math.sqrt(2 / weight[0].numel()))
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
