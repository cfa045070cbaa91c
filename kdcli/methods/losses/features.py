"""Losses on feature maps (B, C, H, W), modules that bring a student's maps to the teacher's shape, and losses on
relations between the samples of a batch.

Where maps differ in height or width, the larger are brought to the smaller by adaptive average pooling. Relations are
of embeddings (B, D), or maps, which are flattened; the two widths may differ. One sample alone has no relations: 0.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli.methods.losses.numerics import divisor, pair, unit


def same_size(student_maps: Tensor, teacher_maps: Tensor) -> tuple[Tensor, Tensor]:
    """Pool both to the smaller of their heights and widths; (B, Cˢ, H, W), (B, Cᵗ, H, W) → the same with equal H, W.

    In the student's precision; the teacher's without gradient.
    """
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
    """½·mean((μ − t)²/σ² + log σ²): VID (Ahn et al., CVPR 2019) without the constant ½·log 2π; → ().

    μ (B, C, H, W): output of a regressor on the student's maps; σ² (C,): `variance` of each channel; t (B, C, H, W):
    teacher's maps.
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
        self, student_shapes: Sequence[Sequence[int]], teacher_shapes: Sequence[Sequence[int]]
    ) -> None:
        """Shapes (C, H, W) of paired stages."""
        super().__init__()
        mid = min(512, student_shapes[-1][0])  # width of the fusion
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


def similarity(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """‖Gˢ − Gᵗ‖²/B² (Frobenius), G = f·fᵀ rows normalised: SP (Tung & Mori, ICCV 2019); (B, …) each → ()."""
    student, teacher = pair(student_maps.flatten(1), teacher_maps.flatten(1))
    if len(student) == 1:
        return _none(student)
    return (unit(teacher @ teacher.T) - unit(student @ student.T)).square().mean()


def relational(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Tensor:
    """Distances and angles of samples under Huber's loss (δ = 1): RKD (Park et al., CVPR 2019); (B, …) each → ().

    Distances are divided by their mean over the pairs of different samples; the losses are means over all B² pairs
    and B³ triplets. Samples nearer to each other than the rounding of their products count as one.
    """
    student, teacher = pair(student_embedding.flatten(1), teacher_embedding.flatten(1))
    if len(student) == 1:
        return _none(student)
    distances, angles = zip(_relations(student), _relations(teacher), strict=True)
    return distance_weight * F.smooth_l1_loss(*distances) + angle_weight * F.smooth_l1_loss(*angles)


def _relations(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Distances over their mean, (B, B), and cosines at i of the angles between j and k, (B, B, B).

    All from the B×B products of the centred embeddings: the differences would take D times as much.
    """
    batch = len(embedding)
    centred = embedding - embedding.mean(dim=0)
    products = centred @ centred.T
    squares = products.diagonal()
    both = squares[:, None] + squares
    squared = both - 2 * products
    apart = squared > 8 * torch.finfo(squared.dtype).eps * both
    lengths = torch.where(apart, squared, 1).sqrt()  # the root's gradient at 0 would be infinite
    distances = torch.where(apart, lengths, 0)
    inverse = torch.where(apart, 1 / lengths, 0)
    inner = squares[:, None, None] - products[:, :, None] - products[:, None, :] + products
    cosines = inner * inverse[:, :, None] * inverse[:, None, :]
    return distances / divisor(distances.sum() / (batch * (batch - 1)), 0.0), cosines


def probabilistic(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Mean over all pairs of p·log((p + ε)/(q + ε)), ε = 1e-7: PKT (Passalis & Tefas, ECCV 2018); (B, …) each → ().

    p (teacher) and q (student) are (1 + cos)/2 of each two samples, divided by their sum over each row; as in the
    authors' code a sample is one of its own neighbours.
    """
    student, teacher = pair(student_embedding.flatten(1), teacher_embedding.flatten(1))
    if len(student) == 1:
        return _none(student)
    kernels = ((rows @ rows.T + 1) / 2 for rows in (unit(student), unit(teacher)))
    q, p = (kernel / kernel.sum(dim=1, keepdim=True) for kernel in kernels)
    return (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()


def _none(student: Tensor) -> Tensor:
    """0, with a gradient of 0, so that a step can be taken."""
    return (student * 0).sum()
