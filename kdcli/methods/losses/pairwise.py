"""Losses on relations between the samples of a batch: embeddings (B, D), or maps, which are flattened.

The two sides need not have the same width. One sample alone has no relations: 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcli.methods.losses.numerics import divisor, pair, unit


def similarity(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """‖Gˢ − Gᵗ‖²/B² (Frobenius), G = f·fᵀ with rows brought to length 1: SP (Tung & Mori, ICCV 2019); → ()."""
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
    """Distances and angles between samples under Huber's loss (δ = 1): RKD (Park et al., CVPR 2019); → ().

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
    """Mean over all pairs of p·log((p + ε)/(q + ε)), ε = 1e-7: PKT (Passalis & Tefas, ECCV 2018); → ().

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
