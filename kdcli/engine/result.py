"""What a run has to say: epoch by epoch, and at its end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kdcli.config import TrainConfig
from kdcli.engine.evaluate import Evaluation
from kdcli.engine.run_dir import RunDir


@dataclass(frozen=True)
class Metrics:
    """One line of `metrics.jsonl`.

    Attributes:
        kind: `step`: of the steps since the line before; `epoch`: of a whole pass.
        epoch: the pass it belongs to, from 1.
        step: steps done in all.
        loss, terms: means over these images.
        val_accuracy: in per cent, of an epoch; None without a validation split, and in a line of steps.
        lr: of the last step.
        seconds: of training so far.
    """

    kind: str
    epoch: int
    step: int
    loss: float
    terms: dict[str, float]
    val_accuracy: float | None
    lr: float
    images_per_s: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Result:
    """What a finished run has to say.

    Attributes:
        teacher_passes: runs of the teacher over a data set that this run had to make; 0 with a warm cache.
        epochs: a line each, those before a resume included.
        seconds: wall time of training, without the teacher's passes.
        unlabelled: path, count and fingerprint of the images without labels; None without any.
        marks: what was different when the run was resumed; empty if it is what an uninterrupted run would be.
    """

    run: RunDir
    config: TrainConfig
    evaluation: Evaluation
    val_accuracy: float | None
    epochs: tuple[Metrics, ...]
    parameters: int
    teacher_passes: int
    seconds: float
    images_per_s: float
    marks: tuple[str, ...] = field(default=())
    unlabelled: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; the curve is in metrics.jsonl."""
        return {
            "run": self.run.path.as_posix(),
            "method": self.config.method,
            "student": self.config.student,
            "seed": self.config.seed,
            "epochs": self.config.epochs,
            "parameters": self.parameters,
            "val_accuracy": self.val_accuracy,
            "test": self.evaluation.to_json(),
            "teacher_passes": self.teacher_passes,
            "seconds": self.seconds,
            "images_per_s": self.images_per_s,
            "unlabelled": self.unlabelled,
            "resumed_with_differences": list(self.marks),
        }
