"""`kd clean`."""

from pathlib import Path
from typing import Annotated

import typer

from kdcli.base import runs as folders
from kdcli.base import units
from kdcli.base.config import CleanConfig, shell_command
from kdcli.base.errors import UsageError
from kdcli.cli import output
from kdcli.cli.arguments import run_folder
from kdcli.cli.options import command, examples

EPILOG = examples("kd clean --dry-run", "kd clean kd-lenet-1 --yes")


@command(CleanConfig)
def clean(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            help="Runs and comparisons whose saved states are deleted, interrupted ones too; by default those of "
            "finished runs, and the caches.",
        ),
    ] = None,
    *,
    config: CleanConfig,
) -> None:
    """Delete caches and the saved states (last.pt) of finished runs, after confirmation.

    Models, results and metrics are kept. Caches are computed again when needed.
    """
    paths = [run_folder(path) for path in runs or ()]
    for path in paths:
        if not (path / "config.toml").exists() and not (path / "comparison.toml").exists():
            raise UsageError(f"not a run or comparison: {path}", "List the runs: kd runs")
    # a comparison stands for all its runs
    named = [run for path in paths for run in folders.run_folders(path / "runs") or [path]]
    for run in named:
        if folders.state(run) == "running":
            raise UsageError(f"{run} is in use: a process trains it", "List the states of runs: kd runs")
    states = {} if named else {run: folders.state(run) for run in folders.all_runs()}
    finished = [run for run in states if states[run] == "finished"]
    found = {run: folders.saved_states(run) for run in (*named, *finished)}
    if "running" in states.values():
        output.note("caches are kept: a run is in progress")
    elif not named:
        found |= folders.cache_entries(config.cache_dir)
    rows = [
        (place.as_posix(), sum(map(folders.size_on_disk, paths))) for place, paths in found.items() if paths
    ]
    total = sum(size for _, size in rows)
    if rows:
        output.table(["folder", "size"], [[name, units.size(size)] for name, size in rows])
    if rows and not config.dry_run and not config.yes:
        question = f"Delete {units.size(total)} of caches and saved states?"
        if not output.confirm(question):
            typed = config.model_dump(include=config.model_fields_set)
            again = shell_command("clean", {**typed, "yes": True}, *named)
            raise UsageError("not confirmed, nothing deleted", f"Delete without confirmation: {again}")
    if not config.dry_run:
        for path in (path for paths in found.values() for path in paths):
            folders.delete(path)
    output.json({"folders": dict(rows), "bytes": total, "deleted": not config.dry_run})
    output.text(f"{units.size(total)} {'can be freed' if config.dry_run else 'freed'}")
