"""LeNet: the reference's wide student without ReLU after its convolutions, and Caffe's classic."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdcli.models.common import check_size, scaled


class LeNet(nn.Module):
    """conv1 5×5 valid, max-pool 2, conv2 5×5 valid, max-pool 2, ip1, ReLU, ip2 (LeCun et al. 1998, Caffe's form).

    Layer names are Caffe's. No ReLU follows the convolutions: neither has it in the reference nor in Caffe. The
    default `widths` are the reference's student: 3.50 M parameters and 27 M MACs on 32×32×3 with 10 classes. `width`
    multiplies them, rounded to whole numbers of at least 1.
    """

    head_name = "ip2"
    stage_names: tuple[str, ...] = ("pool1", "pool2")

    def __init__(
        self,
        classes: int,
        input_size: tuple[int, int, int],
        widths: Sequence[int] = (64, 128, 1024),
        width: float = 1.0,
    ) -> None:
        super().__init__()
        check_size(input_size, 16, "LeNet", "; convnet-tiny, convnet-small and convnet-large take 8×8")
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in input_size[:2])
        first, second, hidden = (scaled(count, width) for count in widths)
        self.conv1 = nn.Conv2d(input_size[2], first, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.pool2 = nn.MaxPool2d(2)
        self.ip1 = nn.Linear(second * rows * columns, hidden)
        self.ip2 = nn.Linear(hidden, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes)."""
        features = self.pool1(self.conv1(pixels))  # (B, 64, 14, 14) for 32×32
        features = self.pool2(self.conv2(features))  # (B, 128, 5, 5)
        return self.ip2(torch.relu(self.ip1(features.flatten(1))))
