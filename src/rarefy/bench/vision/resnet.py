"""The CIFAR ResNet of He et al. 2015, section 4.2, with the names that published checkpoints have; option A shortcuts.

Weights: `models/resnet_cifar10/resnet20-12fca82f.th` (github.com/akamaster/pytorch_resnet_cifar10, BSD-2-Clause).
"""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rarefy.bench.models import quiet

__all__ = ["CHECKPOINT", "ResNet", "folded", "load_resnet20"]

CHECKPOINT = "models/resnet_cifar10/resnet20-12fca82f.th"


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.side = stride, (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.side:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.side, self.side))
        return functional.relu(y + x)


class ResNet(nn.Module):
    """6n + 2 layers for images (batch, 3, 32, 32) → logits (batch, 10): three stages of n blocks, each twice as wide.

    >>> sum(p.numel() for p in ResNet().parameters())
    269722
    """

    def __init__(self, blocks: int = 3, width: int = 16, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, 1)
        self.layer2 = _stage(width, 2 * width, blocks, 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Block(width_in, width, stride)
    return nn.Sequential(first, *(_Block(width, width, 1) for _ in range(blocks - 1)))


def load_resnet20(folder: Path) -> ResNet:
    """The pretrained network, in eval mode. folder: what holds `models/resnet_cifar10`.

    Raises FileNotFoundError where the checkpoint is missing, ValueError where it is of another network.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: RAREFY_DATA=DIR (or --data DIR) names the folder that holds {CHECKPOINT}, the "
            "ResNet-20 of github.com/akamaster/pytorch_resnet_cifar10"
        )
    model = cast(ResNet, quiet(ResNet))
    try:
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
        state = {name.removeprefix("module."): tensor for name, tensor in stored["state_dict"].items()}
        model.load_state_dict(state)
    except Exception as error:  # torch.load has errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} holds no ResNet-20, or is damaged ({reason}): copy it again") from error
    return model.eval()


def folded(model: nn.Module) -> nn.Module:
    """A copy with each batch norm folded into the convolution before it: the same function in eval mode, and faster."""
    twin = copy.deepcopy(model).eval()
    for module in list(twin.modules()):
        names = dict(module.named_children())
        for name in [name for name in names if name.startswith("bn")]:
            conv = f"conv{name[2:]}"
            setattr(module, conv, fuse_conv_bn_eval(cast(Any, names[conv]), cast(Any, names[name])))
            setattr(module, name, nn.Identity())
    return twin
