"""`kd test`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.base.config import TestConfig
from kdcli.base.errors import UsageError
from kdcli.cli import output
from kdcli.cli.arguments import data_for, existing_model
from kdcli.cli.options import command, examples

if TYPE_CHECKING:
    from kdcli.base.config import InputSettings
    from kdcli.data import Splits
    from kdcli.deploy.load import RecordedTeacher
    from kdcli.deploy.onnx_model import OnnxClassifier
    from kdcli.engine import Evaluation
    from kdcli.models import Classifier

_MOST_DRAWN = 1_000  # classes of a figure
EPILOG = examples("kd test kd-lenet-1 --plot confusion.png", "kd test exports/kd-lenet-1.onnx --json")


@command(TestConfig, without={"class_map"})
def test(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Run, checkpoint (.pt) or ONNX file.")],
    config: TestConfig,
) -> None:
    """Evaluate a model on test data: accuracy, accuracy per class, agreement with its teacher."""
    model = existing_model(model)
    from kdcli import data, report
    from kdcli.base import runtime
    from kdcli.deploy.load import load_model

    runtime.set_threads(config.threads)
    loaded = load_model(model, config.threads, config)
    if config.plot is not None and len(loaded.classes) > _MOST_DRAWN:
        raise UsageError(
            f"--plot: {len(loaded.classes):,} classes are too many for a figure, which has {_MOST_DRAWN:,} at most",
            "Leave it out; --json has the counts of all confusions.",
        )
    result, splits, source = measure(loaded, config)
    warning = data.overlap_warning(splits.overlap, result.count)
    classes = splits.test.classes
    output.json(
        {
            "schema_version": 2,  # 1: the whole confusion matrix
            "model": str(model),
            "data": splits.label,
            "classes": list(classes),
            "teacher": str(source) if source else None,
            "test": result.to_dict(),
            "test_in_train": splits.overlap,
            "warning": warning,
        }
    )
    _show(f"{model.name} on {splits.label}", result, classes)
    if warning:
        output.note(warning)
    if config.plot is not None:
        report.confusion(result.matrix(), classes, config.plot)
        output.text(f"wrote {config.plot}")


def measure(
    model: Classifier | OnnxClassifier, config: TestConfig, splits: Splits | None = None
) -> tuple[Evaluation, Splits, Path | None]:
    """Figures on test images, of `splits` or as set or recorded; the data; the teacher that was compared with."""
    from kdcli import data
    from kdcli.engine import evaluate
    from kdcli.teacher import Teacher, assumptions

    is_recorded = splits is None and "data" not in config.model_fields_set
    model, splits = data_for(model, config, output.on_event, splits)
    if is_recorded and (changed := data.changed_test_images(model.provenance, splits.test)):
        output.note(changed)
    teacher_logits = None
    source, assumed = _teacher(config, model)
    if source is not None:
        test, threads = splits.test, config.threads
        teacher = Teacher.open(source, config.cache_dir, threads=threads, assumed=assumed, data=test)
        if reason := teacher.reason_unavailable(test):
            output.note(f"agreement with the teacher is not measured: {reason}")
        else:
            teacher_logits = teacher.test_logits(test, output.on_event)
    result = evaluate(
        model, splits.test, teacher_logits=teacher_logits, task="testing", on_event=output.on_event
    )
    assumptions.check(model.path.name, model, splits.test, output.on_event, task="trying alternatives")
    return result, splits, source


def _show(title: str, result: Evaluation, classes: tuple[str, ...]) -> None:
    rows = [
        ["accuracy, %", f"{result.accuracy:.2f}", output.interval(result.accuracy_interval)],
        ["top-5, %", f"{result.top5:.2f}", ""],
        ["cross-entropy, nats", f"{result.loss:.4f}", ""],
        ["calibration error, %", f"{result.calibration_error:.2f}", ""],
    ]
    if result.agreement is not None:
        rows += [
            ["agreement with teacher, %", f"{result.agreement:.2f}", ""],
            ["KL from teacher, nats", f"{result.divergence:.4f}", ""],
            ["teacher's accuracy, %", f"{result.teacher_accuracy:.2f}", ""],
        ]
    output.table([title, f"n = {result.count:,}", "95 % interval"], rows)
    output.text()
    per_class = zip(classes, map(output.number, result.per_class), strict=True)
    output.table(["class", "accuracy, %"], list(per_class))


def _teacher(config: TestConfig, student: Classifier | OnnxClassifier) -> tuple[Path | None, InputSettings]:
    """The teacher to compare with, --teacher or the recorded one, and its input as set or as recorded for it."""
    from kdcli.base.files import sha256_file
    from kdcli.deploy.load import teachers_of

    recorded = teachers_of(student.provenance, student.path)
    path = existing_model(config.teacher) if config.teacher else _recorded_teacher(recorded)
    if not recorded or path is None or config.teacher_inputs.given or not path.is_file():
        return path, config.teacher_inputs
    inputs = {known.sha256: known.inputs for known in recorded}
    return path, inputs.get(sha256_file(path), config.teacher_inputs)


def _recorded_teacher(recorded: list[RecordedTeacher]) -> Path | None:
    """The one recorded teacher, if its file is unchanged."""
    from kdcli.base.files import is_unchanged, regular_size

    if len(recorded) > 1:
        output.note(f"trained by {len(recorded)} teachers: pass one with --teacher to compare with it")
    if len(recorded) != 1:
        return None
    [(path, sha256, _)] = recorded
    if is_unchanged(path, sha256):
        return path
    problem = "has changed since training" if regular_size(path) >= 0 else "not found"
    output.note(f"teacher {path} {problem}: agreement is not measured; pass a teacher with --teacher")
    return None
