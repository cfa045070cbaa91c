"""A run's own section of the page: what it shows, ready to print."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.deploy.bench import Row
from kdcli.engine import Evaluation
from kdcli.report import inline
from kdcli.report.examine import Disagreement, Examined, recorded_teacher
from kdcli.report.gather import Run

MOST_CLASSES = 40  # rows of a table of classes
MOST_CELLS = 20  # classes of a matrix with figures in it
MOST_PIXELS = 100  # classes of a matrix at all
MOST_PAIRS = 15


@dataclass(frozen=True)
class Section:
    """A run as the page shows it."""

    key: str
    run: Run
    examined: Examined
    evaluation: Any  # measured now, else as recorded: both have accuracy, per_class, confusion …
    row: Row | None


def details_of(section: Section) -> dict[str, Any]:
    """What the page says of one run, ready to print."""
    run, found, evaluation = section.run, section.examined, section.evaluation
    count = len(run.classes)
    teacher = found.teacher.evaluation if found.teacher else None
    matrix = evaluation.confusion
    listed, pair_count = pairs(matrix)
    rows = _class_rows(run.classes, evaluation, teacher)
    source = recorded_teacher(run)[0]
    return {
        "section": section,
        "classes": rows,
        "class_count": count,
        "widest": max((abs(row["difference"] or 0) for row in rows), default=0) or 1,
        "cells": _cells(matrix) if count <= MOST_CELLS else None,
        "heatmap": inline.heatmap(matrix, run.classes, f"{section.key}-confusion", run.name)
        if MOST_CELLS < count <= MOST_PIXELS
        else None,
        "pairs": listed,
        "pair_count": pair_count,
        "calibration": inline.calibration(
            found.bins, found.teacher.bins if found.teacher else (), f"{section.key}-reliability", run.name
        )
        if found.bins
        else None,
        "thumbnails": [_thumbnail(item, run.classes) for item in found.shown],
        "commands": _commands(run, source),
        "missing": missing(section),
    }


def _class_rows(classes: Sequence[str], student: Any, teacher: Evaluation | None) -> list[dict[str, Any]]:
    """A row for each class; of many, those with the largest difference, or without a teacher the lowest accuracy."""
    rows = []
    for index, name in enumerate(classes):
        own = student.per_class[index]
        other = teacher.per_class[index] if teacher else None
        rows.append(
            {
                "index": index,
                "name": name,
                "count": sum(student.confusion[index]),
                "student": own,
                "teacher": other,
                "difference": own - other if own is not None and other is not None else None,
            }
        )
    if len(rows) <= MOST_CLASSES:
        return rows
    if teacher:
        return sorted(rows, key=lambda row: -abs(row["difference"] or 0))[:MOST_CLASSES]
    return sorted(rows, key=lambda row: 101 if row["student"] is None else row["student"])[:MOST_CLASSES]


def _cells(matrix: Sequence[Sequence[int]]) -> list[list[dict[str, Any]]]:
    """Counts with how strongly to tint them."""
    table = []
    for true, row in enumerate(matrix):
        total = max(1, sum(row))
        table.append(
            [
                {"count": count, "tint": f"{0.62 * (count / total) ** 0.5:.3f}", "right": true == predicted}
                for predicted, count in enumerate(row)
            ]
        )
    return table


def _thumbnail(item: Disagreement, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "item": item,
        "label": classes[item.label],
        "student": classes[item.student],
        "teacher": classes[item.teacher],
    }


def _commands(run: Run, teacher: Path | None) -> list[str]:
    student = path_word(run.student)
    compared = [path_word(teacher)] if teacher is not None else []
    return [
        command(["kd", "train", "--config", path_word(run.folder / "config.toml")]),
        command(["kd", "test", student]),
        command(["kd", "export", student]),
        command(["kd", "bench", *compared, student]),
    ]


def command(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def path_word(path: Path) -> str:
    """A path as a word of a command; one that begins with a hyphen would be an option."""
    text = path.as_posix()
    return f"./{text}" if text.startswith("-") else text


def missing(section: Section) -> list[str]:
    """What this run's part of the page lacks, and why."""
    found = section.examined
    lines = list(section.run.problems)
    if found.why_not:
        lines.append(
            f"Not measured on test images now: {found.why_not}. Figures are those recorded when it ended."
        )
    elif found.why_no_teacher:
        lines.append(f"No comparison with a teacher. {found.why_no_teacher}")
    return lines + list(found.notes)


def pairs(
    confusion: Sequence[Sequence[int]], most: int = MOST_PAIRS
) -> tuple[list[tuple[int, int, int, float]], int]:
    """The most frequent confusions (true, predicted, count, per cent of the true class), and how many there are."""
    counts = np.asarray(confusion, dtype=np.int64)
    totals = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    found = np.flatnonzero(counts)
    order = found[np.argsort(-counts.ravel()[found], kind="stable")][:most]
    width = len(counts)
    return (
        [
            (
                int(at // width),
                int(at % width),
                int(counts.ravel()[at]),
                100 * float(counts.ravel()[at] / totals[at // width]),
            )
            for at in order
        ],
        len(found),
    )
