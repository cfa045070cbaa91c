"""Losses on labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kdcli.methods.losses.numerics import precise


def cross_entropy(student_logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """−Σ q·log softmax(s), mean over the batch, with q = (1 − ε)·onehot(y) + ε/C; logits (B, C), labels (B,) → ().

    ε is the `smoothing`, in [0, 1]: label smoothing (Szegedy et al., CVPR 2016, section 7); 0 is −log softmax(s)[y].
    """
    return F.cross_entropy(precise(student_logits), labels, label_smoothing=smoothing)


def mixed_cross_entropy(
    student_logits: Tensor, labels: Tensor, other_labels: Tensor, shares: Tensor, smoothing: float = 0.0
) -> Tensor:
    """λ·CE(s, y) + (1 − λ)·CE(s, y′), mean over the batch: mixup's labels (Zhang et al., arXiv:1710.09412).

    Args:
        student_logits: (B, C).
        labels, other_labels: y and y′, (B,).
        shares: λ, (B,).
        smoothing: of both labels, as in `cross_entropy`.
    """
    logits = precise(student_logits)
    own = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    other = F.cross_entropy(logits, other_labels, reduction="none", label_smoothing=smoothing)
    return (shares * own + (1 - shares) * other).mean()
