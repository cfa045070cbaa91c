"""Plain small convolutional networks for any image of 8×8 or more: 3×3 convolutions, batch norm, ReLU, pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kdcli.base.errors import UsageError
from kdcli.models.common import scaled


class ConvNet(nn.Module):
    """Stages of 3×3 convolution, batch norm, ReLU; max-pool 2 between stages; global average; linear.

    The models' `width` multiplies `widths`, to the nearest whole numbers, at least 1. The maps of `stages` are those
    before pooling.
    """

    head = "fc"

    def __init__(self, classes: int, input_size: tuple[int, int, int], widths: Sequence[int]) -> None:
        super().__init__()
        height, width, channels = input_size
        least = 2 ** len(widths)  # so that the last maps have 2×2: batch norm cannot train on one value
        if min(height, width) < least:
            raise UsageError(
                f"images of {height}×{width} are too small for a ConvNet of {len(widths)} stages",
                f"It needs {least}×{least} or more.",
            )
        layers: list[nn.Module] = []
        ends: list[str] = []
        for stage, out in enumerate(widths):
            if stage:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            ends.append(f"features.{len(layers) - 1}")
            channels = out
        self.stages = tuple(ends)
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes)."""
        maps = self.features(pixels)  # (B, widths[-1], H/2^(stages−1), W/2^(stages−1))
        logits: Tensor = self.fc(maps.mean(dim=(2, 3)))
        return logits


def convnet_tiny(
    classes: int,
    input_size: tuple[int, int, int],
    widths: Sequence[int] = (8, 16),
    width: float = 1.0,
) -> ConvNet:
    """A student for the digits: some 1,400 parameters."""
    return ConvNet(classes, input_size, [scaled(count, width) for count in widths])


def convnet_small(
    classes: int,
    input_size: tuple[int, int, int],
    widths: Sequence[int] = (16, 32, 64),
    width: float = 1.0,
) -> ConvNet:
    """Some 24 k parameters."""
    return ConvNet(classes, input_size, [scaled(count, width) for count in widths])


def convnet_large(
    classes: int,
    input_size: tuple[int, int, int],
    widths: Sequence[int] = (64, 128, 128),
    width: float = 1.0,
) -> ConvNet:
    """A teacher for the digits: some 220 k parameters."""
    return ConvNet(classes, input_size, [scaled(count, width) for count in widths])
