"""`kd demo`: the whole workflow on small real data."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.base import units
from kdcli.base.config import BenchConfig, DemoConfig, ExportConfig, ReportConfig, make
from kdcli.base.errors import Interrupted, UsageError
from kdcli.base.events import Event, OnEvent, Progress
from kdcli.base.files import write_text
from kdcli.cli import output
from kdcli.cli.options import command, examples
from kdcli.methods import TrainConfig

if TYPE_CHECKING:
    from kdcli.deploy.bench import Row
    from kdcli.engine import RunResult

# Settings of the runs, all of them options of kd train.
TEACHER = {"method": "ce", "student": "convnet-large", "epochs": 20, "batch_size": 64, "lr": 3e-3}
METHODS = ("ce", "logits", "noisy", "kd")
STUDENT = {"student": "convnet-tiny", "epochs": 60, "batch_size": 64, "lr": 1e-2}
TEACHER_FILE = Path("weights/teacher.pt")
COMMON = {"data": "digits", "val_fraction": 0.15}
QUICK_BENCH = {"rounds": 48, "max_seconds": 6, "no_memory": True}  # within two minutes
EPILOG = examples("kd demo", "kd demo -o /tmp/demo --seed 1")


@command(DemoConfig)
def demo(config: DemoConfig) -> None:
    """The whole workflow: teacher, four students, ONNX, int8, benchmark, report. Offline, in under 2 minutes.

    The data are the 1,797 handwritten digits that scikit-learn ships. The best student is the one with the highest
    accuracy on the validation split; the test images are used once, at the end of each run.
    """
    _clear(config.output)
    started = time.monotonic()
    try:
        with contextlib.chdir(config.output):  # the runs read their files by relative paths
            results, best, rows = _run(config, output.on_event)
            _show(config.output, results, best, rows, time.monotonic() - started)
    except Interrupted as stopped:
        raise Interrupted(
            "kd demo was stopped", "Rerun it: it starts from the beginning.", exit_code=stopped.exit_code
        ) from stopped


def _clear(folder: Path) -> None:
    """Create the folder, or remove the output of an earlier demo; a UsageError if it has other content."""
    marker = folder / "kd-demo.txt"
    if folder.exists() and not marker.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not the folder of a demo", "Pass another folder with -o.")
    for name in ("runs", "exports", "weights"):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_text(marker, "Made by kd demo, which replaces runs/, exports/ and weights/ here.\n")


def _run(config: DemoConfig, on_event: OnEvent) -> tuple[list[RunResult], RunResult, list[Row]]:
    """Results of the teacher and the students, the best student's, and benchmark rows."""
    from kdcli import data, models, report
    from kdcli.deploy.bench import bench
    from kdcli.deploy.export import export
    from kdcli.engine import fit
    from kdcli.report import speed

    common = {**COMMON, "seed": config.seed, "threads": config.threads}
    splits = data.load("digits", on_event=on_event)

    def train(step: str, **values: Any) -> RunResult:
        result = fit(make(TrainConfig, {**common, **values}), splits, on_event=_titled(step, on_event))
        report.curves(result.run.metrics_file, result.run.path / "curves.svg")
        return result

    # 1. Train the teacher.
    results = [train("1/4 teacher", **TEACHER, name="teacher")]
    TEACHER_FILE.parent.mkdir(exist_ok=True)
    shutil.copyfile(results[0].run.student, TEACHER_FILE)
    # 2. Train the students and choose the best on the validation split.
    for method in METHODS:
        results.append(train(f"2/4 {method}", **STUDENT, method=method, name=method, teacher=TEACHER_FILE))
    best = max(results[1:], key=lambda result: result.val_accuracy or 0.0)
    # 3. Export it.
    exports = []
    for name, int8 in ((best.config.method, False), (f"{best.config.method}-int8", True)):
        settings = make(ExportConfig, {"output": Path(f"exports/{name}.onnx"), "int8": int8})
        exported = export(
            models.load(best.run.student), settings, splits, on_event=_titled("3/4 export", on_event)
        )
        exports.append(exported.path)
    # 4. Measure all models and write the report.
    measured = bench(
        [TEACHER_FILE, *(result.run.student for result in results[1:]), *exports],
        make(BenchConfig, QUICK_BENCH | {"teacher": TEACHER_FILE, "threads": config.threads}),
        splits,
        on_event=_titled("4/4 bench", on_event),
    )
    page = report.make_report(
        [result.run.path for result in results],
        make(ReportConfig, {"output": Path("report.html"), "threads": config.threads}),
        speed=speed.of_bench(measured),
        on_event=_titled("4/4 report", on_event),
    )
    write_text(Path("report.html"), page.html)
    return results, best, list(measured.rows)


def _titled(title: str, on_event: OnEvent) -> OnEvent:
    """Forward progress events with the demo's step in their title; drop notes."""

    def forward(event: Event) -> None:
        if isinstance(event, Progress):
            on_event(event.under(title))

    return forward


def _show(folder: Path, results: list[RunResult], best: RunResult, rows: list[Row], seconds: float) -> None:
    output.json(
        {
            "folder": folder.as_posix(),
            "seconds": seconds,
            "best": best.config.method,
            "runs": [result.to_dict() for result in results],
            "rows": [vars(row) for row in rows],
        }
    )
    # each model on the engine it is deployed with; the benchmark exports a checkpoint for that
    rows = [row for row in rows if row.engine == "onnxruntime"]
    output.table(
        ["method", "test %", "agree %", "params", "size", "latency", "speed-up"],
        [_cells(row) for row in rows],
        marked=[row.path for row in rows].index(best.run.student),
    )
    count = best.evaluation.count
    output.text(
        "",
        f"digits, {count} test images: one image is {100 / count:.2f} points; small differences are noise.",
        "size, latency: of the network alone, one image, onnxruntime; speed-up: over the teacher.",
        f"best on the validation split: {best.config.method}",
        f"done in {output.clock(seconds)}; everything is in {folder.as_posix()}/:",
        f"  teacher   {TEACHER_FILE.as_posix()}",
        "  students  runs/<method>/student.pt",
        f"  ONNX      exports/{best.config.method}.onnx",
        f"  int8      exports/{best.config.method}-int8.onnx",
        "  report    report.html",
    )
    output.next_command(f"cd {shlex.quote(folder.as_posix())} && kd test {best.run.student.as_posix()}")


def _cells(row: Row) -> list[str]:
    name = row.path.name if row.path.suffix == ".onnx" else row.path.parent.name
    return [
        "teacher" if row.is_teacher else name,
        output.number(row.accuracy),
        output.number(None if row.is_teacher else row.agreement),
        units.count(row.parameters),
        units.size(row.network_bytes),
        f"{row.latency_ms * 1e3:.0f} µs",
        output.number(1.0 if row.is_teacher else row.speedup, ".1f", "×"),
    ]
