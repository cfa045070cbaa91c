"""`kd train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli import methods
from kdcli.base import units
from kdcli.base.config import RUN, make, shell_command
from kdcli.base.errors import UsageError
from kdcli.base.recipes import read_recipe
from kdcli.cli import output
from kdcli.cli.arguments import run_to_resume
from kdcli.cli.defaults import note_unread_by_student, with_defaults
from kdcli.cli.options import Recipe, command, examples
from kdcli.methods import TrainConfig

if TYPE_CHECKING:
    from kdcli.data import Splits
    from kdcli.engine import RunDir, RunResult

_METHODS = " · ".join(f"[bold]{name}[/bold] {entry.summary}" for name, entry in methods.METHODS.items())
EPILOG = f"[bold]Methods[/bold]  {_METHODS}\n\n" + examples(
    "kd train --method noisy --noisy-ratio 0.5",
    "kd train --method ce --student nin --data digits --image-size 32 --epochs 20",
)


@command(TrainConfig)
def train(
    *,
    recipe: Recipe = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            help="Continue an interrupted run, by name or folder; by default the newest.",
            metavar="[RUN]",
            rich_help_panel=RUN,
        ),
    ] = None,
    **options: Any,
) -> None:
    """Train a student from a teacher, or, with --method ce, any network from labels alone.

    Teacher logits are computed once per augmented copy ("view") of the data and cached: later runs reuse them.
    """
    results, data_label = run_training(options, recipe, resume)
    if results:  # rank 0
        _show(results, data_label)


def run_training(
    options: dict[str, Any],
    recipe: str | None = None,
    resume: str | None = None,
    splits: Splits | None = None,
) -> tuple[tuple[RunResult, ...], str]:
    """Results of the run, or of each run of a chain (none if this process is not rank 0), and the data's label.

    `splits` are the data where they are loaded already; `options` name them.
    """
    if resume is not None:
        run, config = _resumed(resume, options, alone=recipe is None and not set(options) - {"method"})
    else:
        run = None
        config = make(TrainConfig, {**(read_recipe(recipe, options) if recipe else {}), **options})
        methods.check_typed(config, options.get("method"), str(recipe))  # before its code is imported
        unread = methods.unread(config.method, options)
        output.note_ignored(options, unread, f"with --method {config.method}")
    if config.unlabelled is not None:
        methods.objective(config).check(unlabelled=True)
    return _train(config, run, options, splits)


def _resumed(name: str, options: dict[str, Any], *, alone: bool) -> tuple[RunDir, TrainConfig]:
    """The run to continue, and its settings; a UsageError unless it is `alone` on the command line."""
    from kdcli.engine import RunDir, resume_config
    from kdcli.engine.fit import links

    if not alone:
        raise UsageError(
            "--resume continues a run with its own settings and takes no other option",
            "Omit the other options, or start a new run.",
        )
    run = RunDir.existing(run_to_resume(name))
    config = run.read_config()
    methods.check_typed(config, options.get("method"), str(run.path))  # before its code is imported
    if options.get("method", config.method) != config.method:
        raise UsageError(
            f"{run.path} was started with --method {config.method}", "Omit --method, or start a new run."
        )
    whole = resume_config(run)
    if run.result_file.is_file() and not run.saved() and len(links(whole)) == 1:
        test = shell_command("test", {}, run.student)
        raise UsageError(f"{run.path} is finished, and its saved states are deleted", f"Its student: {test}")
    return run, whole


def _train(
    config: TrainConfig, run: RunDir | None, options: dict[str, Any], splits: Splits | None
) -> tuple[tuple[RunResult, ...], str]:
    from kdcli.base import runtime
    from kdcli.engine import fit_chain
    from kdcli.engine.plan import load_data

    note_unread_by_student(config, options)
    if run is None:
        config = with_defaults(config, needs_teacher=methods.objective(config).needs_teacher)
    world = runtime.launch(config.accelerator, config.devices)
    failed = True
    try:
        with world.first_alone():
            splits = splits or load_data(config, output.on_event)
        results = fit_chain(config, splits, resume=run, world=world, on_event=output.on_event)
        failed = False
    finally:
        world.close(failed=failed)
    results = results if world.first else ()
    from kdcli import report  # only now: it loads scipy and onnxruntime

    for each in results:
        report.curves(each.run.metrics_file, each.run.path / "curves.svg")
    return results, splits.label


def _show(results: tuple[RunResult, ...], data_label: str) -> None:
    from kdcli.engine.plan import cache_mode

    *before, result = results
    chain = {"chain": [each.to_dict() for each in before]} if before else {}
    output.json({**result.to_dict(), **chain})
    for each in before:
        output.text(
            f"{each.run.path.name}: {each.config.student}, test accuracy {each.evaluation.accuracy:.2f} %, "
            f"agreement with its teacher {output.number(each.evaluation.agreement)} %"
        )
    test, config = result.evaluation, result.config
    output.text(
        f"{config.method} {config.student} on {data_label}: test accuracy {test.accuracy:.2f} % "
        f"(95 % interval {output.interval(test.accuracy_interval)}, n = {test.count:,})"
    )
    if result.warning:
        output.note(result.warning)
    if test.agreement is not None:
        output.text(
            f"agreement with the teacher {test.agreement:.2f} % (teacher {test.teacher_accuracy:.2f} %)"
        )
    if result.val_accuracy is not None:
        output.text(f"accuracy on the validation split {result.val_accuracy:.2f} %")
    needs_teacher, passes = methods.objective(config).needs_teacher, result.teacher_passes
    teacher = f", teacher evaluated on {passes} set{'s' * (passes != 1)} of images" if passes else ""
    if needs_teacher and cache_mode(config) == "off":
        teacher = ", teacher evaluated in every step"
    elif needs_teacher and not passes:
        teacher = ", teacher outputs from the cache"
    output.text(
        f"{units.count(result.parameters)} parameters, {result.images_per_s:,.0f} images/s, "
        f"{output.clock(result.seconds)} of training{teacher}"
    )
    for difference in result.resumed_with_differences:
        output.note(f"resumed with a difference: {difference}")
    output.text(f"wrote {result.run.student.as_posix()}")
    if needs_teacher:
        output.next_command(shell_command("export", config.places, result.run.student))
    else:
        output.next_command(shell_command("train", {"teacher": result.run.student, **config.places}))
