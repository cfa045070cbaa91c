"""Residual networks for small images: ResNet (He et al. 2016, arXiv:1512.03385, section 4.2), with the shortcuts and
the wider forms of the distillation literature (Tian et al. 2020, arXiv:1910.10699), and wide residual networks
(Zagoruyko & Komodakis 2016, arXiv:1605.07146)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.models.common import ConvClassifier, check_size, conv_norm, initialise, make_stage, scaled


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
            self.shortcut = nn.Sequential(*conv_norm(before, after, 1, stride, relu=False))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, before, H, W) → (B, after, H/stride, W/stride)."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps)))))
        return F.relu(residual + (maps if self.shortcut is None else self.shortcut(maps)))


class ResNet(ConvClassifier):
    """A 3×3 convolution, three stages of basic blocks, global average, linear.

    `depth` is 6 · blocks of a stage + 2. `widths` are the channels of the first convolution and of the stages, times
    `width`, rounded to whole numbers of at least 1.
    """

    stage_names: tuple[str, ...] = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        classes: int,
        input_size: tuple[int, int, int],
        depth: int,
        widths: Sequence[int] = (16, 16, 32, 64),
        width: float = 1.0,
    ) -> None:
        super().__init__()
        check_size(input_size, 8, "ResNet")
        first, *after = (scaled(channels, width) for channels in widths)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(input_size[2], first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = make_stage(BasicBlock, first, after[0], 1, blocks)
        self.layer2 = make_stage(BasicBlock, after[0], after[1], 2, blocks)
        self.layer3 = make_stage(BasicBlock, after[1], after[2], 2, blocks)
        self.fc = nn.Linear(after[2], classes)
        initialise(self)

    def maps(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → (B, widths[3], H/4, W/4)."""
        maps = F.relu(self.bn1(self.conv1(pixels)))  # (B, 16, 32, 32) for 32×32
        return self.layer3(self.layer2(self.layer1(maps)))  # (B, 64, 8, 8)


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


class WideResNet(ConvClassifier):
    """A 3×3 convolution, three stages of blocks, batch norm, ReLU, global average, linear.

    `depth` is 6 · blocks of a stage + 4. The stages have 16, 32 and 64 times `factor` channels, each count times
    `width`, rounded to whole numbers of at least 1. The maps of `stage_names` are sums that no ReLU follows.
    """

    stage_names: tuple[str, ...] = ("block1", "block2", "block3")

    def __init__(
        self, classes: int, input_size: tuple[int, int, int], depth: int, factor: int, width: float = 1.0
    ) -> None:
        super().__init__()
        check_size(input_size, 8, "wide ResNet")
        first, *after = (scaled(channels, width) for channels in (16, 16 * factor, 32 * factor, 64 * factor))
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(input_size[2], first, 3, padding=1, bias=False)
        self.block1 = make_stage(PreActivationBlock, first, after[0], 1, blocks)
        self.block2 = make_stage(PreActivationBlock, after[0], after[1], 2, blocks)
        self.block3 = make_stage(PreActivationBlock, after[1], after[2], 2, blocks)
        self.bn1 = nn.BatchNorm2d(after[2])
        self.fc = nn.Linear(after[2], classes)
        initialise(self)

    def maps(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → (B, 64 · factor, H/4, W/4)."""
        return F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(pixels))))))
