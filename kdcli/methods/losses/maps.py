"""Losses on feature maps (B, C, H, W), and modules that bring a student's maps to the teacher's shape.

Where the two sides differ in height or width, the larger is brought to the smaller by adaptive average pooling.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli.methods.losses.numerics import pair, unit


def same_size(student_maps: Tensor, teacher_maps: Tensor) -> tuple[Tensor, Tensor]:
    """Both at the smaller of their heights and widths, in the student's precision; the teacher's without gradient."""
    height = min(student_maps.shape[2], teacher_maps.shape[2])
    width = min(student_maps.shape[3], teacher_maps.shape[3])
    student, teacher = pair(student_maps, teacher_maps)
    return _pool(student, (height, width)), _pool(teacher, (height, width))


def _pool(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size)


def hint(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Mean of (s − t)² over all elements: FitNets (Romero et al., ICLR 2015, eq. 3); equal channels → ()."""
    student, teacher = same_size(student_maps, teacher_maps)
    return F.mse_loss(student, teacher)


def attention(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Mean over batch and places of (Qˢ/‖Qˢ‖ − Qᵗ/‖Qᵗ‖)², Q = Σ_c f_c²: attention transfer; channels may differ → ().

    Zagoruyko & Komodakis, ICLR 2017, eq. 2.
    """
    maps = same_size(student_maps, teacher_maps)
    student, teacher = (unit(side.square().sum(dim=1).flatten(1)) for side in maps)  # (B, H·W)
    return F.mse_loss(student, teacher)


def variational(student_mean: Tensor, variance: Tensor, teacher_maps: Tensor) -> Tensor:
    """½·mean((μ − t)²/σ² + log σ²) over all elements: VID (Ahn et al., CVPR 2019), less a constant; → ().

    μ (B, C, H, W) is what a regressor makes of the student's maps, σ² (C,) the `variance` of each channel, t the
    teacher's maps (B, C, H, W).
    """
    mean, teacher = same_size(student_mean, teacher_maps)
    variance = variance.to(mean.dtype)[:, None, None]
    return 0.5 * ((mean - teacher).square() / variance + variance.log()).mean()


def review(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """ReviewKD's hierarchical context loss of one stage (Chen et al., CVPR 2021); equal channels → ().

    The mean square of the difference at full size with weight 1, then at adaptive average pools to 4×4, 2×2 and 1×1,
    those smaller than the maps, with weights ½, ¼, ⅛ in turn; divided by the sum of the weights used.
    """
    student, teacher = same_size(student_maps, teacher_maps)
    loss, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for size in (4, 2, 1):
        if size < min(student.shape[2:]):
            weight /= 2
            weights += weight
            pooled = F.adaptive_avg_pool2d(student - teacher, size)
            loss = loss + weight * pooled.square().mean()
    return loss / weights


class Hint(nn.Module):
    """FitNets' regressor before `hint`: a 1×1 convolution to the teacher's channels, of maps of equal size."""

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        super().__init__()
        self.regressor = nn.Conv2d(student_shape[0], teacher_shape[0], 1)

    def forward(self, student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
        """(B, C, H, W) each → ()."""
        student, teacher = same_size(student_maps, teacher_maps)
        return hint(self.regressor(student), teacher)


class Variational(nn.Module):
    """VID's regressor and variances (Ahn et al., CVPR 2019) before `variational`, as in the authors' code.

    Three 1×1 convolutions without bias, ReLU between, as wide as the teacher's maps; a variance for each of the
    teacher's channels, softplus(·) + 1e-5, that starts at 5.
    """

    LEAST = 1e-5

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        super().__init__()
        channels = teacher_shape[0]
        self.regressor = nn.Sequential(
            nn.Conv2d(student_shape[0], channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
        )
        self.spread = nn.Parameter(torch.full((channels,), math.log(math.expm1(5.0 - self.LEAST))))

    def forward(self, student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
        """(B, C, H, W) each → ()."""
        student, teacher = same_size(student_maps, teacher_maps)
        return variational(self.regressor(student), F.softplus(self.spread) + self.LEAST, teacher)


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm that uses running statistics for one value per channel, a single image's 1×1 maps."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        if maps.numel() > maps.shape[1]:
            return super().forward(maps)
        return F.batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class _Fusion(nn.Module):
    """ReviewKD's attention-based fusion of one stage's maps with those of the deeper stages."""

    def __init__(self, channels: int, mid: int, out: int, fuses: bool) -> None:
        super().__init__()
        enter, leave = nn.Conv2d(channels, mid, 1, bias=False), nn.Conv2d(mid, out, 3, padding=1, bias=False)
        for convolution in (enter, leave):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.enter = nn.Sequential(enter, _BatchNorm(mid))
        self.leave = nn.Sequential(leave, _BatchNorm(out))
        self.attention = nn.Conv2d(2 * mid, 2, 1) if fuses else None

    def forward(self, maps: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Maps to compare, with the teacher's channels, and maps for the next stage; both of the teacher's size."""
        maps = self.enter(maps)
        if self.attention is not None and deeper is not None:
            deeper = _resize(deeper, maps.shape[2:])
            shares = self.attention(torch.cat([maps, deeper], dim=1)).sigmoid()  # (B, 2, H, W)
            maps = maps * shares[:, :1] + deeper * shares[:, 1:]
        maps = _resize(maps, size)
        return self.leave(maps), maps


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    return maps if maps.shape[2:] == size else F.interpolate(maps, tuple(size), mode="nearest")


class Review(nn.Module):
    """ReviewKD (Chen et al., CVPR 2021): from the deepest stage on, each is fused with those after it and compared.

    The fused maps are brought to the teacher's size (nearest) and channels, then `review`, summed over stages.
    """

    def __init__(
        self,
        student_shapes: Sequence[Sequence[int]],
        teacher_shapes: Sequence[Sequence[int]],
        mid: int | None = None,
    ) -> None:
        """Shapes (C, H, W) of paired stages; `mid`: width of the fusion, by default the deepest's, at most 512."""
        super().__init__()
        mid = min(512, student_shapes[-1][0]) if mid is None else mid
        last = len(student_shapes) - 1
        self.stages = nn.ModuleList(
            _Fusion(student[0], mid, teacher[0], stage < last)
            for stage, (student, teacher) in enumerate(zip(student_shapes, teacher_shapes, strict=True))
        )

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """(B, C, H, W) of each stage → ()."""
        deeper: Tensor | None = None
        found = []
        for stage in reversed(range(len(self.stages))):
            student, teacher = pair(student_maps[stage], teacher_maps[stage])
            fused, deeper = self.stages[stage](student, deeper, teacher.shape[2:])
            found.append(review(fused, teacher))
        return torch.stack(found).sum()
