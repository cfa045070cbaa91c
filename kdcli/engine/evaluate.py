"""Figures of a model on a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kdcli import models
from kdcli.base import metrics
from kdcli.base.events import OnEvent, ignore
from kdcli.data import ImageSet


@dataclass(frozen=True)
class Evaluation:
    """Shares in per cent, divergence in nats; `agreement` and `divergence` only beside a teacher.

    Attributes:
        accuracy_interval: 95 % Wilson interval: the chance of the test sample, not of the training run.
        per_class: accuracy of each class, in class order; None for a class without samples.
        confusion: counts, row true, column predicted.
    """

    count: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    top5: float
    loss: float
    calibration_error: float
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    agreement: float | None = None
    divergence: float | None = None
    teacher_accuracy: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Evaluation:
        """What `to_json` gave, after a way through a file.

        Raises:
            TypeError, ValueError, KeyError: something else.
        """
        low, high = values["accuracy_interval"]
        tuples = {
            "accuracy_interval": (low, high),
            "per_class": tuple(values["per_class"]),
            "confusion": tuple(tuple(row) for row in values["confusion"]),
        }
        return cls(**{**values, **tuples})


def measure(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> Evaluation:
    """Figures from logits (N, C), labels (N,) and, if given, the teacher's logits (N, C)."""
    counts = metrics.confusion(logits, labels, logits.shape[1])
    totals = counts.sum(dim=1)
    accuracy = metrics.accuracy(logits, labels)
    return Evaluation(
        count=len(labels),
        accuracy=accuracy,
        accuracy_interval=metrics.wilson_interval(accuracy, len(labels)),
        top5=metrics.accuracy(logits, labels, 5),
        loss=torch.nn.functional.cross_entropy(logits.double(), labels).item(),
        calibration_error=metrics.calibration_error(logits, labels),
        per_class=tuple(
            100.0 * int(counts[index, index]) / int(total) if total else None
            for index, total in enumerate(totals.tolist())
        ),
        confusion=tuple(tuple(row) for row in counts.tolist()),
        agreement=None if teacher_logits is None else metrics.agreement(logits, teacher_logits),
        divergence=None if teacher_logits is None else metrics.divergence(logits, teacher_logits),
        teacher_accuracy=None if teacher_logits is None else metrics.accuracy(teacher_logits, labels),
    )


def evaluate(
    model: Callable[[Tensor], Tensor],
    data: ImageSet,
    *,
    teacher_logits: Tensor | None = None,
    task: str = "evaluating",
    batch_size: int = 64,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Run a model (in eval mode, from uint8 (B, H, W, C) to logits) over a data set and measure it."""
    logits = models.predict_logits(model, data.images, batch_size=batch_size, task=task, on_event=on_event)
    return measure(logits, torch.tensor(data.labels), teacher_logits)
