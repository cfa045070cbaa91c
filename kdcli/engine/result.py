"""What a run has to say: epoch by epoch, and at its end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kdcli.config import TrainConfig
from kdcli.engine.evaluate import Evaluation
from kdcli.engine.run_dir import RunDir


@dataclass(frozen=True)
class Epoch:
    """One line of `metrics.jsonl`. Losses are means over the epoch, accuracy is in per cent."""

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
        seconds: wall time of training, without the teacher's passes.
    """

    run: RunDir
    config: TrainConfig
    evaluation: Evaluation
    val_accuracy: float | None
    epochs: tuple[Epoch, ...]
    parameters: int
    teacher_passes: int
    seconds: float
    images_per_s: float

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
        }
