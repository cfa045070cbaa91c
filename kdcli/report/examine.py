"""Students and teachers on the test images: what a page can only show with models and data at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcli import data, models
from kdcli.base.config import ReportConfig
from kdcli.base.errors import KdError
from kdcli.base.events import Event, OnEvent, Progress
from kdcli.base.files import sha256_file
from kdcli.data import Splits, rows
from kdcli.engine import Evaluation, measure
from kdcli.report.gather import Run
from kdcli.teacher import Teacher
from kdcli.teacher.recorded import teachers_of

MOST_CLASSES = 5_000  # a confusion matrix of more is gigabytes
BINS = 15  # as metrics.calibration_error


@dataclass(frozen=True)
class Bin:
    """Images of one range of confidence: how many, their mean confidence and their accuracy, in per cent."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Disagreement:
    """One test image that student and teacher call differently; probabilities in per cent."""

    number: int
    pixels: npt.NDArray[np.uint8]  # (H, W, C)
    label: int
    student: int
    student_probability: float
    teacher: int
    teacher_probability: float


@dataclass(frozen=True)
class TeacherFigures:
    """The teacher's side, once for all runs that share it."""

    path: Path
    sha256: str
    evaluation: Evaluation
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Examined:
    """What was measured now of one run.

    Attributes:
        label: of the data.
        evaluation: as `kd test` measures it; None where `why_not` says so.
        bins: of confidence, only those with images.
        teacher: None where `why_no_teacher` says so.
        borrowed: the run learned from no teacher; it is compared with that of the others.
        outcomes: images both right, only the student, only the teacher, both wrong.
        disagreements: how many; `shown` are some of them.
        notes: what to know about these figures.
    """

    label: str = ""
    evaluation: Evaluation | None = None
    why_not: str = ""
    bins: tuple[Bin, ...] = ()
    teacher: TeacherFigures | None = None
    why_no_teacher: str = ""
    borrowed: bool = False
    is_teacher: bool = False
    outcomes: tuple[int, int, int, int] | None = None
    disagreements: int = 0
    shown: tuple[Disagreement, ...] = ()
    notes: tuple[str, ...] = ()


def examine(runs: Sequence[Run], config: ReportConfig, on_event: OnEvent) -> list[Examined]:
    """Run every student, and each teacher once, on the test images of its data."""
    return _Examiner(runs, config, on_event).all()


