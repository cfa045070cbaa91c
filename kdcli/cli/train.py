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
from kdcli.cli._options import Recipe, examples, options_of
from kdcli.methods import TrainConfig

if TYPE_CHECKING:
    from kdcli.engine import RunDir, RunResult

_METHODS = " · ".join(f"[bold]{name}[/bold] {entry.summary}" for name, entry in methods.METHODS.items())
EPILOG = f"[bold]Methods[/bold]  {_METHODS}\n\n" + examples(
    "kd train --method noisy --noisy-ratio 0.5",
    "kd train --method ce --student nin --data digits --image-size 32 --epochs 20",
)


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

    Teacher logits are computed once per augmented copy ("view") of the data and cached: later runs reuse them.
    """
    run = None
    if resume is not None:
        from kdcli.engine import RunDir, resume_config

        if recipe is not None or set(options) - {"method"}:
            raise UsageError(
                "--resume continues a run with its own settings and takes no other option",
                "Omit the other options, or start a new run.",
            )
        run = RunDir.existing(resume)
        config = run.read_config()
    else:
        config = make(TrainConfig, {**(read_recipe(recipe, options) if recipe else {}), **options})
    _ui.settings.follower = _is_follower(config)
    methods.check_typed(config, options.get("method"), str(resume or recipe))  # before its code is imported
    if run is not None:
        if options.get("method", config.method) != config.method:
            raise UsageError(
                f"{resume} was started with --method {config.method}", "Omit --method, or start a new run."
            )
        _check_inputs(config, run)
        config = resume_config(run)
    else:
        unread = methods.unread(config.method, options)
        _ui.note_ignored(options, unread, f"with --method {config.method}")
    if config.unlabelled is not None:
        methods.objective(config).check(unlabelled=True)
    results, data_label = _train(config, run, options)
    if results:  # rank 0
        _render(results, data_label)


def _is_follower(config: TrainConfig) -> bool:
    """Whether this is a process of rank > 0 started by torchrun or Fabric."""
    several = config.devices > 1 or "TORCHELASTIC_RUN_ID" in os.environ
    return several and os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0"


def _check_inputs(config: TrainConfig, run: RunDir) -> None:
    """Check that the run's input files exist; relative paths refer to the folder where it was started."""
    teachers = config.teacher if methods.objective(config).needs_teacher else ()
    inputs = [*teachers, config.student_file, config.unlabelled]
    if Path(config.data).parent != Path():
        inputs.append(Path(config.data))
    for path in inputs:
        if path is not None and not files.expand(str(path)).exists():
            raise UsageError(
                f"{path} of {run.path} not found", "Resume from the folder where the run was started."
            )


def _train(
    config: TrainConfig, run: RunDir | None, options: dict[str, Any]
) -> tuple[tuple[RunResult, ...], str]:
    """Results of the run, or of each run of a chain (none if this process is not rank 0), and the data's label."""
    from kdcli import models
    from kdcli.base import runtime
    from kdcli.engine import fit_chain
    from kdcli.engine.plan import load_data

    if config.student_file is not None:
        reason = f"with --student {config.student_file}, which defines it"
        _ui.note_ignored(options, ("dropout", "preprocess", "width"), reason)
    elif not any(models.accepts(network, "dropout") for network in (*config.assistant, config.student)):
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
    return (results if world.first else ()), splits.label


def _render(results: tuple[RunResult, ...], data_label: str) -> None:
    from kdcli import report

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
        f"{result.config.method} {result.config.student} on {data_label}: "
        f"test accuracy {test.accuracy:.2f} % (95 % interval {low:.2f}–{high:.2f}, n = {test.count:,})"
    )
    if test.agreement is not None:
        _ui.say(f"agreement with the teacher {test.agreement:.2f} % (teacher {test.teacher_accuracy:.2f} %)")
    if result.val_accuracy is not None:
        _ui.say(f"accuracy on the validation split {result.val_accuracy:.2f} %")
    _ui.say(
        f"{units.count(result.parameters)} parameters, {result.images_per_s:,.0f} images/s, "
        f"{_ui.clock(result.seconds)} of training, teacher evaluated {_teacher_passes(result)}"
    )
    for difference in result.resumed_with_differences:
        _ui.note(f"resumed with a difference: {difference}")
    _ui.say(f"wrote {result.run.student.as_posix()}")
    _ui.next_command(f"kd export {shlex.quote(result.run.student.as_posix())}")


def _teacher_passes(result: RunResult) -> str:
    from kdcli.engine.plan import cache_mode

    config = result.config
    if methods.objective(config).needs_teacher and cache_mode(config) == "off":
        return "in every step"
    return f"on {result.teacher_passes} set{'s' * (result.teacher_passes != 1)} of images"
