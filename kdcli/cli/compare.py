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
from kdcli.cli._options import Recipe, options_of
from kdcli.methods import TrainConfig

if TYPE_CHECKING:
    from kdcli.studies.compare import Comparison, Plan

_OWN = {"method", "seed", "name", "runs_dir", "devices"}  # of each run, not of the comparison
_CHAIN = {"assistant", "generations"}  # a comparison trains single students
_AFTERWARDS = {"csv", "markdown", "jobs"}  # go with --resume


@options_of(CompareConfig, TrainConfig, metavars={"student": "NETWORK"}, without=_OWN | _CHAIN)
def compare(
    *,
    recipe: Recipe = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", help="Go on with this comparison (a folder in comparisons/).", rich_help_panel=RUN
        ),
    ] = None,
    **options: Any,
) -> None:
    """Train with several methods and seeds, and say which is better, or that it cannot be said.

    The same recipe and seeds for each; test images are read once a run, and nothing is chosen by them.
    """
    own = {name: value for name, value in options.items() if name in CompareConfig.model_fields}
    train = {name: value for name, value in options.items() if name not in own}
    settings = make(CompareConfig, own)
    for table in (settings.csv, settings.markdown):
        if table is not None and table.is_dir():
            raise UsageError(f"{table} is a folder", "Name the file to write.")
    if resume is not None and (recipe is not None or train or set(own) - _AFTERWARDS):
        raise UsageError(
            "--resume takes a comparison as it was started; only --jobs, --csv and --markdown go with it",
            "Leave the other options out, or start a new comparison.",
        )
    if resume is None:
        _note_unread(settings, train)
        # its method is another than the file's: what followed from that does not hold
        train = {**(_shared(read_recipe(recipe, {**train, "method": None})) if recipe else {}), **train}
    from kdcli import report
    from kdcli.engine.inputs import load_data
    from kdcli.studies import compare as engine

    plan = engine.Plan.load(resume) if resume is not None else engine.make_plan(settings, train)
    with _ui.progress() as on_event:
        found = engine.compare(plan, load_data(plan.train, on_event), jobs=settings.jobs, on_event=on_event)
    if any(row.count for row in found.standings):
        report.comparison(found, plan.figure_file)
    _tables(found, settings)
    if _ui.settings.json:
        _ui.json(found.to_json())
    else:
        _show(found, plan)
    if found.failed:
        raise KdError(
            f"{len(found.failed)} of {len(found.runs)} runs failed: {found.failed[0].reason}",
            f"{plan.resume_command or 'The same command'} tries them again.",
        )


def _shared(values: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says for all runs: a run's own config.toml has its method and seed, too."""
    return {name: value for name, value in values.items() if name not in _OWN}


def _note_unread(settings: CompareConfig, train: dict[str, Any]) -> None:
    """Tell of settings that none of the methods reads."""
    unread = [set(methods.unread(name, train)) for name in settings.method_names]
    _ui.note_ignored(train, sorted(set.intersection(*unread)), "with these methods")


def _tables(found: Comparison, settings: CompareConfig) -> None:
    from kdcli.studies.compare import tables

    for path, make_table in ((settings.csv, tables.to_csv), (settings.markdown, tables.to_markdown)):
        if path is not None:
            files.write_text(path, make_table(found))


def _show(found: Comparison, plan: Plan) -> None:
    from kdcli.studies.compare import tables

    _ui.say(
        f"{found.student} on {found.data}: {len(found.methods)} methods × {len(found.seeds)} seeds, "
        f"{found.epochs} epochs"
    )
    _ui.table(
        ["method", "runs", "test %", f"− {found.baseline}", "95 % interval", "p (Holm)", "verdict"],
        [[row.method, *tables.cells(row)] for row in found.standings],
        marked=found.methods.index(found.baseline),
    )
    _ui.say()
    _ui.say(f"test %: mean ± standard deviation over seeds, {found.test_images:,} test images")
    if found.comparisons:
        _ui.say(tables.explained(found))
    if len(found.seeds) == 1:
        _ui.say("one seed shows nothing of chance, so no method is called better; --seeds 5 would")
    for line in found.notes:
        _ui.note(line)
    _ui.say(f"teacher runs over a set of images, all runs together: {found.teacher_passes}")
    _ui.say(f"wrote {plan.result_file.as_posix()} and figure.svg beside it")
    if not found.failed:
        _ui.next_command(f"kd report {shlex.quote(plan.folder.as_posix())}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "compare",
        epilog="[bold]kd compare --methods ce,logits,kd --seeds 5 --data digits --epochs 20[/bold]\n\n"
        "[bold]kd compare --resume comparisons/NAME[/bold]",
    )(compare)
