"""VGG with batch norm and one linear layer (Simonyan & Zisserman 2015, arXiv:1409.1556), as the distillation
literature has it for small images (Tian et al. 2020, arXiv:1910.10699)."""

from torch import nn

from kdcli.models.common import ConvClassifier, check_size, conv_norm, initialise, scaled

_WIDTHS = (64, 128, 256, 512, 512)


class VGG(ConvClassifier):
    """Five blocks of 3×3 `convolutions` (with bias), batch norm, ReLU; global average; linear.

    Max-pool 2 follows the first three blocks, and the fourth where the images have 64×64 or more. The maps of
    `stage_names` are those before pooling; the last are (B, 512, H/8, W/8), from 64×64 on (B, 512, H/16, W/16).
    `width` multiplies each count of channels, rounded to whole numbers of at least 1.
    """

    stage_names: tuple[str, ...] = ("block0", "block1", "block2", "block3", "block4")

    def __init__(
        self, classes: int, input_size: tuple[int, int, int], convolutions: int, width: float = 1.0
    ) -> None:
        super().__init__()
        check_size(input_size, 16, "VGG")
        before = input_size[2]
        for number, published in enumerate(_WIDTHS):
            after = scaled(published, width)
            layers = conv_norm(before, after, 3, bias=True)
            for _ in range(convolutions - 1):
                layers += conv_norm(after, after, 3, bias=True)
            self.add_module(f"block{number}", nn.Sequential(*layers))
            if number < 3 or (number == 3 and min(input_size[:2]) >= 64):
                self.add_module(f"pool{number}", nn.MaxPool2d(2))
            before = after
        self.fc = nn.Linear(before, classes)
        initialise(self)
