"""Loss functions: pure, from logits to a scalar, each the mean over the batch of its paper's formula."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(s)[y], mean over the batch; logits (B, C), labels (B,) → ()."""
    return F.cross_entropy(student_logits, labels)


def mixed_cross_entropy(
    student_logits: Tensor, labels: Tensor, other_labels: Tensor, shares: Tensor
) -> Tensor:
    """λ·CE(s, y) + (1 − λ)·CE(s, y′), mean over the batch: mixup's labels (Zhang et al., arXiv:1710.09412).

    Args:
        student_logits: (B, C).
        labels, other_labels: y and y′, (B,).
        shares: λ, (B,).
    """
    own = F.cross_entropy(student_logits, labels, reduction="none")
    other = F.cross_entropy(student_logits, other_labels, reduction="none")
    return (shares * own + (1 - shares) * other).mean()


def logit_regression(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """½‖s − t‖²: sum over classes, mean over the batch (Ba & Caruana, NIPS 2014, eq. 1); (B, C) each → ()."""
    return 0.5 * (student_logits - teacher_logits).square().sum(dim=1).mean()


def perturb(teacher_logits: Tensor, selected: Tensor, noise: Tensor) -> Tensor:
    """t′ = (1 + m·ξ)·t (Sau & Balasubramanian, arXiv:1610.09650, eq. 3).

    The noise scales the target. A sample that is not selected keeps its target exactly.

    Args:
        teacher_logits: (B, C).
        selected: m, bool (B, 1).
        noise: ξ, (B, 1) or (B, C).
    """
    return torch.where(selected, teacher_logits * (1 + noise), teacher_logits)


def soft_targets(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """τ²·KL(softmax(t/τ) ‖ softmax(s/τ)): sum over classes, mean over the batch (Hinton et al. 2015); → ().

    τ² keeps the gradient's size independent of the temperature.
    """
    student = F.log_softmax(student_logits / tau, dim=1)
    teacher = F.log_softmax(teacher_logits / tau, dim=1)
    return tau * tau * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
