"""Metrics of logits. Accuracies and rates are in per cent."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 1_024  # at once in float64: of many classes, all rows need several times the memory of the logits


def accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Per cent of samples whose label is among the k largest logits; logits (N, C), labels (N,)."""
    if len(labels) == 0:
        return math.nan
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices  # (N, k)
    return 100.0 * (top == labels[:, None]).any(dim=1).double().mean().item()


def agreement(logits: Tensor, others: Tensor) -> float:
    """Per cent of samples on which two models (N, C) give the same top-1 class."""
    return 100.0 * (logits.argmax(dim=1) == others.argmax(dim=1)).double().mean().item()


def divergence(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """Mean KL(teacher ‖ student) in nats at temperature 1; both (N, C)."""

    def of_rows(student: Tensor, teacher: Tensor) -> Tensor:
        return divergences(student.double(), teacher.double())

    return _by_rows(of_rows, student_logits, teacher_logits).mean().item()


def divergences(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(softmax(t) ‖ softmax(s)) of each row, (B, C) each → (B,)."""
    student, teacher = student_logits.log_softmax(dim=1), teacher_logits.log_softmax(dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy in nats; logits (N, C), labels (N,)."""
    losses = _by_rows(lambda rows, own: F.cross_entropy(rows.double(), own, reduction="none"), logits, labels)
    return losses.mean().item()


def confidence_bins(logits: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Images, sum of confidences and correct predictions in equal-width bins of confidence, float64 (3, bins)."""
    confidence = _by_rows(lambda rows: rows.double().softmax(dim=1).amax(dim=1), logits)
    correct = (logits.argmax(dim=1) == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bin b is (b/bins, (b+1)/bins]
    values = torch.stack([torch.ones_like(correct), confidence, correct])  # (3, N)
    return torch.zeros(3, bins, dtype=torch.float64).index_add_(1, index, values)


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error in per cent, equal-width bins (Guo et al. 2017); logits (N, C)."""
    _, confidence, correct = confidence_bins(logits, labels)
    return 100.0 * (correct - confidence).abs().sum().item() / len(labels)


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Confused classes and their counts, int64 (cells, 3): true, predicted, count; in order, without zeros."""
    pairs = torch.stack([labels, logits.argmax(dim=1)], dim=1)
    cells, counts = pairs.unique(dim=0, return_counts=True)  # type: ignore[no-untyped-call]
    return torch.cat([cells, counts[:, None]], dim=1)


def wilson_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval, in per cent, of a rate over `count` samples (Wilson 1927).

    It covers the sampling of test images, not the variance between training runs.
    """
    if count == 0:
        return 0.0, 100.0
    p = share / 100
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))


def _by_rows(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """A function of tensors (rows, …) → (rows,), applied to some rows at a time."""
    starts = range(0, max(1, len(values[0])), _ROWS)
    return torch.cat([function(*(value[start : start + _ROWS] for value in values)) for start in starts])
