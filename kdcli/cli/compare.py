"""`kd compare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli import methods
from kdcli.base import files
from kdcli.base.config import RUN, CompareConfig, make
from kdcli.base.errors import KdError, UsageError
from kdcli.base.recipes import read_recipe
from kdcli.cli import _ui
from kdcli.cli._options import Recipe, examples, options_of
from kdcli.methods import TrainConfig

if TYPE_CHECKING:
    from kdcli.studies.compare import Comparison, Plan

_PER_RUN = {"method", "seed", "name", "runs_dir", "devices"}
_CHAIN = {"assistant", "generations"}  # a comparison trains single students
_WITH_RESUME = {"csv", "markdown"}
EPILOG = examples(
    "kd compare --methods ce,logits,kd --seeds 5 --data digits --epochs 20",
    "kd compare --resume comparisons/NAME",
)


@options_of(CompareConfig, TrainConfig, metavars={"student": "NETWORK"}, without=_PER_RUN | _CHAIN)
def compare(
    *,
    recipe: Recipe = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", help="Continue this comparison (a folder in comparisons/).", rich_help_panel=RUN
        ),
    ] = None,
    **options: Any,
) -> None:
    """Train with several methods and seeds, and test whether one is better.

    The same recipe and seeds for each; test images are read once a run, and nothing is chosen by them.
    Rerun the same command to continue after an interruption.
    """
    own = {name: value for name, value in options.items() if name in CompareConfig.model_fields}
    train = {name: value for name, value in options.items() if name not in own}
    settings = make(CompareConfig, own)
    for table in (settings.csv, settings.markdown):
        if table is not None and table.is_dir():
            raise UsageError(f"{table} is a folder", "Name the file to write.")
    if resume is not None and (recipe is not None or train or set(own) - _WITH_RESUME):
        raise UsageError(
            "--resume continues a comparison as it was started; only --csv and --markdown go with it",
            "Leave the other options out, or start a new comparison.",
        )
    if resume is None:
        unread = [set(methods.unread(name, train)) for name in settings.method_names]
        _ui.note_ignored(train, sorted(set.intersection(*unread)), "with these methods")
        if recipe:  # without the method and seed of a run's config.toml, and values derived from them
            shared = read_recipe(recipe, {**train, "method": None})
            train = {**{name: value for name, value in shared.items() if name not in _PER_RUN}, **train}
    from kdcli import report
    from kdcli.engine.plan import load_data
    from kdcli.studies import compare as studies
    from kdcli.studies.compare import tables

    plan = studies.Plan.load(resume) if resume is not None else studies.make_plan(settings, train)
    with _ui.progress() as on_event:
        result = studies.compare(plan, load_data(plan.train, on_event), on_event=on_event)
    if any(row.count for row in result.standings):
        report.comparison(result, plan.folder / "figure.svg")
    for path, make_table in ((settings.csv, tables.to_csv), (settings.markdown, tables.to_markdown)):
        if path is not None:
            files.write_text(path, make_table(result))
    if _ui.settings.json:
        _ui.json(result.to_json())
    else:
        _show(result, plan)
    if result.failed:
        raise KdError(
            f"{len(result.failed)} of {len(result.runs)} runs failed: {result.failed[0].reason}",
            f"{plan.resume_command or 'The same command'} tries them again.",
        )


def _show(result: Comparison, plan: Plan) -> None:
    from kdcli.studies.compare import tables

    _ui.say(
        f"{result.student} on {result.data}: {len(result.methods)} methods × {len(result.seeds)} seeds, "
        f"{result.epochs} epochs"
    )
    _ui.table(
        ["method", "runs", "test %", f"vs {result.baseline}", "95 % interval", "p (Holm)", "verdict"],
        [[row.method, *tables.cells(row)] for row in result.standings],
        marked=result.methods.index(result.baseline),
    )
    _ui.say()
    _ui.say(f"test %: mean ± standard deviation over seeds, {result.test_images:,} test images")
    if result.comparisons:
        _ui.say(tables.statistics_note(result))
    if len(result.seeds) == 1:
        _ui.say("one seed says nothing about chance, so there is no verdict; use --seeds 5")
    for line in result.notes:
        _ui.note(line)
    _ui.say(f"teacher evaluated on {result.teacher_passes} sets of images, all runs together")
    _ui.say(f"wrote {plan.result_file.as_posix()} and figure.svg beside it")
    if not result.failed:
        _ui.next_command(f"kd report {shlex.quote(plan.folder.as_posix())}")
