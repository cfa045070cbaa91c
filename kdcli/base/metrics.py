"""Metrics of logits. Accuracies and rates are in per cent."""

import math

import torch
from torch import Tensor


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
    student = student_logits.double().log_softmax(dim=1)
    teacher = teacher_logits.double().log_softmax(dim=1)
    return (teacher.exp() * (teacher - student)).sum(dim=1).mean().item()


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error in per cent, equal-width bins (Guo et al. 2017); logits (N, C)."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    correct = (predicted == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bin b is (b/bins, (b+1)/bins]
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, correct - confidence)
    return 100.0 * gaps.abs().sum().item() / len(labels)


def confusion(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts int64 (classes, classes): row true, column predicted."""
    flat = labels * classes + logits.argmax(dim=1)
    return torch.bincount(flat, minlength=classes * classes).reshape(classes, classes)


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
