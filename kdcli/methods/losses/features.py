"""Losses on feature maps, (B, C, H, W).

Where the two sides differ in height or width, the larger is brought to the smaller by adaptive average pooling.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kdcli.methods.losses.numerics import pair, unit


def same_size(student_maps: Tensor, teacher_maps: Tensor) -> tuple[Tensor, Tensor]:
    """Both at the smaller of their heights and widths, in the student's precision; the teacher's without gradient."""
    height = min(student_maps.shape[2], teacher_maps.shape[2])
    width = min(student_maps.shape[3], teacher_maps.shape[3])
    student, teacher = pair(student_maps, teacher_maps)
    return _pool(student, height, width), _pool(teacher, height, width)


def _pool(maps: Tensor, height: int, width: int) -> Tensor:
    if maps.shape[2:] == (height, width):
        return maps
    return F.adaptive_avg_pool2d(maps, (height, width))


def hint(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Mean of (s − t)² over all elements: FitNets (Romero et al., ICLR 2015, eq. 3); equal channels → ().

    The paper's ½‖s − t‖² sums over an image: it is ½·C·H·W times this. The mean is RepDistiller's scale, for
    which its weight of 100 holds.
    """
    student, teacher = same_size(student_maps, teacher_maps)
    return F.mse_loss(student, teacher)


def attention(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Mean over batch and places of (Qˢ/‖Qˢ‖ − Qᵗ/‖Qᵗ‖)², Q = Σ_c f_c²: attention transfer; channels may differ → ().

    Zagoruyko & Komodakis, ICLR 2017, eq. 2, with the mean over places of the authors' code; the paper's term is the
    square root of the sum over places.
    """
    student, teacher = (
        unit(maps.square().sum(dim=1).flatten(1)) for maps in same_size(student_maps, teacher_maps)
    )  # (B, H·W)
    return F.mse_loss(student, teacher)


def variational(student_mean: Tensor, variance: Tensor, teacher_maps: Tensor) -> Tensor:
    """½·mean((μ − t)²/σ² + log σ²) over all elements: VID (Ahn et al., CVPR 2019), less a constant; → ().

    Args:
        student_mean: μ, what a regressor makes of the student's maps, (B, C, H, W).
        variance: σ² > 0 of each channel, (C,).
        teacher_maps: t, (B, C, H, W).
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
