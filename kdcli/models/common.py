"""Parts shared by the networks: the frame of a convolutional classifier, stages, channel counts, initial weights."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from kdcli.base.errors import UsageError

_MAX_WIDTH = 64


class ConvClassifier(nn.Module):
    """Convolutions, global average, one linear layer `fc`."""

    head_name = "fc"
    fc: nn.Linear

    def maps(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, C, H, W) → the last maps (B, D, H', W'), by default of all layers but `fc`."""
        for name, layer in self.named_children():
            if name != "fc":
                pixels = layer(pixels)
        return pixels

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes)."""
        return self.fc(self.maps(pixels).mean(dim=(2, 3)))


def conv_norm(
    before: int,
    after: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    *,
    bias: bool = False,
    relu: bool = True,
) -> list[nn.Module]:
    """Convolution that keeps the image's size (but for `stride`), batch norm, ReLU: as layers of a Sequential."""
    layers: list[nn.Module] = [
        nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(after),
    ]
    return [*layers, nn.ReLU()] if relu else layers


def make_stage(
    block: Callable[..., nn.Module], before: int, after: int, stride: int, blocks: int, **first: int
) -> nn.Sequential:
    """Blocks `block(before, after, stride)`; the first one changes channels and size, and is made with `first`."""
    rest = (block(after, after, 1) for _ in range(blocks - 1))
    return nn.Sequential(block(before, after, stride, **first), *rest)


def scaled(channels: int, width: float, multiple: int = 1) -> int:
    """A channel count times `width`, rounded to a `multiple` (halves up), at least one; at width 1 as it is."""
    if not 0 < width <= _MAX_WIDTH:
        raise UsageError(
            f"a network's width cannot be {width}", f"It is a factor above 0 and at most {_MAX_WIDTH}."
        )
    if width == 1:
        return channels
    return max(1, int(channels * width / multiple + 0.5)) * multiple


def check_size(input_size: tuple[int, int, int], least: int, network: str, hint: str = "") -> None:
    """Raise UsageError for images with a side below `least`.

    The last maps need 2×2 pixels: batch norm cannot train on one value per channel.
    """
    height, width = input_size[:2]
    if min(height, width) < least:
        raise UsageError(
            f"images of {height}×{width} are too small for a {network}",
            f"It needs {least}×{least} or more{hint}.",
        )


def initialise(
    network: nn.Module,
    mode: Literal["fan_in", "fan_out"] = "fan_out",
    kinds: tuple[type[nn.Conv2d | nn.Linear], ...] = (nn.Conv2d,),
) -> None:
    """Initialise convolutions by He et al. 2015 (arXiv:1502.01852); layers not of `kinds` keep torch's values."""
    for module in network.modules():
        if isinstance(module, kinds):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
