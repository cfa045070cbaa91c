"""`kd runs`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kdcli.base import units
from kdcli.base.runs import RUNS, document, run_folders, size_on_disk, state
from kdcli.cli import output
from kdcli.cli.options import command, examples

EPILOG = examples("kd runs", "kd runs comparisons/NAME/runs --json")


@command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that holds the runs.")] = RUNS,
) -> None:
    """List runs, the newest last: method, student, data, test accuracy, state, size on disk."""
    found = [_describe(run) for run in run_folders(folder)]
    output.json({"runs": found})
    if not found:
        output.text(f"no runs in {folder.as_posix()}")
        return
    output.table(
        ["run", "method", "student", "data", "test %", "state", "size"],
        [
            [
                *(str(run[key]) for key in ("run", "method", "student", "data")),
                output.number(run["accuracy"]),
                run["state"],
                units.size(run["bytes"]),
            ]
            for run in found
        ],
        left=4,
    )
    if folder == RUNS and any(run["state"] == "interrupted" for run in found):
        output.next_command("kd train --resume")


def _describe(run: Path) -> dict[str, Any]:
    config, test = document(run / "config.toml"), document(run / "result.json").get("test")
    accuracy = test.get("accuracy") if isinstance(test, dict) else None
    return {
        "run": run.name,
        **{key: config.get(key, "—") for key in ("method", "student", "data")},
        "accuracy": accuracy if isinstance(accuracy, float) else None,
        "state": state(run),
        "bytes": size_on_disk(run),
    }
