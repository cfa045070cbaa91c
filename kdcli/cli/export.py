"""`kd export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.base import units
from kdcli.base.config import ExportConfig, make
from kdcli.cli import _ui
from kdcli.cli._find import existing_model
from kdcli.cli._options import examples, options_of

if TYPE_CHECKING:
    from kdcli.deploy.export import ExportResult

EPILOG = examples(
    "kd export runs/kd-lenet-1/student.pt",
    "kd export student.pt --int8 --with-preprocessing -o app/model.onnx",
)


@options_of(ExportConfig)
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A student or teacher (.pt).")],
    **options: Any,
) -> None:
    """Write a checkpoint as one ONNX file, outputs verified against the checkpoint on real images.

    If they differ, no file is written, and an earlier one of that name is unchanged.
    """
    config = make(ExportConfig, options)
    if not config.recipe:
        _ui.note_ignored(options, ("calibration_images",), "without --int8")
    source = existing_model(checkpoint)
    from kdcli.deploy.export import export as write_onnx

    with _ui.progress() as on_event:
        result = write_onnx(source, config, on_event=on_event)
    if _ui.settings.json:
        _ui.json(asdict(result))
        return
    _show(result)


def _show(result: ExportResult) -> None:
    parity, cost, drop = result.parity, result.quantisation, result.drop
    outputs = "log-probabilities" if result.with_preprocessing else "logits"
    _ui.say(
        f"verified on {parity.images} train images of {result.data_label}, "
        f"batches {', '.join(map(str, parity.batches))}:"
    )
    _ui.say(
        f"  {outputs} differ by at most {parity.largest_difference:.1e}; the largest logit is {parity.scale:.3g}"
    )
    ties = f" ({parity.ties} ties)" if parity.ties else ""
    _ui.say(f"  top-1 class: {parity.same_top1} of {parity.images} equal{ties}")
    if result.trials:
        _show_trials(result)
    if cost is not None:
        _ui.say(
            f"int8 by {cost.recipe}, calibrated on {cost.calibration_images} other train images"
            f"{', 7-bit weights: this CPU lacks VNNI' if cost.reduce_range else ''}:"
        )
        _ui.say(
            f"  agreement with float32 {cost.agreement:.2f} %; accuracy {cost.float_accuracy:.2f} % → "
            f"{cost.int8_accuracy:.2f} % (n = {cost.images})"
        )
    if drop is not None:
        _ui.say(f"accuracy on the {drop.measured_on} (n = {drop.images:,}):")
        _ui.say(
            f"  {drop.float_accuracy:.2f} % → {drop.accuracy:.2f} %, {drop.points:.2f} points lost of "
            f"{drop.allowed:g} allowed"
        )
    inputs = "uint8 (N, H, W, C)" if result.with_preprocessing else "preprocessed float32 (N, C, H, W)"
    _ui.say(f"input: {inputs}, {'any N' if result.batch is None else f'N = {result.batch}'}")
    _ui.say(f"wrote {result.path.as_posix()} ({units.size(result.size_bytes)})")
    _ui.next_command("kd bench")


def _show_trials(result: ExportResult) -> None:
    _ui.say()
    _ui.table(
        ["int8 recipe", "agree %", "faster", "95 % interval", ""],
        [
            [
                trial.recipe,
                "—" if trial.agreement is None else f"{trial.agreement:.2f}",
                "—" if trial.speedup is None else f"{trial.speedup:.2f}×",
                "—" if trial.speedup_interval is None else "{:.2f}–{:.2f}".format(*trial.speedup_interval),
                "chosen" if trial.chosen else "",
            ]
            for trial in result.trials
        ],
    )
    for trial in result.trials:
        if trial.problem:
            _ui.say(f"{trial.recipe}: {trial.problem}")
    _ui.say()
    if result.quantisation is None:
        _ui.say("int8 is not faster than float32 here: float32 is kept")
    else:
        _ui.say(f"--int8-recipe {result.quantisation.recipe} gives the same file without trials")
