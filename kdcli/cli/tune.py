"""`kd tune`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli import methods
from kdcli.base import code
from kdcli.base.config import make, option_flag, shell_command
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.recipes import read_recipe
from kdcli.base.results import value_text
from kdcli.cli import output
from kdcli.cli.defaults import note_unread_by_student, with_defaults
from kdcli.cli.options import Recipe, command, examples
from kdcli.studies.tune import space as spaces
from kdcli.studies.tune.space import SEARCH, TuneConfig

if TYPE_CHECKING:
    from kdcli.studies.tune.summary import TuneResult

_TOP = 10  # trials shown
EPILOG = examples(
    "kd tune --tune tau=1:10 --tune lamda=0:1 --trials 30",
    "kd tune --method ce --tune lr=1e-4:1e-1 --tune 'optimizer=adam|sgd' --data digits",
)


@command(
    TuneConfig,
    # a trial trains a single student in one process, and is not resumed
    without=("assistant", "generations", "devices", "name", "save_every", "keep"),
)
def tune(
    *,
    ranges: Annotated[
        list[str] | None,
        typer.Option(
            "--tune",
            help="A setting to search: NAME=LOW:HIGH, NAME=LOW:HIGH:log, or 'NAME=a|b|c'. Repeatable.",
            metavar="NAME=RANGE",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    recipe: Recipe = None,
    **options: Any,
) -> None:
    """Search for settings of kd train with the best validation accuracy; test images are not read.

    Rerun the same command to continue after an interruption; several processes can share a study.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("kd tune needs Optuna, which is not installed", "pip install 'kdcli[tune]'")
    ranges = ranges or []
    tuned = spaces.names_of(ranges)
    shared: dict[str, Any] = {}
    if recipe:  # without values that were derived from a tuned setting, and a run's devices
        shared = read_recipe(recipe, {**options, **dict.fromkeys(tuned, ...)})
        left_out = {"devices", *tuned & {"method"}}
        shared = {name: value for name, value in shared.items() if name not in left_out}
    config = make(TuneConfig, {**shared, **options})
    methods.check_typed(config, options.get("method"), str(recipe))
    space = spaces.read_space(ranges, config.train)
    code.allow(*(str(value) for name in ("student", "teacher") for value in spaces.choices(space, name, "")))
    needs = any(
        part.needs_teacher for name in spaces.methods_of(space, config) for part in methods.parse(name)
    )
    config = with_defaults(config, needs_teacher=needs, tuned=tuned)
    for name in sorted(tuned & set(options)):
        raise UsageError(f"{option_flag(name)} is both set and tuned", "Leave one of them out.")
    if "method" not in tuned:
        output.note_ignored(options, methods.unread(config.method, options), f"with --method {config.method}")
    if "student" not in tuned:
        note_unread_by_student(config, options)
    again = _continue_command(ranges, recipe, options)
    from kdcli.engine.plan import load_data
    from kdcli.studies.tune import search

    search.check(config, space)
    try:
        result = search.tune(config, space, load_data(config, output.on_event), on_event=output.on_event)
    except Interrupted as stopped:
        raise Interrupted(stopped.message, again, exit_code=stopped.exit_code) from stopped
    _show(result, config, again)


def _continue_command(ranges: list[str], recipe: str | None, options: dict[str, Any]) -> str:
    """The command that continues the study, without a password in the storage's address."""
    from kdcli.studies.tune.study import read_url, redacted

    if "storage" in options:
        options = {**options, "storage": redacted(read_url(options["storage"], Path("study.db")))}
    return shell_command("tune", {"tune": ranges, "recipe": recipe, **options})


def _show(result: TuneResult, config: TuneConfig, again: str) -> None:
    from kdcli.studies.tune.summary import command_of

    best, reasons = result.best, [trial.reason for trial in result.trials if trial.reason]
    if best is None or result.config is None:
        raise KdError(
            f"no trial of {config.study_name} is finished{f': {reasons[0]}' if reasons else ''}",
            "Choose other ranges and another --study." if reasons else f"Continue: {again}",
        )
    output.json(result.to_dict())
    names = list(dict.fromkeys(name for trial in result.trials for name in trial.values))
    finished = [trial for trial in result.trials if trial.state == "complete"]
    finished.sort(key=lambda trial: (-(trial.accuracy or 0.0), trial.number))
    rows = [
        [
            str(trial.number),
            *(value_text(trial.values.get(name)) for name in names),
            output.number(trial.accuracy),
        ]
        for trial in finished[:_TOP]
    ]
    columns = ["trial", *(option_flag(name)[2:] for name in names), "val %"]
    output.text(f"best of {len(finished)} finished trials")
    output.table(columns, rows, marked=0)
    output.text()
    if result.importance:
        shares = [[option_flag(name), f"{100 * share:.0f} %"] for name, share in result.importance.items()]
        output.table(["setting", "share of the variance of accuracies"], shares)
    else:
        output.text(result.why_not)
    seeds = f", mean over {config.seeds} seeds" if config.seeds > 1 else ""
    output.text(
        "",
        f"best on the validation split: {best.accuracy:.2f} % in trial {best.number}{seeds}; "
        f"{result.count('complete')} finished, {result.count('pruned')} pruned, {result.count('failed')} failed",
        "the best of many trials is optimistic; confirm on test data",
        *([f"wrote {result.figure.as_posix()}"] if result.figure else []),
    )
    output.next_command(command_of(result.config))
