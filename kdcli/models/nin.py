"""Network in Network (Lin, Chen, Yan 2013, arXiv:1312.4400), in the form of its Caffe model for CIFAR-10."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.models.common import check_size, initialise, scaled

WIDTHS = (192, 160, 96, 192, 192, 192, 192, 192)  # conv1 cccp1 cccp2 conv2 cccp3 cccp4 conv3 cccp5


class _Trunk(nn.Module):
    """Everything up to cccp5: (B, C, H, W) → (B, widths[7], H/4, W/4). ReLU after every convolution."""

    stage_names: tuple[str, ...] = ("pool1", "pool2", "relu_cccp5")

    def __init__(
        self, input_size: tuple[int, int, int], widths: Sequence[int], dropout: float, width: float
    ) -> None:
        super().__init__()
        check_size(input_size, 8, "NIN")
        w1, c1, c2, w2, c3, c4, w3, c5 = (scaled(count, width) for count in widths)
        self.conv1 = nn.Conv2d(input_size[2], w1, 5, padding=2)
        self.cccp1 = nn.Conv2d(w1, c1, 1)
        self.cccp2 = nn.Conv2d(c1, c2, 1)
        # Caffe rounds pooling up, and an average divides by what lies inside the image
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.drop3 = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c2, w2, 5, padding=2)
        self.cccp3 = nn.Conv2d(w2, c3, 1)
        self.cccp4 = nn.Conv2d(c3, c4, 1)
        self.pool2 = nn.AvgPool2d(3, 2, ceil_mode=True, count_include_pad=False)
        self.drop6 = nn.Dropout(dropout)
        self.conv3 = nn.Conv2d(c4, w3, 3, padding=1)
        self.cccp5 = nn.Conv2d(w3, c5, 1)
        self.relu_cccp5 = nn.ReLU()  # a module, so that hooks can read its output

    def features(self, pixels: Tensor) -> Tensor:
        maps = F.relu(self.cccp2(F.relu(self.cccp1(F.relu(self.conv1(pixels))))))
        maps = self.drop3(self.pool1(maps))  # (B, 96, 16, 16) for 32×32
        maps = F.relu(self.cccp4(F.relu(self.cccp3(F.relu(self.conv2(maps))))))
        maps = self.drop6(self.pool2(maps))  # (B, 192, 8, 8)
        return self.relu_cccp5(self.cccp5(F.relu(self.conv3(maps))))


class NIN(_Trunk):
    """Global average pooling over one map per class; the last convolution has its ReLU too, as in Caffe.

    967 k parameters and 222 M MACs on 32×32×3 with 10 classes. `width` multiplies `widths`, rounded to whole numbers
    of at least 1.
    """

    def __init__(
        self,
        classes: int,
        input_size: tuple[int, int, int],
        widths: Sequence[int] = WIDTHS,
        dropout: float = 0.5,
        width: float = 1.0,
    ) -> None:
        super().__init__(input_size, widths, dropout, width)
        self.cccp6 = nn.Conv2d(self.cccp5.out_channels, classes, 1)
        initialise(self, "fan_in")
        # A ReLU follows: logits start small and above 0, or a class whose map is 0 everywhere never learns
        nn.init.normal_(self.cccp6.weight, std=0.01)
        nn.init.constant_(self.cccp6.bias, 1.0)  # type: ignore[arg-type]

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes), none below 0."""
        maps = F.relu(self.cccp6(self.features(pixels)))  # (B, classes, 8, 8)
        return maps.mean(dim=(2, 3))


class NINFc(_Trunk):
    """The reference's variant: ip1 (`hidden` outputs), ReLU, ip2 in place of cccp6 and pool3; `width` as in NIN."""

    head_name = "ip2"

    def __init__(
        self,
        classes: int,
        input_size: tuple[int, int, int],
        widths: Sequence[int] = WIDTHS,
        hidden: int = 1024,
        dropout: float = 0.5,
        width: float = 1.0,
    ) -> None:
        super().__init__(input_size, widths, dropout, width)
        rows, columns = (side // 2 // 2 for side in input_size[:2])  # ceil((s − 3) / 2) + 1 is s // 2
        self.ip1 = nn.Linear(self.cccp5.out_channels * rows * columns, scaled(hidden, width))
        self.ip2 = nn.Linear(scaled(hidden, width), classes)
        initialise(self, "fan_in", (nn.Conv2d, nn.Linear))

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes)."""
        return self.ip2(F.relu(self.ip1(self.features(pixels).flatten(1))))
