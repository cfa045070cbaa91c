"""Measurement of students and teachers on test images: figures beyond the records of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcli import data, models
from kdcli.base import metrics
from kdcli.base.config import NO_ASSUMPTIONS, ReportConfig
from kdcli.base.errors import KdError
from kdcli.base.events import Event, OnEvent, Progress
from kdcli.base.files import is_unchanged, regular_size, sha256_file
from kdcli.data import ImageSet, rows
from kdcli.deploy.bench import Row
from kdcli.deploy.load import teachers_of
from kdcli.engine.records import Evaluation, measure
from kdcli.report.gather import Run
from kdcli.teacher import Teacher


@dataclass(frozen=True)
class ConfidenceBin:
    """Images of one range of confidence: their number, mean confidence and accuracy, in per cent."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class TeacherFigures:
    """A teacher's figures, shared by all runs compared with it."""

    path: Path
    sha256: str
    evaluation: Evaluation
    bins: tuple[ConfidenceBin, ...]


@dataclass(frozen=True)
class Examined:
    """A run and its figures.

    Attributes:
        other_teacher: whether the run learned from labels alone and `teacher` is that of the other runs.
        outcomes: number of images where both are right, only the student, only the teacher, neither.
    """

    run: Run
    evaluation: Evaluation  # as `kd test` measures it, or as recorded, with the reason in `unmeasured`
    unmeasured: str = ""
    sha256: str = ""  # of the student; empty where it was not measured
    label: str = ""  # of the data
    bins: tuple[ConfidenceBin, ...] = ()  # those of confidence that have images
    teacher: TeacherFigures | None = None  # None with the reason in `no_teacher`
    no_teacher: str = ""
    other_teacher: bool = False
    is_teacher: bool = False  # whether other runs learned from this run's student
    outcomes: tuple[int, ...] = ()
    disagreements: int = 0  # number of images with different predictions; `examples` are some of them
    examples: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()  # remarks on these figures
    key: str = ""  # HTML id
    row: Row | None = None  # latency and size


def examine(runs: Sequence[Run], config: ReportConfig, on_event: OnEvent) -> list[Examined]:
    """Evaluate every student, and each teacher once, on the test images of its data."""
    examiner = _Examiner(runs, config, on_event)
    found: list[Examined] = []
    for run in runs:
        on_event(Progress("report", len(found), len(runs), "runs"))
        try:
            found.append(examiner.examine(run))
        except KdError as error:
            found.append(Examined(run, run.result.evaluation, unmeasured=error.message))
    return found


def choose(sections: Sequence[Examined]) -> dict[str, Any]:
    """Template values of the student with the highest validation accuracy; no choice depends on test data.

    None is chosen where the next one is within a standard error of the difference of two binomial shares.
    """
    results = [section.run.result for section in sections]
    known = [
        (result.val_accuracy, result.val_images, section)
        for result, section in zip(results, sections, strict=True)
        if result.val_accuracy is not None and not section.is_teacher
    ]
    known.sort(key=lambda one: -one[0])
    if len(known) < 2:
        return {"best": known[0][2] if known else None, "undecided": None}
    (first, images, best), (second, _, _) = known[:2]
    error = math.sqrt((first * (100 - first) + second * (100 - second)) / max(images, 1))
    decided = first - second > error
    return {"best": best if decided else None, "undecided": None if decided else (images, known[:2])}


def reliability(logits: Tensor, labels: Tensor) -> tuple[ConfidenceBin, ...]:
    """Accuracy over confidence in the equally wide bins of the calibration error (Guo et al. 2017); logits (N, C)."""
    rows = metrics.confidence_bins(logits, labels).T.tolist()
    width = 100 / len(rows)
    return tuple(
        ConfidenceBin(width * n, width * (n + 1), int(count), 100 * sure / count, 100 * right / count)
        for n, (count, sure, right) in enumerate(rows)
        if count
    )


def recorded_teacher(run: Run) -> tuple[Path | None, str]:
    """Path and SHA-256 of the teacher a run learned from; None for no teacher or several."""
    found = teachers_of(run.provenance, run.student)
    return found[0][:2] if len(found) == 1 else (None, "")


