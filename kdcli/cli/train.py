"""`kd train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli import methods
from kdcli.cli import _ui
from kdcli.cli._options import options_of
from kdcli.config import METHOD, RECIPES, RUN, TrainConfig, make, read_recipe
from kdcli.errors import UsageError

if TYPE_CHECKING:
    from kdcli.engine import Result


@options_of(TrainConfig, metavars={"method": "|".join(methods.METHODS), "student": "NETWORK"})
def train(
    *,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "--config",
            help="Settings to start from; options typed beside it win. seed is the reference's own.",
            metavar="|".join([*RECIPES, "FILE.toml"]),
            rich_help_panel=METHOD,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", help="Continue this interrupted run (a folder in runs/).", rich_help_panel=RUN
        ),
    ] = None,
    **options: Any,
) -> None:
    """Train a student from a teacher, or, with --method ce, any network from labels alone.

    The teacher's outputs are computed once a view and kept: a second run does not touch the teacher.
    """
    if resume is not None:
        if recipe is not None or options:
            raise UsageError(
                "--resume takes a run as it was started; no other setting goes with it",
                "Leave the other options out, or start a new run.",
            )
        from kdcli.engine import RunDir

        run = RunDir.existing(resume)
        config = run.read_config()
    else:
        run = None
        config = make(TrainConfig, {**(read_recipe(recipe) if recipe else {}), **options})
    _finish(*_train(config, run))


def _train(config: TrainConfig, run: Any) -> tuple[Result, Any]:
    from kdcli import data, models
    from kdcli.engine import fit

    methods.get(config.method)
    models.takes_dropout(config.student)
    with _ui.progress() as on_event:
        splits = data.load(
            config.data,
            data_dir=config.data_dir,
            cache_dir=config.cache_dir,
            image_size=config.image_size,
            on_event=on_event,
        )
        return fit(config, splits, resume=run, on_event=on_event), splits


def _finish(result: Result, splits: Any) -> None:
    from kdcli import report

    report.curves(result.run.metrics_file, result.run.path / "curves.svg")
    if _ui.settings.json:
        _ui.json(result.to_json())
        return
    test = result.evaluation
    low, high = test.accuracy_interval
    _ui.say(
        f"{result.config.method} {result.config.student} on {splits.label}: "
        f"test accuracy {test.accuracy:.2f} % (95 % interval {low:.2f}–{high:.2f}, n = {test.count:,})"
    )
    if test.agreement is not None:
        _ui.say(f"agreement with the teacher {test.agreement:.2f} % (teacher {test.teacher_accuracy:.2f} %)")
    _ui.say(
        f"{_ui.count(result.parameters)} parameters, {result.images_per_s:,.0f} images/s, "
        f"{_ui.clock(result.seconds)} of training, teacher runs: {result.teacher_passes}"
    )
    _ui.say(f"wrote {result.run.student.as_posix()}")
    _ui.next_command(f"kd export {result.run.student.as_posix()}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "train",
        epilog="[bold]kd train --method noisy --noisy-ratio 0.5[/bold]\n\n"
        "[bold]kd train --method ce --student nin --data digits --image-size 32 --epochs 20[/bold]",
    )(train)
