"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381), as the distillation literature has it for small images (Tian
et al. 2020, arXiv:1910.10699): half the channels, four halvings of the image, plain ReLU, no dropout."""

from functools import partial

from torch import Tensor, nn

from kdcli.models.common import ConvClassifier, check_size, conv_norm, initialise, make_stage, scaled

# expansion, channels (already half the paper's), blocks, stride of the first
_GROUPS = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)
_FIRST, _LAST = 16, 1280
_MULTIPLE = 4  # the paper's 8 for the whole network is 4 for its half


class InvertedResidual(nn.Module):
    """1×1 convolution to `expansion` times the channels, 3×3 depthwise, 1×1 back; added to the input if shapes agree.

    Batch norm after each, ReLU after the first two.
    """

    def __init__(self, before: int, after: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        self.has_shortcut = stride == 1 and before == after
        self.conv = nn.Sequential(
            *conv_norm(before, inner, 1),
            *conv_norm(inner, inner, 3, stride, groups=inner),
            *conv_norm(inner, after, 1, relu=False),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(B, before, H, W) → (B, after, H/stride, W/stride)."""
        result: Tensor = self.conv(maps)
        return maps + result if self.has_shortcut else result


class MobileNetV2(ConvClassifier):
    """A 3×3 convolution of stride 2, seven groups of inverted residuals, a 1×1 convolution, global average, linear.

    Each count of channels is multiplied by `width`, rounded to the nearest multiple of 4, at least 4. The maps of
    `stage_names` are those before the image is halved and the last: linear, no ReLU follows. The average is over maps
    (B, 1280, H/16, W/16), rounded up.
    """

    stage_names: tuple[str, ...] = ("blocks.1", "blocks.2", "blocks.4", "blocks.6")

    def __init__(self, classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> None:
        super().__init__()
        check_size(input_size, 17, "MobileNetV2")
        channels = scaled(_FIRST, width, _MULTIPLE)
        self.conv1 = nn.Sequential(*conv_norm(input_size[2], channels, 3, 2))
        groups = []
        for expansion, published, blocks, stride in _GROUPS:
            after = scaled(published, width, _MULTIPLE)
            block = partial(InvertedResidual, expansion=expansion)
            groups.append(make_stage(block, channels, after, stride, blocks))
            channels = after
        self.blocks = nn.Sequential(*groups)
        last = scaled(_LAST, width, _MULTIPLE)
        self.conv2 = nn.Sequential(*conv_norm(channels, last, 1))
        self.fc = nn.Linear(last, classes)
        initialise(self)
