"""What the families share: channel counts by a multiplier, images that are too small, initial weights."""

from __future__ import annotations

from torch import nn

from kdcli.base.errors import UsageError

_WIDEST = 64


def scaled(channels: int, width: float, multiple: int = 1) -> int:
    """A channel count times `width`: the nearest multiple of `multiple`, halves up, and at least one of it.

    At width 1 it is `channels` as it is: the published network.

    Raises:
        UsageError: width is not above 0 and at most 64.
    """
    if not 0 < width <= _WIDEST:
        raise UsageError(
            f"a network's width cannot be {width}", f"It is a factor, above 0 and at most {_WIDEST}."
        )
    if width == 1:
        return channels
    return max(1, int(channels * width / multiple + 0.5)) * multiple


def need_side(input_size: tuple[int, int, int], least: int, network: str) -> None:
    """Refuse images with a side below `least`: the last maps need 2×2, batch norm cannot train on one value."""
    height, width = input_size[:2]
    if min(height, width) < least:
        raise UsageError(
            f"images of {height}×{width} are too small for a {network}", f"It needs {least}×{least} or more."
        )


def initialise(network: nn.Module) -> None:
    """Convolutions by He et al. 2015 (arXiv:1502.01852), fan out; batch norm and linear layers as torch does."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
