"""ShuffleNet (Zhang et al. 2018, arXiv:1707.01083) and ShuffleNet V2 (Ma et al. 2018, arXiv:1807.11164), as the
distillation literature has them for small images (Tian et al. 2020, arXiv:1910.10699): they begin with a 1×1
convolution that keeps the image's size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.models.common import ConvClassifier, check_size, conv_norm, initialise, scaled

_GROUPS = 3


def shuffled(maps: Tensor, groups: int) -> Tensor:
    """Channels (B, groups · n, H, W) in the order 0, n, 2n, …, 1, n + 1, …: each group gets some of all groups."""
    if groups == 1:
        return maps
    batch, channels, height, width = maps.shape
    split = maps.reshape(batch, groups, channels // groups, height, width)
    return split.transpose(1, 2).reshape(batch, channels, height, width)


class GroupUnit(nn.Module):
    """1×1 convolution in groups to a quarter of the channels, shuffle, 3×3 depthwise, 1×1 in groups, shortcut, ReLU.

    The shortcut adds the input; where the image is halved, it concatenates the input, average-pooled 3×3.
    """

    def __init__(self, before: int, after: int, groups: int, halves: bool) -> None:
        super().__init__()
        outputs = after - before if halves else after
        inner = outputs // 4
        self.groups = groups  # of the first convolution
        self.conv1 = nn.Conv2d(before, inner, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, 2 if halves else 1, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, groups=_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.pool = nn.AvgPool2d(3, 2, padding=1) if halves else None

    def forward(self, maps: Tensor) -> Tensor:
        """(B, before, H, W) → (B, after, H, W), or half of H and W, rounded up."""
        residual = shuffled(F.relu(self.bn1(self.conv1(maps))), self.groups)
        residual = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(residual)))))
        if self.pool is None:
            return F.relu(residual + maps)
        return F.relu(torch.cat([residual, self.pool(maps)], 1))


class ShuffleNetV1(ConvClassifier):
    """A 1×1 convolution, three stages of 4, 8 and 4 units in three groups, global average, linear.

    Each count of channels is multiplied by `width`, rounded to a multiple of 12 (a quarter in three groups).
    A stage has at least 12 more than its input, since its first unit computes the difference.
    """

    stages: tuple[str, ...] = ("layer1", "layer2", "layer3")

    def __init__(self, classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> None:
        super().__init__()
        check_size(input_size, 9, "ShuffleNet")
        multiple = 4 * _GROUPS
        counts = [scaled(24, width, multiple)]
        for published in (240, 480, 960):
            counts.append(max(scaled(published, width, multiple), counts[-1] + multiple))
        self.conv1 = nn.Conv2d(input_size[2], counts[0], 1, bias=False)
        self.bn1 = nn.BatchNorm2d(counts[0])
        # As in the paper, no groups in the first unit's first convolution: it reads few channels
        self.layer1 = _group_stage(counts[0], counts[1], 4, first_groups=1)
        self.layer2 = _group_stage(counts[1], counts[2], 8)
        self.layer3 = _group_stage(counts[2], counts[3], 4)
        self.fc = nn.Linear(counts[3], classes)
        initialise(self)

    def maps(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → (B, 960, H/8, W/8), rounded up."""
        maps = F.relu(self.bn1(self.conv1(pixels)))  # (B, 24, 32, 32) for 32×32
        return self.layer3(self.layer2(self.layer1(maps)))  # (B, 960, 4, 4)


def _group_stage(before: int, after: int, units: int, first_groups: int = _GROUPS) -> nn.Sequential:
    first = GroupUnit(before, after, first_groups, halves=True)
    return nn.Sequential(first, *(GroupUnit(after, after, _GROUPS, halves=False) for _ in range(units - 1)))


class SplitUnit(nn.Module):
    """Half of the channels as they are beside the other half after 1×1, 3×3 depthwise and 1×1; shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        kept, changed = maps.chunk(2, 1)
        return shuffled(torch.cat([kept, self.branch(changed)], 1), 2)


class HalvingUnit(nn.Module):
    """Two branches that each halve the image and make half of the channels; shuffled."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.short = nn.Sequential(
            *conv_norm(before, before, 3, 2, groups=before, relu=False), *conv_norm(before, after // 2, 1)
        )
        self.branch = _branch(before, after // 2, 2)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, before, H, W) → (B, after, H/2, W/2), rounded up."""
        return shuffled(torch.cat([self.short(maps), self.branch(maps)], 1), 2)


def _branch(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *conv_norm(before, after, 1),
        *conv_norm(after, after, 3, stride, groups=after, relu=False),
        *conv_norm(after, after, 1),
    )


class ShuffleNetV2(ConvClassifier):
    """A 1×1 convolution, three stages of 4, 8 and 4 units, a 1×1 convolution, global average, linear.

    Each count of channels is multiplied by `width`, rounded to an even number (units split them), at least 2.
    """

    stages: tuple[str, ...] = ("layer1", "layer2", "layer3")

    def __init__(self, classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> None:
        super().__init__()
        check_size(input_size, 9, "ShuffleNet")
        first, *after, last = (scaled(channels, width, 2) for channels in (24, 116, 232, 464, 1024))
        self.conv1 = nn.Conv2d(input_size[2], first, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _split_stage(first, after[0], 4)
        self.layer2 = _split_stage(after[0], after[1], 8)
        self.layer3 = _split_stage(after[1], after[2], 4)
        self.conv2 = nn.Conv2d(after[2], last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.fc = nn.Linear(last, classes)
        initialise(self)

    def maps(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → (B, 1024, H/8, W/8), rounded up."""
        maps = F.relu(self.bn1(self.conv1(pixels)))  # (B, 24, 32, 32) for 32×32
        maps = self.layer3(self.layer2(self.layer1(maps)))  # (B, 464, 4, 4)
        return F.relu(self.bn2(self.conv2(maps)))


def _split_stage(before: int, after: int, units: int) -> nn.Sequential:
    return nn.Sequential(HalvingUnit(before, after), *(SplitUnit(after) for _ in range(units - 1)))
