"""`kd tune`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli import methods
from kdcli.base.config import make, words_of
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.recipes import read_recipe
from kdcli.cli import _ui
from kdcli.cli._options import Recipe, options_of
from kdcli.studies.tune.settings import SEARCH, TuneConfig

if TYPE_CHECKING:
    from kdcli.studies.tune.search import Tuned


@options_of(
    TuneConfig,
    metavars={"method": "NAME[+NAME…]", "student": "NETWORK"},
    without=("assistant", "generations"),  # a trial trains a single student
)
def tune(
    *,
    ranges: Annotated[
        list[str] | None,
        typer.Option(
            "--tune",
            help="A setting to search, once for each: NAME=LOW:HIGH, NAME=LOW:HIGH:log, or 'NAME=a|b|c'.",
            metavar="NAME=RANGE",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    recipe: Recipe = None,
    **options: Any,
) -> None:
    """Search for good settings of kd train, judged on validation images; test images are not read.

    Stopped or killed, it is gone on with by the same command, by several processes at once if wanted.
    """
    from kdcli.studies.tune import space as spaces
    from kdcli.studies.tune import storage

    storage.require()
    tuned = spaces.names_of(ranges or [])
    started: dict[str, Any] = {}
    if recipe:  # what followed from a setting that is tuned does not hold
        started = read_recipe(recipe, {**options, **dict.fromkeys(tuned, ...)})
        started = {name: value for name, value in started.items() if name != "method" or name not in tuned}
    config = make(TuneConfig, {**started, **options})
    methods.check_own_method(config, options.get("method"), str(recipe))
    space = spaces.read_space(ranges or [], config.train)
    _note_unread(config, space, options)
    again = _again(config, ranges or [], recipe, options)
    try:
        found = _search(config, space)
    except Interrupted as stopped:
        raise Interrupted(stopped.message, again, exit_code=stopped.exit_code) from stopped
    _finish(found, config, again)


def _note_unread(config: TuneConfig, space: Any, options: dict[str, Any]) -> None:
    tuned = {part.name for part in space}
    for name in sorted(tuned & set(options)):
        raise UsageError(f"--{name.replace('_', '-')} is both set and tuned", "Leave one of them out.")
    if "method" not in tuned:
        _ui.note_ignored(options, methods.unread(config.method, options), f"with --method {config.method}")
    _ui.note_ignored(options, ("save_every", "keep"), "in kd tune: a trial that is killed is begun anew")


def _again(config: TuneConfig, ranges: list[str], recipe: str | None, options: dict[str, Any]) -> str:
    """The command to go on with; a password of the storage is not in it."""
    from kdcli.studies.tune import storage

    words = ["kd", "tune"]
    for text in ranges:
        words += ["--tune", text]
    if recipe:
        words += ["--recipe", recipe]
    for name, value in options.items():
        shown = storage.shown(storage.read_url(str(value), Path("study.db"))) if name == "storage" else value
        words += words_of("--" + name.replace("_", "-"), shown)
    return shlex.join(words)


def _search(config: TuneConfig, space: Any) -> Tuned:
    from kdcli.engine.inputs import load_data
    from kdcli.studies.tune import search

    search.check(config, space)
    with _ui.progress() as on_event:
        return search.tune(config, space, load_data(config, on_event), on_event=on_event)


def _finish(found: Tuned, config: TuneConfig, again: str) -> None:
    from kdcli.studies.tune.summary import command_of

    best, reasons = found.best, [trial.reason for trial in found.trials if trial.reason]
    if best is None or found.config is None:
        why = f": {reasons[0]}" if reasons else ""
        raise KdError(
            f"no trial of {found.study} is finished{why}",
            "Choose other ranges and another --study." if reasons else f"Go on: {again}",
        )
    if _ui.settings.json:
        _ui.json(found.to_json())
        return
    names = list(dict.fromkeys(name for trial in found.trials for name in trial.values))
    ended = sorted(
        (trial for trial in found.trials if trial.state == "complete"),
        key=lambda trial: (-(trial.accuracy or 0.0), trial.number),
    )
    _ui.table(
        ["trial", *(name.replace("_", "-") for name in names), "val %"],
        [
            [
                str(trial.number),
                *(_cell(trial.values.get(name)) for name in names),
                _ui.percent(trial.accuracy),
            ]
            for trial in ended[:10]
        ],
        title=f"best of {len(ended)} finished trials",
        marked=0,
    )
    _ui.say()
    if found.importance:
        _ui.table(
            ["setting", "share of what accuracies differ by"],
            [
                ["--" + name.replace("_", "-"), f"{100 * share:.0f} %"]
                for name, share in found.importance.items()
            ],
        )
    else:
        _ui.say(found.why_not)
    _ui.say()
    of_seeds = f", mean over {config.seeds} seeds" if config.seeds > 1 else ""
    _ui.say(
        f"best on the validation split: {best.accuracy:.2f} % in trial {best.number}{of_seeds}; "
        f"{found.count('complete')} finished, {found.count('pruned')} ended early, {found.count('failed')} failed"
    )
    _ui.say("the highest of many is a little lucky: what it is worth, the test images say")
    for path in found.figures:
        _ui.say(f"wrote {path.as_posix()}")
    _ui.next_command(command_of(found.config))


def _cell(value: Any) -> str:
    if value is None:
        return "—"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "tune",
        epilog="[bold]kd tune --tune tau=1:10 --tune lamda=0:1 --trials 30[/bold]\n\n"
        "[bold]kd tune --method ce --tune lr=1e-4:1e-1 --tune 'optimizer=adam|sgd' --data digits[/bold]",
    )(tune)
