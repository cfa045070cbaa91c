"""CifarNet: the network of airbench94 (Jordan, "94% on CIFAR-10 in 3.29 Seconds", arXiv:2404.00498, section 3)."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdcli.models.common import ConvClassifier, check_size, scaled

_SMOOTHING = 5e-4  # added to the eigenvalues of the whitening
_OUTPUT_SCALE = 1 / 9


class CifarNet(ConvClassifier):
    """A fixed 2×2 whitening convolution, three groups of two 3×3 convolutions, global max-pooling, linear.

    Differences from the paper: the scale 1/9 of the logits is part of `fc`'s initial weights, `fc` has a bias, and
    the bias of the whitening is trained throughout. `width` multiplies the channels of the groups: 64, 256, 256.
    """

    stage_names = ("group1", "group2", "group3")
    # of --optimizer sgd: biases of batch norm learn 64 times faster; `fc` as if a layer of scale 1/9 came after it
    lr_factors: ClassVar = {"norm1.bias": 64.0, "norm2.bias": 64.0, "fc.weight": _OUTPUT_SCALE**2}

    def __init__(self, classes: int, input_size: tuple[int, int, int], width: float = 1.0) -> None:
        super().__init__()
        check_size(input_size, 17, "CifarNet", "; --image-size 32 enlarges them")
        patch = 4 * input_size[2]
        first, second, third = (scaled(count, width) for count in (64, 256, 256))
        self.whiten = nn.Conv2d(input_size[2], 2 * patch, 2)
        self.whiten.weight.requires_grad = False
        self.activation = nn.GELU()
        self.group1 = _Group(2 * patch, first)
        self.group2 = _Group(first, second)
        self.group3 = _Group(second, third)
        self.fc = nn.Linear(third, classes)
        with torch.no_grad():
            self.fc.weight.mul_(_OUTPUT_SCALE)
            self.fc.bias.zero_()

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes)."""
        return self.fc(self.maps(pixels).amax(dim=(2, 3)))

    def fit_to_images(self, prepared: Tensor) -> None:
        """Set the whitening's weights: eigenvectors of the 2×2 patches of images (N, C, H, W), also negated."""
        size = self.whiten.weight.shape[1:]  # (C, 2, 2)
        patches = prepared.double().unfold(2, 2, 1).unfold(3, 2, 1)  # (N, C, H−1, W−1, 2, 2)
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, size.numel())
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        scaled_vectors = vectors.T / (values + _SMOOTHING).sqrt()[:, None]  # a row for each eigenvector
        weight = torch.cat((scaled_vectors, -scaled_vectors)).reshape(-1, *size)
        with torch.no_grad():
            self.whiten.weight.copy_(weight)


class _Group(nn.Module):
    """Convolution, max-pool 2, batch norm, GELU, convolution, batch norm, GELU; batch norms have no trained scale.

    The first channels of each convolution are initialised to pass their input on.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = nn.BatchNorm2d(after, momentum=0.4)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after, momentum=0.4)
        self.activation = nn.GELU()
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            nn.init.dirac_(conv.weight[: conv.in_channels].data)
            norm.weight.requires_grad = False

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.activation(self.norm1(self.pool(self.conv1(maps))))
        return self.activation(self.norm2(self.conv2(maps)))
