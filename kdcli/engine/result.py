"""What a run has to say: epoch by epoch, and at its end."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from kdcli.base.errors import KdError
from kdcli.engine.evaluate import Evaluation
from kdcli.engine.run_dir import RunDir
from kdcli.methods import TrainConfig


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
        tested: figures on the test images; None of a run that was not to read them.
        teacher_passes: runs of the teacher over a data set that this run had to make; 0 with a warm cache.
        epochs: a line each, those before a resume included.
        seconds: wall time of training, without the teacher's passes.
        unlabelled: path, count and fingerprint of the images without labels; None without any.
        marks: what was different when the run was resumed; empty if it is what an uninterrupted run would be.
    """

    run: RunDir
    config: TrainConfig
    tested: Evaluation | None
    val_accuracy: float | None
    epochs: tuple[Metrics, ...]
    parameters: int
    teacher_passes: int
    seconds: float
    images_per_s: float
    marks: tuple[str, ...] = field(default=())
    unlabelled: dict[str, Any] | None = None

    @classmethod
    def read(cls, run: RunDir) -> Result:
        """What a finished run has said.

        Raises:
            KdError: its files are not those of a finished run.
        """
        try:
            told = json.loads(run.result_file.read_text(encoding="utf-8"))
            return cls(
                run=run,
                config=run.read_config(),
                tested=Evaluation.from_json(told["test"]),
                val_accuracy=told["val_accuracy"],
                epochs=tuple(Metrics(**line) for line in run.read_metrics() if line["kind"] == "epoch"),
                parameters=told["parameters"],
                teacher_passes=told["teacher_passes"],
                seconds=told["seconds"],
                images_per_s=told["images_per_s"],
                marks=tuple(told["resumed_with_differences"]),
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise KdError(
                f"{run.result_file} cannot be read: {error}", "Remove the run, and start anew."
            ) from error

    @property
    def evaluation(self) -> Evaluation:
        """Figures on the test images, of a run that has read them."""
        if self.tested is None:
            raise RuntimeError("this run has not read the test images")
        return self.tested

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
            "test": self.tested.to_json() if self.tested else None,
            "teacher_passes": self.teacher_passes,
            "seconds": self.seconds,
            "images_per_s": self.images_per_s,
            "unlabelled": self.unlabelled,
            "resumed_with_differences": list(self.marks),
        }
