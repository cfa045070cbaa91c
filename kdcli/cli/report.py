"""`kd report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.base import units
from kdcli.base.config import ReportConfig, shell_command
from kdcli.base.errors import UsageError
from kdcli.base.files import write_text
from kdcli.cli import output
from kdcli.cli.arguments import existing_model, run_folder
from kdcli.cli.options import command, examples

if TYPE_CHECKING:
    from kdcli.report import Report

EPILOG = examples("kd report -o report.html", "kd report kd-lenet-1 ce-lenet-1 --bench bench.json")


@command(ReportConfig)
def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            help="Runs and comparisons, by name or folder; by default all in runs/ and comparisons/.",
        ),
    ] = None,
    *,
    config: ReportConfig,
) -> None:
    """Write one HTML page about runs: accuracy, speed, classes, confusions, disagreements with the teacher.

    The page is self-contained. Its selections depend on validation data only.
    """
    if config.bench is not None and config.no_bench:
        raise UsageError("--bench and --no-bench exclude each other", "Leave one of them out.")
    from kdcli.base import runtime
    from kdcli.report import gather, make_report

    runtime.set_threads(config.threads)
    typed = config.model_dump(include=config.model_fields_set)
    if config.teacher is not None:
        config = config.model_copy(update={"teacher": existing_model(config.teacher)})
    named = [run_folder(path) for path in runs or ()]
    folders = gather.folders(named)
    exports = () if runs else tuple(sorted(Path("exports").glob("*.onnx")))
    comparisons = gather.comparisons(named)
    made = make_report(
        folders,
        config,
        command=shell_command("report", typed, *(runs or ())),
        others=exports,
        comparisons=comparisons,
        on_event=output.on_event,
    )
    write_text(config.output, made.html)
    _show(made, config)


def _show(made: Report, config: ReportConfig) -> None:
    from kdcli.report.page import reason_groups

    size = config.output.stat().st_size
    for reason, names in reason_groups(made.left_out):
        output.note(f"left out, {reason}: {', '.join(names)}")
    for line in made.notes:
        output.note(line)
    output.json(
        {
            "output": config.output.as_posix(),
            "bytes": size,
            "runs": list(made.runs),
            "comparisons": list(made.comparisons),
            "left_out": [{"run": name, "reason": reason} for name, reason in made.left_out],
            "notes": list(made.notes),
        }
    )
    output.table(
        ["run", "test %", "agree %", "ms", "faster"],
        [
            [
                Path(run["run"]).name,
                output.number(run["test_accuracy"]),
                output.number(run["agreement"]),
                output.number(run["latency_ms"], ".3g"),
                output.number(run["speedup"], unit="×"),
            ]
            for run in made.runs
        ],
    )
    output.text(f"wrote {config.output.as_posix()} ({units.size(size)}); it opens in any browser")
