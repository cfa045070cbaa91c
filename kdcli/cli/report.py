"""`kd report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.base import units
from kdcli.base.config import ReportConfig, make
from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import write_text
from kdcli.cli import _ui
from kdcli.cli._options import examples, options_of

if TYPE_CHECKING:
    from kdcli.report import Report

EPILOG = examples(
    "kd report -o report.html",
    "kd report runs/kd-lenet-1 runs/ce-lenet-1 --bench bench.json",
)


@options_of(ReportConfig)
def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]…",
            help="Folders of runs and comparisons; by default all below runs/ and comparisons/.",
        ),
    ] = None,
    **options: Any,
) -> None:
    """Write one HTML page about runs: accuracy, speed, classes, confusions, disagreements with the teacher.

    The page is self-contained. No choice on it depends on test data.
    """
    config = make(ReportConfig, options)
    if config.bench is not None and config.no_bench:
        raise UsageError("--bench and --no-bench exclude each other", "Leave one of them out.")
    for path in (config.bench, config.teacher):
        if path is not None and not path.is_file():
            raise KdError(f"no such file: {path}", "Pass an existing file, or leave the option out.")
    if config.output.is_dir():
        raise UsageError(f"{config.output} is a folder", "Pass a file: -o report.html")
    if config.no_bench or config.bench is not None:
        why = "with --no-bench" if config.no_bench else "with --bench"
        _ui.note_ignored(options, ("bench_rounds",), why)
    if config.no_images:
        _ui.note_ignored(options, ("thumbnails",), "with --no-images")
    from kdcli.base import runtime
    from kdcli.report import gather, make_report

    runtime.set_threads(config.threads)
    folders = gather.folders(runs or [])
    exports = () if runs else tuple(sorted(Path("exports").glob("*.onnx")))
    with _ui.progress() as on_event:
        made = make_report(
            folders, config, others=exports, comparisons=gather.comparisons(runs or []), on_event=on_event
        )
    write_text(config.output, made.html)
    _show(made, config)


def _show(made: Report, config: ReportConfig) -> None:
    from kdcli.report.page import reason_groups

    size = config.output.stat().st_size
    for reason, names in reason_groups(made.left_out):
        _ui.note(f"left out, {reason}: {', '.join(names)}")
    for line in made.notes:
        _ui.note(line)
    if _ui.settings.json:
        _ui.json(
            {
                "output": config.output.as_posix(),
                "bytes": size,
                "runs": list(made.runs),
                "comparisons": list(made.comparisons),
                "left_out": [{"run": name, "reason": reason} for name, reason in made.left_out],
                "notes": list(made.notes),
            }
        )
        return
    _ui.table(
        ["run", "test %", "agree %", "ms", "faster"],
        [
            [
                Path(run["run"]).name,
                _ui.percent(run["test_accuracy"]),
                _ui.percent(run["agreement"]),
                "—" if run["latency_ms"] is None else f"{run['latency_ms']:.3g}",
                "—" if run["speedup"] is None else f"{run['speedup']:.2f}×",
            ]
            for run in made.runs
        ],
    )
    _ui.say(f"wrote {config.output.as_posix()} ({units.size(size)}); it opens in any browser")
