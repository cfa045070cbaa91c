"""`kd export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.base import units
from kdcli.base.config import ExportConfig, shell_command
from kdcli.cli import output
from kdcli.cli.arguments import existing_model
from kdcli.cli.options import command, examples

if TYPE_CHECKING:
    from kdcli.deploy.export import ExportResult
    from kdcli.models import Classifier

EPILOG = examples(
    "kd export kd-lenet-1",
    "kd export student.pt --int8 --with-preprocessing -o app/model.onnx",
)


@command(ExportConfig)
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Run or checkpoint (.pt).")],
    config: ExportConfig,
) -> None:
    """Write a checkpoint as one ONNX file, outputs verified against the checkpoint on real images.

    If they differ, no file is written, and an earlier one of that name is unchanged.
    """
    if not config.recipe:
        output.note_ignored(config.model_fields_set, ("calibration_images",), "without --int8")
    checkpoint = existing_model(checkpoint)
    from kdcli import models
    from kdcli.deploy.export import export as write_onnx

    model = models.load(checkpoint)
    result = write_onnx(model, config, on_event=output.on_event)
    output.json(result.to_dict())
    _show(result)
    output.next_command(shell_command("bench", {"teacher": _reference(model)}, result.path))


def _reference(model: Classifier) -> Path:
    """The teacher that the model records, if it is unchanged; else its own file."""
    from kdcli.base.files import is_unchanged
    from kdcli.deploy.load import kind_of, teachers_of

    for teacher in teachers_of(model.provenance, model.path):
        a_model = not teacher.inputs.given and kind_of(teacher.path) != "outputs"
        if a_model and is_unchanged(teacher.path, teacher.sha256):
            return teacher.path
    return model.path


def _show(result: ExportResult) -> None:
    parity, cost, drop = result.parity, result.quantisation, result.drop
    outputs = "log-probabilities" if result.with_preprocessing else "logits"
    ties = f" ({parity.ties} ties)" if parity.ties else ""
    output.text(
        f"verified on {parity.images} training images of {result.data_label}, "
        f"batches {', '.join(map(str, parity.batches))}:",
        f"  {outputs} differ by at most {parity.largest_difference:.1e}; the largest logit is {parity.scale:.3g}",
        f"  top-1 class: {parity.same_top1} of {parity.images} equal{ties}",
    )
    if result.trials:
        _show_trials(result)
    if cost is not None:
        output.text(
            f"int8 by {cost.recipe}, calibrated on {cost.calibration_images} other training images"
            f"{', 7-bit weights: this CPU lacks VNNI' if cost.reduce_range else ''}:",
            f"  agreement with float32 {cost.agreement:.2f} %; accuracy {cost.float_accuracy:.2f} % → "
            f"{cost.int8_accuracy:.2f} % (n = {cost.images})",
        )
    if drop is not None:
        output.text(
            f"accuracy on the {drop.measured_on} (n = {drop.images:,}):",
            f"  {drop.float_accuracy:.2f} % → {drop.accuracy:.2f} %, {drop.points:.2f} points lost of "
            f"{drop.allowed:g} allowed",
        )
    inputs = "uint8 (N, H, W, C)" if result.with_preprocessing else "preprocessed float32 (N, C, H, W)"
    output.text(
        f"input: {inputs}, {'any N' if result.batch is None else f'N = {result.batch}'}",
        f"wrote {result.path.as_posix()} ({units.size(result.size_bytes)})",
    )


def _show_trials(result: ExportResult) -> None:
    output.text()
    output.table(
        ["int8 recipe", "agree %", "faster", "95 % interval", ""],
        [
            [
                trial.recipe,
                output.number(trial.agreement),
                output.number(trial.speedup, unit="×"),
                output.interval(trial.speedup_interval),
                "chosen" if trial.chosen else "",
            ]
            for trial in result.trials
        ],
    )
    for trial in result.trials:
        if trial.problem:
            output.text(f"{trial.recipe}: {trial.problem}")
    output.text()
    if result.quantisation is None:
        output.text("int8 is not faster than float32 here: float32 is kept")
    else:
        output.text(f"--int8-recipe {result.quantisation.recipe} gives the same file without trials")
