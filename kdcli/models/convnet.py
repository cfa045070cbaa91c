"""Plain small convolutional networks for any image of 8×8 or more: 3×3 convolutions, batch norm, ReLU, pooling."""

from collections.abc import Sequence

from torch import nn

from kdcli.models.common import ConvClassifier, check_size, conv_norm, scaled


class ConvNet(ConvClassifier):
    """Stages of 3×3 convolution, batch norm, ReLU; max-pool 2 between stages; global average; linear.

    `width` multiplies `widths`, rounded to whole numbers of at least 1. The maps of `stage_names` are before pooling;
    the last are (B, widths[-1], H/2^(stages−1), W/2^(stages−1)).
    """

    def __init__(
        self, classes: int, input_size: tuple[int, int, int], widths: Sequence[int], width: float = 1.0
    ) -> None:
        super().__init__()
        check_size(input_size, 2 ** len(widths), f"ConvNet of {len(widths)} stages")
        channels = input_size[2]
        layers: list[nn.Module] = []
        ends: list[str] = []
        for count in widths:
            if layers:
                layers.append(nn.MaxPool2d(2))
            layers += conv_norm(channels, scaled(count, width), 3)
            ends.append(f"features.{len(layers) - 1}")
            channels = scaled(count, width)
        self.stage_names = tuple(ends)
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)
