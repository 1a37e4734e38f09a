"""ResNet-50 for 224² images, its shapes only: convolutions without biases, stride in the 3×3, no norms."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.shortcut = (
            nn.Conv2d(given, 4 * width, 1, stride, bias=False) if stride > 1 or given != 4 * width else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))) + self.shortcut(x)


class ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        blocks, given = [], 64
        for stage, (width, depth) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
            for i in range(depth):
                blocks.append(Bottleneck(given, width, 2 if stage > 0 and i == 0 else 1))
                given = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Linear(2048, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 3, 2, 1)
        return self.last(self.blocks(x).mean((2, 3)))


def on_meta() -> tuple[nn.Module, Tensor]:
    """The network and one image, without memory."""
    with torch.device("meta"):
        return ResNet50(), torch.zeros(1, 3, 224, 224)
