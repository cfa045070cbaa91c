"""Figures by hand."""

from __future__ import annotations

import math

import pytest
import torch

from kdcli.base import metrics

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [1.0, 3.0, 2.0], [5.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 1, 1, 2])


def test_accuracy_and_top_k() -> None:
    assert metrics.accuracy(LOGITS, LABELS) == 50.0
    assert metrics.accuracy(LOGITS, LABELS, 2) == 75.0
    assert metrics.accuracy(LOGITS, LABELS, 5) == 100.0  # fewer classes than k


def test_agreement_and_divergence() -> None:
    assert metrics.agreement(LOGITS, LOGITS + 7) == 100.0
    assert metrics.agreement(LOGITS, LOGITS.flip(1)) == 25.0  # only the third keeps its middle class
    assert metrics.divergence(LOGITS, LOGITS - 3) == pytest.approx(0, abs=1e-12)
    # teacher (¾, ¼), student (½, ½): ¾ log 1.5 + ¼ log 0.5
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    assert metrics.divergence(student, teacher) == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6
    )


def test_calibration_error() -> None:
    # two samples at confidence ¾, one right: |½ − ¾|
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    assert metrics.calibration_error(logits, torch.tensor([0, 1])) == pytest.approx(25.0, rel=1e-6)


def test_confusion_lists_true_predicted_and_count() -> None:
    assert metrics.confusion(LOGITS, LABELS).tolist() == [[0, 0, 1], [1, 1, 1], [1, 2, 1], [2, 0, 1]]
    twice = metrics.confusion(LOGITS.repeat(2, 1), LABELS.repeat(2))
    assert twice.tolist() == [[0, 0, 2], [1, 1, 2], [1, 2, 2], [2, 0, 2]]


def test_wilson_interval() -> None:
    # Newcombe 1998, table I: 81 of 263, without continuity correction: 0.2553 to 0.3662
    low, high = metrics.wilson_interval(100 * 81 / 263, 263)
    assert low == pytest.approx(25.53, abs=0.01)
    assert high == pytest.approx(36.62, abs=0.01)
    assert metrics.wilson_interval(100, 10)[1] == pytest.approx(100)


def test_wilson_interval_stays_within_0_and_100() -> None:
    assert metrics.wilson_interval(0, 7)[0] == 0
    assert metrics.wilson_interval(100, 7)[1] == 100
