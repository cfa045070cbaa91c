"""ResNet for small images (He et al. 2016, arXiv:1512.03385, section 4.2), with the shortcuts and the wider forms of
the distillation literature (Tian et al. 2020, arXiv:1910.10699)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.models.common import initialise, need_side, scaled

_NARROW = (16, 16, 32, 64)  # conv1 and the three stages
_FOUR_TIMES = (32, 64, 128, 256)


class BasicBlock(nn.Module):
    """conv 3×3, batch norm, ReLU, conv 3×3, batch norm; the input is added; ReLU.

    Where the shape changes, the input goes through a 1×1 convolution and batch norm.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module | None = None
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, maps: Tensor) -> Tensor:
        """(B, before, H, W) → (B, after, H/stride, W/stride)."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps)))))
        return F.relu(residual + (maps if self.shortcut is None else self.shortcut(maps)))


class ResNet(nn.Module):
    """A 3×3 convolution, three stages of basic blocks, global average, linear; depth = 6 · blocks of a stage + 2.

    Each count of channels is multiplied by `width`, to the nearest whole number, at least 1.
    """

    head = "fc"
    stages: tuple[str, ...] = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        classes: int,
        input_size: tuple[int, int, int],
        depth: int,
        widths: Sequence[int] = _NARROW,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        need_side(input_size, 8, "ResNet")
        first, *after = (scaled(channels, width) for channels in widths)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(input_size[2], first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, after[0], 1, blocks)
        self.layer2 = _stage(after[0], after[1], 2, blocks)
        self.layer3 = _stage(after[1], after[2], 2, blocks)
        self.fc = nn.Linear(after[2], classes)
        initialise(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes)."""
        maps = F.relu(self.bn1(self.conv1(pixels)))  # (B, 16, 32, 32) for 32×32
        maps = self.layer3(self.layer2(self.layer1(maps)))  # (B, 64, 8, 8)
        logits: Tensor = self.fc(maps.mean(dim=(2, 3)))
        return logits


def _stage(before: int, after: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(before, after, stride)
    return nn.Sequential(first, *(BasicBlock(after, after, 1) for _ in range(blocks - 1)))


def resnet8(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> ResNet:
    """One block a stage: 84 k parameters with 100 classes."""
    return ResNet(classes, input_size, 8, width=width)


def resnet14(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> ResNet:
    """Two blocks a stage: 181 k parameters with 100 classes."""
    return ResNet(classes, input_size, 14, width=width)


def resnet20(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> ResNet:
    """Three blocks a stage: 278 k parameters with 100 classes."""
    return ResNet(classes, input_size, 20, width=width)


def resnet32(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> ResNet:
    """Five blocks a stage: 473 k parameters with 100 classes."""
    return ResNet(classes, input_size, 32, width=width)


def resnet44(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> ResNet:
    """Seven blocks a stage: 667 k parameters with 100 classes."""
    return ResNet(classes, input_size, 44, width=width)


def resnet56(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> ResNet:
    """Nine blocks a stage: 862 k parameters with 100 classes."""
    return ResNet(classes, input_size, 56, width=width)


def resnet110(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> ResNet:
    """18 blocks a stage: 1.74 M parameters with 100 classes."""
    return ResNet(classes, input_size, 110, width=width)


def resnet8x4(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> ResNet:
    """One block a stage, four times as wide: 1.23 M parameters with 100 classes."""
    return ResNet(classes, input_size, 8, _FOUR_TIMES, width)


def resnet32x4(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> ResNet:
    """Five blocks a stage, four times as wide: 7.43 M parameters with 100 classes."""
    return ResNet(classes, input_size, 32, _FOUR_TIMES, width)