class _Examiner:
    """Evaluations of a page's runs; data sets, hashes and teachers are loaded once."""

    def __init__(self, runs: Sequence[Run], config: ReportConfig, on_event: OnEvent) -> None:
        self.config = config
        self.on_event = on_event
        self.sha256, self.unchanged = cache(sha256_file), cache(is_unchanged)
        self.load = cache(partial(data.load, on_event=self._progress))
        self.evaluated: dict[tuple[str, str], tuple[Tensor, TeacherFigures]] = {}
        self.teachers = {sha256: path for path, sha256 in map(recorded_teacher, runs) if path is not None}
        self.inputs = {
            known.sha256: known.inputs for run in runs for known in teachers_of(run.provenance, run.student)
        }
        if config.teacher is not None:
            self.teachers = {self.sha256(config.teacher): config.teacher}

    def examine(self, run: Run) -> Examined:
        """Evaluate one run; a KdError if model or data cannot be read."""
        # 1. The student on the test images of its data
        model = models.load(run.student)
        splits = self.load(**data.source_for(model, self.config))
        test = splits.test
        if problem := data.incompatibility(model, test):
            raise KdError(f"the student {problem}")
        labels = torch.tensor(test.labels)
        logits = models.predict_logits(
            model, test.images, task=f"testing {run.name}", on_event=self._progress
        )
        changed = data.changed_test_images(run.provenance, test)
        found = Examined(run, measure(logits, labels), sha256=self.sha256(run.student), label=splits.label)
        found = replace(found, bins=reliability(logits, labels), notes=(changed,) if changed else ())
        # 2. Its teacher on the same images
        try:
            teacher_logits, figures = self._teacher(self._teacher_of(run), test)
        except KdError as error:
            is_teacher = found.sha256 in self.teachers
            return replace(found, is_teacher=is_teacher, no_teacher="" if is_teacher else error.message)
        # 3. Images with different predictions
        predicted, expected = logits.argmax(dim=1), teacher_logits.argmax(dim=1)
        own, other = predicted == labels, expected == labels
        different = (predicted != expected).nonzero().flatten().numpy()
        limit = min(self.config.thumbnails, len(different))
        evenly_spaced = np.linspace(0, len(different) - 1, limit).round().astype(np.int64)
        return replace(
            found,
            evaluation=measure(logits, labels, teacher_logits),
            teacher=figures,
            other_teacher=recorded_teacher(run)[0] is None,
            outcomes=tuple(int(n.sum()) for n in (own & other, own & ~other, ~own & other, ~own & ~other)),
            disagreements=len(different),
            examples=_examples(
                test, different[evenly_spaced], {"student": logits, "teacher": teacher_logits}
            ),
        )

    def _progress(self, event: Event) -> None:
        """Pass progress on; notes of single models would clutter the terminal."""
        if isinstance(event, Progress):
            self.on_event(event)

    def _teacher_of(self, run: Run) -> Path:
        """The teacher to compare with: --teacher, the run's own, or the only one that other runs learned from."""
        path, sha256 = recorded_teacher(run)
        if self.config.teacher is not None or path is None:
            if len(self.teachers) != 1:
                learned = "several teachers" if len(teachers_of(run.provenance)) > 1 else "no teacher"
                raise KdError(f"It learned from {learned}; pass one with --teacher to compare with it.")
            [(sha256, path)] = self.teachers.items()
        if regular_size(path) < 0:
            raise KdError(f"The teacher {path} does not exist; pass it with --teacher.")
        if not self.unchanged(path, sha256):
            raise KdError(f"{path} is not the teacher this run learned from; pass that with --teacher.")
        if sha256 == self.sha256(run.student):
            raise KdError("It is the teacher.")
        return path

    def _teacher(self, path: Path, test: ImageSet) -> tuple[Tensor, TeacherFigures]:
        """Test logits (N, C) and figures of a teacher."""
        key = (self.sha256(path), test.fingerprint)
        if key not in self.evaluated:
            teacher = Teacher.open(
                path,
                self.config.cache_dir,
                threads=self.config.threads,
                assumed=self.inputs.get(key[0], NO_ASSUMPTIONS),
                data=test,
            )
            logits, labels = teacher.test_logits(test, self._progress), torch.tensor(test.labels)
            assert logits is not None
            figures = TeacherFigures(path, key[0], measure(logits, labels), reliability(logits, labels))
            self.evaluated[key] = logits, figures
        return self.evaluated[key]


def _examples(
    images: ImageSet, numbers: npt.NDArray[np.int64], outputs: dict[str, Tensor]
) -> tuple[dict[str, Any], ...]:
    """Template values of these images: pixels (H, W, C), label, and each model's class and its probability, %."""
    examples = []
    for number, pixels in zip(map(int, numbers), rows.take(images.images, numbers), strict=True):
        predictions = []
        for model, logits in outputs.items():
            probability, predicted = logits[number].double().softmax(dim=0).max(dim=0)
            predictions.append((model, int(predicted), 100 * probability.item()))
        label = int(images.labels[number])
        examples.append({"number": number, "pixels": pixels, "label": label, "predictions": predictions})
    return tuple(examples)
