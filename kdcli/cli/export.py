"""`kd export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.base import units
from kdcli.base.config import ExportConfig, make
from kdcli.cli import _ui
from kdcli.cli._find import existing_model
from kdcli.cli._options import options_of

if TYPE_CHECKING:
    from kdcli.deploy.export import ExportResult


@options_of(ExportConfig)
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A student or teacher (.pt).")],
    **options: Any,
) -> None:
    """Write a checkpoint as one ONNX file, and prove on real images that it gives the same.

    If it does not, no file appears, and an earlier one of that name stays as it was.
    """
    config = make(ExportConfig, options)
    if config.recipe is None:
        _ui.note_ignored(options, ("calibration_images",), "without --int8")
    source = existing_model(checkpoint)
    from kdcli.deploy.export import export as write

    with _ui.progress() as on_event:
        result = write(source, config, on_event=on_event)
    if _ui.settings.json:
        _ui.json(result.to_json())
        return
    _show(result)


def _show(result: ExportResult) -> None:
    parity = result.parity
    what = "log-probabilities" if result.with_preprocessing else "logits"
    _ui.say(
        f"same as {result.checkpoint.as_posix()} on {parity.images} train images of {result.data_label}, "
        f"batches {', '.join(map(str, parity.batches))}:"
    )
    _ui.say(
        f"  {what} differ by at most {parity.largest_difference:.1e}; the largest logit is {parity.scale:.3g}"
    )
    ties = f" ({parity.ties} ties)" if parity.ties else ""
    _ui.say(f"  first class: {parity.same_top1} of {parity.images} equal{ties}")
    _show_trials(result)
    if result.quantisation is not None:
        cost = result.quantisation
        _ui.say(
            f"int8 by {cost.recipe}, calibrated on {cost.calibration_images} other train images"
            f"{', 7-bit weights: this CPU lacks VNNI' if cost.reduce_range else ''}:"
        )
        _ui.say(
            f"  agreement with float32 {cost.agreement:.2f} %; accuracy {cost.float_accuracy:.2f} % → "
            f"{cost.int8_accuracy:.2f} % (n = {cost.images})"
        )
    takes = "uint8 (N, H, W, C)" if result.with_preprocessing else "preprocessed float32 (N, C, H, W)"
    if result.drop is not None:
        drop = result.drop
        _ui.say(
            f"accuracy on {drop.images:,} images, the {drop.measured_on}: {drop.float_accuracy:.2f} % → "
            f"{drop.accuracy:.2f} %: {drop.points:+.2f} points lost of {drop.allowed:g} allowed"
        )
    _ui.say(f"takes {takes}, {'any N' if result.batch is None else f'N = {result.batch}'}")
    _ui.say(f"wrote {result.path.as_posix()} ({units.size(result.size_bytes)})")
    _ui.next_command("kd bench")


def _show_trials(result: ExportResult) -> None:
    if not result.trials:
        return
    _ui.say()
    _ui.table(
        ["int8 recipe", "agree %", "faster", "95 % interval", ""],
        [
            [
                trial.recipe,
                "—" if trial.agreement is None else f"{trial.agreement:.2f}",
                "—" if trial.speedup is None else f"{trial.speedup:.2f}×",
                "—" if trial.speedup_interval is None else "{:.2f}–{:.2f}".format(*trial.speedup_interval),
                "taken" if trial.chosen else "",
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


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "export",
        no_args_is_help=True,
        epilog="[bold]kd export runs/kd-lenet-1/student.pt[/bold]\n\n"
        "[bold]kd export student.pt --int8 --with-preprocessing -o app/model.onnx[/bold]",
    )(export)
