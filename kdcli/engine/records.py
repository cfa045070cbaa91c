"""Figures of models and runs: measured, and written to and read from `result.json` and `metrics.jsonl`.

Files are untrusted: all readers raise `KdError` with a message of one line if one is missing, too large, no
JSON, or has values that no run writes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    computed_field,
    model_validator,
)
from torch import Tensor

from kdcli import models
from kdcli.base import metrics
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, ignore
from kdcli.base.files import MAX_JSON_BYTES, read_bytes, write_text
from kdcli.base.results import Count, Finite, NonNegative, Percent, Result, invalid
from kdcli.data import ImageSet, overlap_warning
from kdcli.engine.run_dir import RunDir
from kdcli.methods import TrainConfig

MOST_BYTES = MAX_JSON_BYTES  # of each file; a cell of the confusion matrix takes 30
_HINT = "Name the folder of a finished run."

Folder = Annotated[
    RunDir,
    BeforeValidator(lambda value: RunDir(Path(value)) if isinstance(value, str) else value),
    PlainSerializer(lambda run: run.path.as_posix()),
]


class Record(Result, BaseModel):
    """Base of the schemas: values of exact types, frozen."""

    model_config = ConfigDict(strict=True, frozen=True)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump()


R = TypeVar("R")


class Metrics(Record):
    """A line of `metrics.jsonl`; `loss` and the unweighted `terms` are means over its images."""

    kind: Literal["step", "epoch"]  # `step`: the steps since the line before; `epoch`: a whole epoch
    epoch: Annotated[int, Field(ge=1, lt=2**31)]  # number of the epoch, from 1
    step: Count  # steps done in all
    loss: Finite
    terms: dict[str, Finite]
    val_accuracy: Percent | None
    lr: Finite  # of the last step
    images_per_s: Finite
    seconds: NonNegative  # of training so far


class Evaluation(Record):
    """Figures of a model on a data set. Shares in per cent, `loss` and `divergence` in nats.

    Attributes:
        accuracy_interval: 95 % Wilson interval: the chance of the test sample, not of the training run.
        per_class: accuracy of each class, in class order; None for a class without samples.
        confusion: the cells of the confusion matrix that are not 0: class, predicted class, number of images.
    """

    count: Annotated[int, Field(ge=1, lt=2**53)]
    accuracy: Percent
    accuracy_interval: tuple[Percent, Percent]
    top5: Percent
    loss: Finite
    calibration_error: NonNegative  # expected calibration error (Guo et al. 2017)
    per_class: tuple[Percent | None, ...]
    confusion: tuple[tuple[Count, Count, Annotated[int, Field(ge=1, lt=2**53)]], ...]
    agreement: Percent | None = None
    divergence: Finite | None = None
    teacher_accuracy: Percent | None = None

    @model_validator(mode="after")
    def _confusion_is_of_these_classes(self) -> Evaluation:
        if any(max(true, predicted) >= len(self.per_class) for true, predicted, _ in self.confusion):
            raise ValueError("confusion must be of these classes")
        return self

    def matrix(self) -> npt.NDArray[np.int64]:
        """The confusion matrix (classes, classes): row true, column predicted."""
        counts = np.zeros((len(self.per_class), len(self.per_class)), dtype=np.int64)
        for true, predicted, count in self.confusion:
            counts[true, predicted] = count
        return counts


class Unlabelled(Record):
    """The images without labels that a run trained on."""

    spec: str | None
    count: Count
    fingerprint: str


class TeacherCheck(Record):
    """Metrics of the teacher before training, on samples of the images, in per cent."""

    images: Count  # number of training images in the sample
    views: Percent  # accuracy on the first views of these, as the student sees them
    views_calibration_error: NonNegative
    plain: Percent  # accuracy on the same images without augmentation
    validation: Percent | None  # accuracy on the validation split; None without one
    validation_calibration_error: NonNegative | None
    warning: str | None = None  # why labels alone may do better; None otherwise

    @property
    def summary(self) -> str:
        """The figures, one line."""
        held_out = ""
        if self.validation is not None:
            error = f"calibration error {self.validation_calibration_error:.1f} %"
            held_out = f", on validation images {self.validation:.1f} % ({error})"
        return (
            f"teacher's accuracy on training views {self.views:.1f} % (calibration error "
            f"{self.views_calibration_error:.1f} %), without augmentation {self.plain:.1f} %{held_out}"
        )


class RunResult(Record):
    """`result.json`: a finished run.

    Attributes:
        test: figures on the test images; None for a trial of a search, which does not read them.
        test_fraction: share of the images that the test split took, where the data had none; else None.
        teacher_passes: runs of the teacher over a data set that this run had to make; 0 with a warm cache.
        resumed_with_differences: see `identity.differences`; empty if it has the bits of an uninterrupted run.
    """

    schema_version: Literal[2] = 2  # 1: the whole confusion matrix
    run: Folder  # its folder
    method: str
    student: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    epochs: Count  # passes over the training images; `history` has a line for each
    parameters: Count  # of the student
    val_accuracy: Percent | None  # of the last epoch, on `val_images` images; None without a validation split
    val_images: Count = 0
    test: Evaluation | None
    test_in_train: Count = 0  # number of test images that are training images too
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    teacher: TeacherCheck | None = None  # its figures before training
    teacher_passes: Count
    seconds: NonNegative  # wall time of training, without the teacher's passes
    images_per_s: NonNegative
    unlabelled: Unlabelled | None = None
    resumed_with_differences: tuple[str, ...] = ()

    @property
    def evaluation(self) -> Evaluation:
        """Figures on the test images; a KdError if the run has not read them, as trials of kd tune."""
        if self.test is None:
            raise KdError(f"{self.run.path} has no test figures", "Use a run of kd train or kd compare.")
        return self.test

    @computed_field  # type: ignore[prop-decorator]
    @property
    def warning(self) -> str | None:
        """Warning beside the test accuracy, see `overlap_warning`."""
        return overlap_warning(self.test_in_train, self.test.count) if self.test else None

    @property
    def config(self) -> TrainConfig:
        """Settings of the run, from its `config.toml`."""
        return self.run.read_config()

    @property
    def history(self) -> list[Metrics]:
        """A line for each epoch, from its `metrics.jsonl`."""
        return epoch_lines(self.run.metrics_file)


def measure(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> Evaluation:
    """Figures from logits (N, C), labels (N,) and, if given, the teacher's logits (N, C)."""
    right = logits.argmax(dim=1) == labels
    classes = logits.shape[1]
    shares = 100 * labels[right].bincount(minlength=classes).double() / labels.bincount(minlength=classes)
    accuracy = metrics.accuracy(logits, labels)
    return Evaluation.model_construct(  # without a check: figures of a broken network may be NaN
        count=len(labels),
        accuracy=accuracy,
        accuracy_interval=metrics.wilson_interval(accuracy, len(labels)),
        top5=metrics.accuracy(logits, labels, 5),
        loss=metrics.cross_entropy(logits, labels),
        calibration_error=metrics.calibration_error(logits, labels),
        per_class=tuple(None if math.isnan(share) else share for share in shares.tolist()),  # NaN: no samples
        confusion=tuple(map(tuple, metrics.confusion(logits, labels).tolist())),
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
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Run a model (in eval mode, from uint8 (B, H, W, C) to logits) over a data set and measure it."""
    logits = models.predict_logits(model, data.images, task=task, on_event=on_event)
    return measure(logits, torch.tensor(data.labels), teacher_logits)


def read_result(path: Path) -> RunResult:
    """A `result.json`; its `run` is the folder where the file lies."""
    result = read_record(RunResult, path)
    return result.model_copy(update={"run": RunDir(path.parent)})


def read_record(schema: type[R], path: Path) -> R:
    """A JSON file of one record, of a dataclass whose fields have such types too."""
    return _parse(schema, str(path), read_bytes(path, MOST_BYTES, _HINT))


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a `metrics.jsonl`, without a last one that a kill has cut short."""
    lines = read_bytes(path, MOST_BYTES, _HINT).splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_parse(Metrics, f"{path}: line {number}", line))
        except KdError:
            if number < len(lines):
                raise
    return found


def epoch_lines(path: Path) -> list[Metrics]:
    """The lines of whole epochs of a `metrics.jsonl`, by number; of an epoch that was done twice the last."""
    found = {line.epoch: line for line in read_metrics(path) if line.kind == "epoch"}
    return [found[number] for number in sorted(found)]


def append_metrics(path: Path, line: Metrics) -> None:
    """Add a line and flush it to the disk, so that no saved state is newer than the metrics."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(line.to_dict()) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def cut_metrics(path: Path, step: int, epoch: int) -> None:
    """Drop the lines that a resumed run will repeat: beyond a step, and of unfinished epochs."""
    lines = read_metrics(path) if path.exists() else []
    kept = [line for line in lines if line.step <= step and (line.kind == "step" or line.epoch <= epoch)]
    write_text(path, "".join(json.dumps(line.to_dict()) + "\n" for line in kept))


def _parse(schema: type[R], name: str, content: bytes) -> R:
    try:
        return TypeAdapter(schema).validate_json(content)
    except ValidationError as error:
        raise KdError(f"{name}: {invalid(error)}", "Another version of kd may have written it.") from error
