"""The section of one run: values for the template."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from kdcli.base.plotting import shown
from kdcli.deploy.bench import Row
from kdcli.engine.records import Evaluation
from kdcli.report import page_figures
from kdcli.report.examine import Examined, recorded_teacher
from kdcli.report.figures import confusion
from kdcli.report.gather import Run
from kdcli.report.page_figures import embed

MAX_CLASSES = 40  # rows of the table of classes
MAX_TABLE = 20  # classes of a confusion matrix as a table of counts
MAX_IMAGE = 100  # classes of a confusion matrix as an image
MAX_PAIRS = 15


@dataclass(frozen=True)
class Section:
    """A run of the page: `key` is its HTML id, `evaluation` is measured now or else as recorded."""

    key: str
    run: Run
    examined: Examined
    evaluation: Evaluation
    row: Row | None


def details_of(section: Section) -> dict[str, Any]:
    """Template values of a run's section."""
    run, found, evaluation = section.run, section.examined, section.evaluation
    teacher = found.teacher
    count = len(run.classes)
    classes = _class_rows(run.classes, evaluation, teacher.evaluation if teacher else None)
    matrix = reliability = None
    if MAX_TABLE < count <= MAX_IMAGE:
        matrix = embed(
            partial(confusion, evaluation.confusion, run.classes),
            f"Confusion matrix of {shown(run.name)}. The table below lists the most frequent confusions.",
        )
    if found.bins:
        reliability = embed(
            partial(page_figures.reliability, found.bins, teacher.bins if teacher else ()),
            f"Reliability diagram of {shown(run.name)}: accuracy over confidence; on the diagonal they are equal. "
            "The table below has the same figures.",
        )
    most_frequent, pair_count = pairs(evaluation.confusion)
    return {
        "section": section,
        "classes": classes,
        "class_count": count,
        "max_difference": max((abs(row["difference"] or 0) for row in classes), default=0) or 1,
        "cells": _cells(evaluation.confusion) if count <= MAX_TABLE else None,
        "matrix": matrix,
        "pairs": most_frequent,
        "pair_count": pair_count,
        "reliability": reliability,
        "commands": _commands(run),
        "missing": missing(section),
    }


def _class_rows(
    classes: Sequence[str], student: Evaluation, teacher: Evaluation | None
) -> list[dict[str, Any]]:
    """A row for each class; of many, those with the largest difference, or without a teacher the lowest accuracy."""
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(classes):
        own = student.per_class[index]
        other = teacher.per_class[index] if teacher else None
        rows.append(
            {
                "name": name,
                "count": sum(student.confusion[index]),
                "student": own,
                "teacher": other,
                "difference": own - other if own is not None and other is not None else None,
            }
        )
    if len(rows) > MAX_CLASSES and teacher:
        rows.sort(key=lambda row: -abs(row["difference"] or 0))
    elif len(rows) > MAX_CLASSES:
        rows.sort(key=lambda row: 101 if row["student"] is None else row["student"])
    return rows[:MAX_CLASSES]


def _cells(matrix: Sequence[Sequence[int]]) -> list[list[dict[str, Any]]]:
    """Counts with the opacity of their cell: the square root makes a share of 2 % visible beside 90 %."""
    return [
        [
            {
                "count": count,
                "opacity": f"{0.62 * (count / max(1, sum(row))) ** 0.5:.3f}",
                "right": true == predicted,
            }
            for predicted, count in enumerate(row)
        ]
        for true, row in enumerate(matrix)
    ]


def _commands(run: Run) -> list[str]:
    teacher, student = recorded_teacher(run)[0], run.student.as_posix()
    compared = [teacher.as_posix()] if teacher is not None else []
    return [
        shlex.join(["kd", "train", "--config", (run.folder / "config.toml").as_posix()]),
        shlex.join(["kd", "test", student]),
        shlex.join(["kd", "export", student]),
        shlex.join(["kd", "bench", *compared, student]),
    ]


def missing(section: Section) -> list[str]:
    """What this section lacks, with the reason, one line each."""
    found = section.examined
    lines = list(section.run.problems)
    if found.unmeasured:
        lines.append(
            f"Not measured on test images now: {found.unmeasured}. "
            "The figures are those recorded when the run ended."
        )
    elif found.no_teacher:
        lines.append(f"No comparison with a teacher. {found.no_teacher}")
    return lines + list(found.notes)


def pairs(
    matrix: Sequence[Sequence[int]], limit: int = MAX_PAIRS
) -> tuple[list[tuple[int, int, int, float]], int]:
    """The most frequent confusions (true, predicted, count, per cent of the true class), and the number of all."""
    counts = np.asarray(matrix, dtype=np.int64)
    totals = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    number = int(np.count_nonzero(counts))
    order = np.argsort(-counts, axis=None, kind="stable")[: min(limit, number)]
    most_frequent = []
    for true, predicted in zip(*np.unravel_index(order, counts.shape), strict=True):
        count = counts[true, predicted]
        most_frequent.append((int(true), int(predicted), int(count), float(100 * count / totals[true])))
    return most_frequent, number
