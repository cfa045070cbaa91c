"""Figures of a model on a data set."""

from collections.abc import Callable

import torch
from torch import Tensor

from kdcli import models
from kdcli.base import metrics
from kdcli.base.events import OnEvent, ignore
from kdcli.data import ImageSet
from kdcli.engine.records import Evaluation


def measure(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> Evaluation:
    """Figures from logits (N, C), labels (N,) and, if given, the teacher's logits (N, C)."""
    counts = metrics.confusion(logits, labels, logits.shape[1])
    totals = counts.sum(dim=1)
    accuracy = metrics.accuracy(logits, labels)
    return Evaluation.model_construct(  # without a check: figures of a broken network may be NaN
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
