"""MobileNet-v1 (Howard et al., 2017, arXiv:1704.04861) and ResNet-50 (He et al., 2015, arXiv:1512.03385), 224² images.

ResNet-50 has the stride in its 3×3 convolutions, as most implementations since have.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["MobileNetV1", "ResNet50", "fold"]

_MOBILE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs),
    ]  # fmt: skip
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


class MobileNetV1(nn.Module):
    """4,231,976 parameters. Images [n, 3, 224, 224] to [n, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        units, width = [_unit(3, 32, 3, 2)], 32
        for outputs, stride in _MOBILE:
            units += [_unit(width, width, 3, stride, groups=width), _unit(width, outputs, 1)]
            width = outputs
        self.features = nn.Sequential(*units)
        self.classifier = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.features(x).mean((2, 3)))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions around a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.reduce = _unit(inputs, width, 1)
        self.spatial = _unit(width, width, 3, stride)
        self.expand = _unit(width, 4 * width, 1, relu=False)
        plain = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if plain else _unit(inputs, 4 * width, 1, stride, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Images to images, smaller by the stride."""
        return self.relu(self.expand(self.spatial(self.reduce(x))) + self.shortcut(x))


class ResNet50(nn.Module):
    """25,557,032 parameters. Images [n, 3, 224, 224] to [n, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_unit(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1))
        blocks, inputs = [], 64
        for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(depth):
                blocks.append(Bottleneck(inputs, width, stride if i == 0 else 1))
                inputs = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def fold(model: nn.Module) -> nn.Module:
    """Fold every batch norm into the convolution before it, as whoever serves a network does; in place.

    >>> model = fold(_unit(3, 8, 3).eval())
    >>> [type(layer).__name__ for layer in model]
    ['Conv2d', 'ReLU']
    """
    for module in model.modules():
        if not isinstance(module, nn.Sequential) or len(module) < 2:
            continue
        conv, norm = module[0], module[1]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            with torch.no_grad():
                module[0] = fuse_conv_bn_eval(conv.eval(), norm.eval())
            del module[1]
    return model
