"""ShuffleNet (Zhang et al. 2018, arXiv:1707.01083) and ShuffleNet V2 (Ma et al. 2018, arXiv:1807.11164), as the
distillation literature has them for small images (Tian et al. 2020, arXiv:1910.10699): they begin with a 1×1
convolution that keeps the image's size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.models.common import ConvClassifier, check_size, conv_norm, initialise, make_stage, scaled

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

    The shortcut adds the input; with stride 2 it concatenates the input, average-pooled 3×3. `groups` are those of
    the first convolution.
    """

    def __init__(self, before: int, after: int, stride: int, groups: int = _GROUPS) -> None:
        super().__init__()
        outputs = after - before if stride == 2 else after
        inner = outputs // 4
        self.groups = groups
        self.conv1 = nn.Conv2d(before, inner, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, groups=_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.pool = nn.AvgPool2d(3, 2, padding=1) if stride == 2 else None

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

    stage_names: tuple[str, ...] = ("layer1", "layer2", "layer3")

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
        self.layer1 = make_stage(GroupUnit, counts[0], counts[1], 2, 4, groups=1)
        self.layer2 = make_stage(GroupUnit, counts[1], counts[2], 2, 8)
        self.layer3 = make_stage(GroupUnit, counts[2], counts[3], 2, 4)
        self.fc = nn.Linear(counts[3], classes)
        initialise(self)

    def maps(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → (B, 960, H/8, W/8), rounded up."""
        maps = F.relu(self.bn1(self.conv1(pixels)))  # (B, 24, 32, 32) for 32×32
        return self.layer3(self.layer2(self.layer1(maps)))  # (B, 960, 4, 4)


class SplitUnit(nn.Module):
    """Half of the channels as they are beside the other half after 1×1, 3×3 depthwise and 1×1; shuffled.

    With stride 2, two branches read all channels, and each halves the image.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.short: nn.Module | None = None
        half = after // 2
        if stride == 2:
            depthwise = conv_norm(before, before, 3, stride, groups=before, relu=False)
            self.short = nn.Sequential(*depthwise, *conv_norm(before, half, 1))
        self.branch = nn.Sequential(
            *conv_norm(before if stride == 2 else half, half, 1),
            *conv_norm(half, half, 3, stride, groups=half, relu=False),
            *conv_norm(half, half, 1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(B, before, H, W) → (B, after, H/stride, W/stride), rounded up."""
        kept, changed = maps.chunk(2, 1) if self.short is None else (self.short(maps), maps)
        return shuffled(torch.cat([kept, self.branch(changed)], 1), 2)


class ShuffleNetV2(ConvClassifier):
    """A 1×1 convolution, three stages of 4, 8 and 4 units, a 1×1 convolution, global average, linear.

    Each count of channels is multiplied by `width`, rounded to an even number (units split them), at least 2.
    """

    stage_names: tuple[str, ...] = ("layer1", "layer2", "layer3")

    def __init__(self, classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> None:
        super().__init__()
        check_size(input_size, 9, "ShuffleNet")
        first, *after, last = (scaled(channels, width, 2) for channels in (24, 116, 232, 464, 1024))
        self.conv1 = nn.Conv2d(input_size[2], first, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = make_stage(SplitUnit, first, after[0], 2, 4)
        self.layer2 = make_stage(SplitUnit, after[0], after[1], 2, 8)
        self.layer3 = make_stage(SplitUnit, after[1], after[2], 2, 4)
        self.conv2 = nn.Conv2d(after[2], last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.fc = nn.Linear(last, classes)
        initialise(self)

    def maps(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → (B, 1024, H/8, W/8), rounded up."""
        maps = F.relu(self.bn1(self.conv1(pixels)))  # (B, 24, 32, 32) for 32×32
        maps = self.layer3(self.layer2(self.layer1(maps)))  # (B, 464, 4, 4)
        return F.relu(self.bn2(self.conv2(maps)))