def reliability(logits: Tensor, labels: Tensor) -> tuple[Bin, ...]:
    """Accuracy by confidence, equal-width bins as of the calibration error; logits (N, C), labels (N,)."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    correct = (predicted == labels).double()
    index = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    found = []
    for number in range(BINS):
        inside = index == number
        count = int(inside.sum())
        if count:
            found.append(
                Bin(
                    100 * number / BINS,
                    100 * (number + 1) / BINS,
                    count,
                    100 * confidence[inside].mean().item(),
                    100 * correct[inside].mean().item(),
                )
            )
    return tuple(found)


def spread(count: int, wanted: int) -> npt.NDArray[np.int64]:
    """`wanted` numbers below `count`, evenly apart, the first and last among them; all if there are no more."""
    if count <= wanted:
        return np.arange(count)
    return np.linspace(0, count - 1, wanted).round().astype(np.int64)


@dataclass
class _Examiner:
    runs: Sequence[Run]
    config: ReportConfig
    on_event: OnEvent
    loaded: dict[Any, Splits] = field(default_factory=dict)
    teachers: dict[tuple[str, str], tuple[Tensor, TeacherFigures]] = field(default_factory=dict)
    hashes: dict[Path, str] = field(default_factory=dict)

    def all(self) -> list[Examined]:
        found: list[Examined] = []
        for run in self.runs:
            self.on_event(Progress("report", len(found), len(self.runs), "runs"))
            try:
                found.append(self._one(run))
            except KdError as error:
                found.append(Examined(why_not=error.message))
        return found

    def _one(self, run: Run) -> Examined:
        classes = len(run.classes)
        if classes > MOST_CLASSES:
            return Examined(
                why_not=f"{classes:,} classes are more than the {MOST_CLASSES:,} a report measures"
            )
        spec, skip_broken = data.source_for(
            run.student, run.provenance, self.config.data, self.config.skip_broken
        )
        model = models.load(run.student)
        splits = self._splits(spec, model.input_size, skip_broken)
        test = splits.test
        if reason := data.incompatibility(model.classes, model.input_size, test):
            return Examined(why_not=f"the student {reason}")
        labels = torch.tensor(test.labels)
        logits = models.predict_logits(model, test.images, task=f"testing {run.name}", on_event=self._tell)
        notes = []
        recorded = run.provenance.get("data")
        if isinstance(recorded, dict) and recorded.get("fingerprint_test") != test.fingerprint:
            notes.append("These are not the test images that were measured when the run ended.")
        path, own, why = self._teacher_of(run)
        kept = None
        if path is not None:
            try:
                kept = self._teacher(path, test)
            except KdError as error:
                why = error.message
        base = Examined(label=splits.label, bins=reliability(logits, labels), notes=tuple(notes))
        if kept is None:
            evaluation = measure(logits, labels)
            is_teacher = self._hash(run.student) in self._named_teachers()
            return replace(
                base,
                evaluation=evaluation,
                is_teacher=is_teacher,
                why_no_teacher="" if is_teacher else why,
            )
        teacher_logits, figures = kept
        right = (logits.argmax(dim=1) == labels).long()
        teacher_right = (teacher_logits.argmax(dim=1) == labels).long()
        cells = Counter(zip(right.tolist(), teacher_right.tolist(), strict=True))
        different = (logits.argmax(dim=1) != teacher_logits.argmax(dim=1)).nonzero().flatten().numpy()
        return replace(
            base,
            evaluation=measure(logits, labels, teacher_logits),
            teacher=figures,
            borrowed=not own,
            outcomes=(cells[1, 1], cells[1, 0], cells[0, 1], cells[0, 0]),
            disagreements=len(different),
            shown=()
            if self.config.no_images
            else _pictures(
                splits, logits, teacher_logits, different[spread(len(different), self.config.thumbnails)]
            ),
        )

    def _splits(self, spec: str, size: tuple[int, int, int], skip_broken: bool) -> Splits:
        key = (spec, size, skip_broken)
        if key not in self.loaded:
            self.loaded[key] = data.load(
                spec,
                data_dir=self.config.data_dir,
                cache_dir=self.config.cache_dir,
                fit_to=size,
                skip_broken=skip_broken,
                on_event=self._tell,
            )
        return self.loaded[key]

    def _tell(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.on_event(event)

    def _hash(self, path: Path) -> str:
        if path not in self.hashes:
            self.hashes[path] = sha256_file(path)
        return self.hashes[path]

    def _named_teachers(self) -> dict[str, Path]:
        """SHA-256 and path of every teacher that a run learned from."""
        if self.config.teacher is not None:
            return (
                {self._hash(self.config.teacher): self.config.teacher}
                if self.config.teacher.is_file()
                else {}
            )
        return {
            sha256: path for run in self.runs for path, sha256 in [recorded_teacher(run)] if path is not None
        }

    def _teacher_of(self, run: Run) -> tuple[Path | None, bool, str]:
        """The teacher to compare with, whether it is the run's own, and why there is none."""
        path, sha256 = recorded_teacher(run)
        own = path is not None
        if self.config.teacher is not None:
            path, sha256 = self.config.teacher, ""
        elif path is None:
            named = self._named_teachers()
            if len(named) != 1:
                learned = "several teachers" if len(teachers_of(run.provenance)) > 1 else "no teacher"
                return None, False, f"It learned from {learned}; --teacher names one to compare with."
            [(sha256, path)] = named.items()
        if not path.is_file():
            return None, own, f"The teacher {path} is not here; --teacher names it."
        if sha256 and self._hash(path) != sha256:
            return None, own, f"{path} is not the teacher this run learned from; --teacher names one."
        if self._hash(path) == self._hash(run.student):
            return None, own, "It is the teacher."
        return path, own, ""

    def _teacher(self, path: Path, test: data.ImageSet) -> tuple[Tensor, TeacherFigures]:
        key = (self._hash(path), test.fingerprint)
        if key not in self.teachers:
            kept = Teacher.open(path, self.config.cache_dir, threads=self.config.threads).logits(
                test, exact=True, task="teacher on test images", on_event=self._tell
            )
            logits = kept[0].logits()
            labels = torch.tensor(test.labels)
            figures = TeacherFigures(path, key[0], measure(logits, labels), reliability(logits, labels))
            self.teachers[key] = logits, figures
        return self.teachers[key]


def recorded_teacher(run: Run) -> tuple[Path | None, str]:
    """Path and SHA-256 of the teacher that a run learned from; None where there was none, or several."""
    found = teachers_of(run.provenance)
    return found[0] if len(found) == 1 else (None, "")


def _pictures(
    splits: Splits, logits: Tensor, teacher_logits: Tensor, numbers: npt.NDArray[np.int64]
) -> tuple[Disagreement, ...]:
    if not len(numbers):
        return ()
    pixels = rows.take(splits.test.images, numbers)
    student = logits[numbers].double().softmax(dim=1).max(dim=1)
    teacher = teacher_logits[numbers].double().softmax(dim=1).max(dim=1)
    return tuple(
        Disagreement(
            int(number),
            pixels[place],
            int(splits.test.labels[number]),
            int(student.indices[place]),
            100 * student.values[place].item(),
            int(teacher.indices[place]),
            100 * teacher.values[place].item(),
        )
        for place, number in enumerate(numbers)
    )
