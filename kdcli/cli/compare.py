"""`kd compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli import methods
from kdcli.base import files
from kdcli.base.config import RUN, CompareConfig, make, shell_command
from kdcli.base.errors import KdError, UsageError
from kdcli.base.recipes import read_recipe
from kdcli.cli import output
from kdcli.cli.arguments import run_folder
from kdcli.cli.defaults import note_unread_by_student, with_defaults
from kdcli.cli.options import Recipe, command, examples
from kdcli.methods import TrainConfig

if TYPE_CHECKING:
    from kdcli.data import Splits
    from kdcli.studies.compare import Comparison, Plan

_SET_BY_COMPARE = {"method", "seed", "runs_dir", "devices"}
WITHOUT = _SET_BY_COMPARE | {"assistant", "generations"}  # of kd train; a comparison trains single students
_WITH_RESUME = {"csv", "markdown"}
EPILOG = examples(
    "kd compare --methods ce,logits,kd --seeds 5 --data digits --epochs 20",
    "kd compare --resume comparisons/NAME",
)


@command(CompareConfig, TrainConfig, without=WITHOUT)
def compare(
    *,
    config: CompareConfig,
    recipe: Recipe = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", help="Continue a comparison, by name or folder.", rich_help_panel=RUN),
    ] = None,
    **options: Any,
) -> None:
    """Train with several methods and seeds, and test whether one is better.

    All methods share recipe and seeds. Each student is evaluated on test images once, at the end of its run.
    Rerun the same command to continue after an interruption.
    """
    result, plan = run_comparison(config, options, recipe, resume)
    from kdcli.studies.compare.result import to_csv, to_markdown

    for path, make_table in ((config.csv, to_csv), (config.markdown, to_markdown)):
        if path is not None:
            files.write_text(path, make_table(result))
    output.json(result.to_dict())
    _show(result, plan)
    if result.failed:
        raise KdError(
            f"{len(result.failed)} of {len(result.runs)} runs failed: {result.failed[0].reason}",
            f"Try them again: {plan.resume_command or 'the same command'}",
        )
    output.next_command(shell_command("report", plan.train.places, plan.folder))


def run_comparison(
    settings: CompareConfig,
    train: dict[str, Any],
    recipe: str | None = None,
    resume: Path | None = None,
    splits: Splits | None = None,
) -> tuple[Comparison, Plan]:
    """Start or continue a comparison, with options of kd train; `splits` are its data where they are loaded."""
    if resume is not None and (recipe is not None or {*settings.model_fields_set, *train} - _WITH_RESUME):
        raise UsageError(
            "--resume continues a comparison as it was started; only --csv and --markdown go with it",
            "Leave the other options out, or start a new comparison.",
        )
    if resume is None:
        typed = set(train)
        unread = [set(methods.unread(name, train)) for name in settings.methods]
        output.note_ignored(train, sorted(set.intersection(*unread)), "with these methods")
        if recipe:  # without the method and seed of a run's config.toml, and values derived from them
            shared = read_recipe(recipe, {**train, "method": None})
            shared = {name: value for name, value in shared.items() if name not in {"name", *_SET_BY_COMPARE}}
            train = {**shared, **train}
        given = make(TrainConfig, train)
        note_unread_by_student(given, typed)
        parts = (part for name in settings.methods for part in methods.parse(name))
        needs = given.kd_weight != 0 and any(part.needs_teacher for part in parts)
        completed = with_defaults(given, needs_teacher=needs)
        train = {name: getattr(completed, name) for name in completed.model_fields_set}
    from kdcli import report
    from kdcli.engine.plan import load_data
    from kdcli.studies import compare as studies

    plan = studies.make_plan(settings, train) if resume is None else studies.Plan.load(run_folder(resume))
    splits = splits or load_data(plan.train, output.on_event)
    result = studies.compare(plan, splits, on_event=output.on_event)
    if any(row.count for row in result.standings):
        report.comparison(result, plan.folder / "figure.svg")
    return result, plan


def _show(result: Comparison, plan: Plan) -> None:
    from kdcli.studies.compare.result import cells, statistics_note

    output.text(
        f"{result.student} on {result.data}: {len(result.methods)} methods × {len(result.seeds)} seeds, "
        f"{result.epochs} epoch{'s' * (result.epochs != 1)}"
    )
    output.table(
        ["method", "runs", "test %", f"vs {result.baseline}", "95 % interval", "p (Holm)", "verdict"],
        [[row.method, *cells(row)] for row in result.standings],
        marked=result.methods.index(result.baseline),
    )
    output.text("", f"test %: mean ± standard deviation over seeds, {result.test_images:,} test images")
    if result.comparisons:
        output.text(statistics_note(result))
    if len(result.seeds) == 1:
        output.text("one seed gives no interval, so there is no verdict; use --seeds 5")
    for line in result.notes:
        output.note(line)
    if result.teacher_passes:
        output.text(f"teacher evaluated on {result.teacher_passes} sets of images, all runs together")
    output.text(f"wrote {plan.result_file.as_posix()} and figure.svg beside it")
