"""`kd train`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli import methods
from kdcli.base import files, units
from kdcli.base.config import RUN, make
from kdcli.base.errors import UsageError
from kdcli.base.recipes import read_recipe
from kdcli.cli import _ui
from kdcli.cli._options import Recipe, options_of
from kdcli.methods import TrainConfig

if TYPE_CHECKING:
    from kdcli.engine import RunResult


@options_of(TrainConfig, metavars={"method": "NAME[+NAME…]", "student": "NETWORK"})
def train(
    *,
    recipe: Recipe = None,
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
        typed = options.get("method")
        own = typed is not None and methods.any_own(typed)
        if recipe is not None or set(options) - ({"method"} if own else set()):
            raise UsageError(
                "--resume takes a run as it was started; no other setting goes with it",
                "Leave the other options out, or start a new run.",
            )
        from kdcli.engine import RunDir, continued

        run = RunDir.existing(resume)
        config = run.read_config()
        _ui.settings.follower = _started_by_another(config)
        methods.check_own_method(config, typed, str(resume))
        if own and typed != config.method:
            raise UsageError(
                f"{resume} was started with --method {config.method}",
                "Leave --method out, or start a new run.",
            )
        _check_place(config, resume)
        config = continued(run)
    else:
        run = None
        config = make(TrainConfig, {**(read_recipe(recipe, options) if recipe else {}), **options})
        _ui.settings.follower = _started_by_another(config)
        methods.check_own_method(config, options.get("method"), str(recipe))
        unread = methods.unread(config.method, options)
        _ui.note_ignored(options, unread, f"with --method {config.method}")
    _finish(*_train(config, run, options))


def _started_by_another(config: TrainConfig) -> bool:
    """Whether this is one of several processes of a run, and not the first: torchrun and Fabric say so."""
    several = config.devices > 1 or "TORCHELASTIC_RUN_ID" in os.environ
    return several and os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0"


def _check_place(config: TrainConfig, resume: Path) -> None:
    """A run's paths are as they were typed: relative ones hold in the folder where it was started."""
    hint = "Resume from the folder where it was started."
    for teacher in config.teacher if methods.get(config.method).active(config).needs_teacher else ():
        if not teacher.exists():
            raise UsageError(f"{resume} needs its teacher {teacher}", hint)
    if config.student_file is not None and not config.student_file.exists():
        raise UsageError(f"{resume} needs the student {config.student} that it began with", hint)
    if Path(config.data).parent != Path() and not files.expand(config.data).exists():
        raise UsageError(f"{resume} needs its data {config.data}", hint)
    if config.unlabelled is not None and not files.expand(str(config.unlabelled)).exists():
        raise UsageError(f"{resume} needs its images without labels, {config.unlabelled}", hint)


def _train(config: TrainConfig, run: Any, options: dict[str, Any]) -> tuple[tuple[RunResult, ...], Any]:
    if config.unlabelled is not None:
        methods.check_unlabelled(config)
    stored = config.student_file
    if stored is not None and not stored.is_file():
        raise UsageError(f"no such student: {stored}", "--student takes a network's name or a .pt file.")
    from kdcli import models
    from kdcli.base import runtime
    from kdcli.engine import fit_chain
    from kdcli.engine.inputs import load_data

    if stored is not None:
        _ui.note_ignored(
            options, ("dropout", "preprocess", "width"), f"with --student {stored}, which brings its own"
        )
    elif not any(models.takes_dropout(network) for network in (*config.assistant, config.student)):
        _ui.note_ignored(options, ("dropout",), f"with --student {config.student}, which has none")
    world = runtime.launch(config.accelerator, config.devices)
    failed = True
    try:
        with _ui.progress() as on_event:
            with world.first_alone():
                splits = load_data(config, on_event)
            results = fit_chain(config, splits, resume=run, world=world, on_event=on_event)
        failed = False
    finally:
        world.close(failed=failed)
    return (results if world.first else ()), splits


def _finish(results: tuple[RunResult, ...], splits: Any) -> None:
    from kdcli import report

    if not results:  # another process tells
        return
    for each in results:
        report.curves(each.run.metrics_file, each.run.path / "curves.svg")
    *before, result = results
    if _ui.settings.json:
        chain = {"chain": [each.to_json() for each in before]} if before else {}
        _ui.json({**result.to_json(), **chain})
        return
    for each in before:
        _ui.say(
            f"{each.run.path.name}: {each.config.student}, test accuracy {each.evaluation.accuracy:.2f} %, "
            f"agreement with its teacher {_ui.percent(each.evaluation.agreement)} %"
        )
    test = result.evaluation
    low, high = test.accuracy_interval
    _ui.say(
        f"{result.config.method} {result.config.student} on {splits.label}: "
        f"test accuracy {test.accuracy:.2f} % (95 % interval {low:.2f}–{high:.2f}, n = {test.count:,})"
    )
    if test.agreement is not None:
        _ui.say(f"agreement with the teacher {test.agreement:.2f} % (teacher {test.teacher_accuracy:.2f} %)")
    if result.val_accuracy is not None:
        _ui.say(f"accuracy on the validation split {result.val_accuracy:.2f} %")
    _ui.say(
        f"{units.count(result.parameters)} parameters, {result.images_per_s:,.0f} images/s, "
        f"{_ui.clock(result.seconds)} of training, teacher runs: {_teacher_runs(result)}"
    )
    for mark in result.resumed_with_differences:
        _ui.note(f"resumed with a difference: {mark}")
    _ui.say(f"wrote {result.run.student.as_posix()}")
    _ui.next_command(f"kd export {shlex.quote(result.run.student.as_posix())}")


def _teacher_runs(result: RunResult) -> str:
    from kdcli.engine.plan import cache_mode

    config = result.config
    live = methods.get(config.method).active(config).needs_teacher and cache_mode(config) == "off"
    return "in every step" if live else str(result.teacher_passes)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "train",
        epilog="[bold]Methods[/bold]  "
        + " · ".join(f"[bold]{name}[/bold] {entry.summary}" for name, entry in methods.METHODS.items())
        + "\n\n"
        "[bold]kd train --method noisy --noisy-ratio 0.5[/bold]\n\n"
        "[bold]kd train --method ce --student nin --data digits --image-size 32 --epochs 20[/bold]",
    )(train)
