"""Accuracy and agreement beside speed and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcli import models
from kdcli.base import metrics
from kdcli.base.events import OnEvent
from kdcli.data import ImageSet, incompatibility
from kdcli.deploy.onnx_model import OnnxClassifier
from kdcli.models import Classifier


@dataclass(frozen=True)
class Quality:
    accuracy: float | None = None
    source: str | None = None
    agreement: float | None = None
    kl: float | None = None
    ece: float | None = None
    notes: tuple[str, ...] = ()


def quality_of(
    names: Sequence[str],
    loaded: Sequence[Classifier | OnnxClassifier],
    test: ImageSet | None,
    on_event: OnEvent,
) -> list[Quality]:
    """Accuracy and agreement of each file; what cannot be measured gets a note instead."""
    found: list[Quality] = []
    teacher_logits: Tensor | None = None
    for index, model in enumerate(loaded):
        if test is None:
            found.append(_recorded(model))
            continue
        problem = _misfit(model, test)
        if problem:
            found.append(Quality(notes=(f"accuracy not measured: {problem}",)))
            continue
        logits = models.predict_logits(model, test.images, task=f"testing {names[index]}", on_event=on_event)
        if index == 0:
            teacher_logits = logits
        labels = torch.from_numpy(np.asarray(test.labels))
        beside = teacher_logits if index else None
        found.append(
            Quality(
                accuracy=metrics.accuracy(logits, labels),
                source="measured",
                agreement=None if beside is None else metrics.agreement(logits, beside),
                kl=None if beside is None else metrics.divergence(logits, beside),
                ece=metrics.calibration_error(logits, labels),
            )
        )
    return found


def _recorded(model: Classifier | OnnxClassifier) -> Quality:
    """The test accuracy that the file carries, if any."""
    value = model.provenance.get("test_accuracy")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Quality()
    return Quality(accuracy=float(value), source="recorded")


def _misfit(model: Classifier | OnnxClassifier, test: ImageSet) -> str | None:
    if isinstance(model, OnnxClassifier) and model.why_not_runnable:
        return model.why_not_runnable
    reason = incompatibility(model.classes, model.input_size, test)
    return f"it {reason}" if reason else None
