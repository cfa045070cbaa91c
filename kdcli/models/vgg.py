"""VGG with batch norm and one linear layer (Simonyan & Zisserman 2015, arXiv:1409.1556), as the distillation
literature has it for small images (Tian et al. 2020, arXiv:1910.10699)."""

from __future__ import annotations

from torch import Tensor, nn

from kdcli.models.common import initialise, need_side, scaled

_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five blocks of 3×3 convolution (with bias), batch norm, ReLU; global average; linear.

    Max-pool 2 follows the first three blocks, and the fourth where the images have 64×64 or more. Each count of
    channels is multiplied by `width`, to the nearest whole number, at least 1. The maps of `stages` are those before
    pooling.
    """

    head = "fc"
    stages: tuple[str, ...] = ("block0", "block1", "block2", "block3", "block4")

    def __init__(
        self,
        classes: int,
        input_size: tuple[int, int, int],
        convolutions: tuple[int, int, int, int, int],
        width: float = 1.0,
    ) -> None:
        super().__init__()
        need_side(input_size, 16, "VGG")
        colours, after = input_size[2], [scaled(channels, width) for channels in _WIDTHS]
        self.block0 = _block(colours, after[0], convolutions[0])
        self.pool0 = nn.MaxPool2d(2)
        self.block1 = _block(after[0], after[1], convolutions[1])
        self.pool1 = nn.MaxPool2d(2)
        self.block2 = _block(after[1], after[2], convolutions[2])
        self.pool2 = nn.MaxPool2d(2)
        self.block3 = _block(after[2], after[3], convolutions[3])
        self.pool3 = nn.MaxPool2d(2) if min(input_size[:2]) >= 64 else None
        self.block4 = _block(after[3], after[4], convolutions[4])
        self.fc = nn.Linear(after[4], classes)
        initialise(self)

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes)."""
        maps = self.pool0(self.block0(pixels))  # (B, 64, 16, 16) for 32×32
        maps = self.pool2(self.block2(self.pool1(self.block1(maps))))  # (B, 256, 4, 4)
        maps = self.block3(maps)
        maps = self.block4(maps if self.pool3 is None else self.pool3(maps))  # (B, 512, 4, 4)
        logits: Tensor = self.fc(maps.mean(dim=(2, 3)))
        return logits


def _block(before: int, after: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers)


def vgg8(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> VGG:
    """One convolution a block: 3.97 M parameters with 100 classes."""
    return VGG(classes, input_size, (1, 1, 1, 1, 1), width)


def vgg13(classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> VGG:
    """Two convolutions a block: 9.46 M parameters with 100 classes."""
    return VGG(classes, input_size, (2, 2, 2, 2, 2), width)
