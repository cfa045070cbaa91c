"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv:1605.07146): batch norm and ReLU before convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.models.common import initialise, need_side, scaled


class PreActivationBlock(nn.Module):
    """Batch norm, ReLU, conv 3×3, batch norm, ReLU, conv 3×3; the input is added.

    Where the shape changes, what is added is a 1×1 convolution of the input after its batch norm and ReLU.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or before != after:
            self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, before, H, W) → (B, after, H/stride, W/stride)."""
        active = F.relu(self.bn1(maps))
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return residual + (maps if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """A 3×3 convolution, three stages of blocks, batch norm, ReLU, global average, linear.

    Depth = 6 · blocks of a stage + 4. The stages have 16, 32 and 64 times `factor` channels. Each count is multiplied
    by `width`, to the nearest whole number, at least 1. The maps of `stages` are sums that no ReLU follows.
    """

    head = "fc"
    stages: tuple[str, ...] = ("block1", "block2", "block3")

    def __init__(
        self, classes: int, input_size: tuple[int, int, int], depth: int, factor: int, width: float = 1.0
    ) -> None:
        super().__init__()
        need_side(input_size, 8, "wide ResNet")
        first, *after = (scaled(channels, width) for channels in (16, 16 * factor, 32 * factor, 64 * factor))
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(input_size[2], first, 3, padding=1, bias=False)
        self.block1 = _stage(first, after[0], 1, blocks)
        self.block2 = _stage(after[0], after[1], 2, blocks)
        self.block3 = _stage(after[1], after[2], 2, blocks)
        self.bn1 = nn.BatchNorm2d(after[2])
        self.fc = nn.Linear(after[2], classes)
        initialise(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes)."""
        maps = self.block3(self.block2(self.block1(self.conv1(pixels))))  # (B, 64 · factor, 8, 8) for 32×32
        logits: Tensor = self.fc(F.relu(self.bn1(maps)).mean(dim=(2, 3)))
        return logits


def _stage(before: int, after: int, stride: int, blocks: int) -> nn.Sequential:
    first = PreActivationBlock(before, after, stride)
    return nn.Sequential(first, *(PreActivationBlock(after, after, 1) for _ in range(blocks - 1)))


def wrn_16_1(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> WideResNet:
    """Two blocks a stage: 181 k parameters with 100 classes."""
    return WideResNet(classes, input_size, 16, 1, width)


def wrn_16_2(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> WideResNet:
    """Two blocks a stage, twice as wide: 703 k parameters with 100 classes."""
    return WideResNet(classes, input_size, 16, 2, width)


def wrn_40_1(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> WideResNet:
    """Six blocks a stage: 570 k parameters with 100 classes."""
    return WideResNet(classes, input_size, 40, 1, width)


def wrn_40_2(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> WideResNet:
    """Six blocks a stage, twice as wide: 2.26 M parameters with 100 classes."""
    return WideResNet(classes, input_size, 40, 2, width)
