"""The nets of the paper, written as if sparsefx didn't exist: MLP, CNN, ResNet and WideResNet.

Adelman et al., "Faster Neural Network Training with Approximate Tensor Operations", NeurIPS 2021.
Every net takes [batch, channels, height, width] of any size that its strides leave a pixel of.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]  # channels, height, width


class SizeError(ValueError):
    """A depth that a net can't have: the message says which it can."""


class MLP(nn.Module):
    """Two hidden layers of 500, dropout 0.1."""

    def __init__(self, shape: Shape, classes: int, hidden: tuple[int, int] = (500, 500)):
        super().__init__()
        channels, height, width = shape
        self.fc1 = nn.Linear(channels * height * width, hidden[0])
        self.fc2 = nn.Linear(*hidden)
        self.fc3 = nn.Linear(hidden[1], classes)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))
        return self.fc3(self.dropout(F.relu(self.fc2(x))))


class CNN(nn.Module):
    """Two 5x5 convolutions of 32 and 64 channels, each followed by pooling; a layer of 1024."""

    def __init__(self, shape: Shape, classes: int):
        super().__init__()
        channels, height, width = shape
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * (height // 4) * (width // 4), 1024)
        self.fc2 = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; normalised, then rectified."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class WideBlock(nn.Module):
    """Two 3x3 convolutions; rectified before each (Zagoruyko and Komodakis, BMVC 2016)."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.shortcut = (
            nn.Conv2d(inner, outer, 1, stride, bias=False)
            if stride != 1 or inner != outer
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        rectified = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(rectified))))
        return y + (x if self.shortcut is None else self.shortcut(rectified))


def _groups(block: type[nn.Module], widths: list[int], counts: list[int]) -> nn.Sequential:
    """Groups of blocks; the first block of each but the first group halves height and width."""
    inner, groups = widths[0], []
    for place, (outer, count) in enumerate(zip(widths[1:], counts, strict=True)):
        strides = [1 if place == 0 else 2] + [1] * (count - 1)
        blocks = []
        for stride in strides:
            blocks.append(block(inner, outer, stride))
            inner = outer
        groups.append(nn.Sequential(*blocks))
    return nn.Sequential(*groups)


class ResNet(nn.Module):
    """ResNet-18 in CIFAR's layout: a 3x3 stem of stride 1 and no pooling (He et al., CVPR 2016)."""

    def __init__(self, shape: Shape, classes: int, depth: int = 18, width: int = 64):
        super().__init__()
        blocks = {10: [1, 1, 1, 1], 18: [2, 2, 2, 2], 34: [3, 4, 6, 3]}
        if depth not in blocks:
            raise SizeError(f"depth={depth}: a ResNet of basic blocks has {sorted(blocks)} layers")
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Conv2d(shape[0], width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.groups = _groups(BasicBlock, widths, blocks[depth])
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(F.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class WideResNet(nn.Module):
    """WRN-depth-width: three groups of (depth - 4) / 6 blocks, 16, 32 and 64 x width channels."""

    def __init__(self, shape: Shape, classes: int, depth: int = 28, width: int = 10):
        super().__init__()
        count, rest = divmod(depth - 4, 6)
        if rest or count < 1:
            raise SizeError(f"depth={depth}: a WideResNet has 6 n + 4 layers: 10, 16, 22, 28, 40")
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(shape[0], widths[0], 3, 1, 1, bias=False)
        self.groups = _groups(WideBlock, widths, [count] * 3)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.groups(self.stem(x))))
        return self.fc(x.mean((2, 3)))
