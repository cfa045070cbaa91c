"""`kd demo`: the whole chain on small real data."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kdcli import methods
from kdcli.base import units
from kdcli.base.config import BenchConfig, DemoConfig, ExportConfig, ReportConfig, make
from kdcli.base.errors import Interrupted, UsageError
from kdcli.cli import _ui
from kdcli.cli._options import options_of
from kdcli.methods import TrainConfig

if TYPE_CHECKING:
    from kdcli.base.events import OnEvent
    from kdcli.deploy.bench import Row
    from kdcli.engine import RunResult

# What kd demo trains; every value is one a user could type to kd train.
TEACHER = {"method": "ce", "student": "convnet-large", "epochs": 20, "batch_size": 64, "lr": 3e-3}
STUDENT = {"student": "convnet-tiny", "epochs": 60, "batch_size": 64, "lr": 1e-2}
COMMON = {"data": "digits", "val_fraction": 0.15}
QUICK_BENCH = {"rounds": 48, "max_seconds": 6, "no_memory": True}  # to be done in two minutes


@options_of(DemoConfig)
def demo(**options: Any) -> None:
    """The chain on small real data: teacher, four students, ONNX, int8, benchmark, report. Offline, under 2 minutes.

    The data are the 1,797 handwritten digits that scikit-learn ships. The best student is the one with the highest
    accuracy on the validation split; the test images are used once, at the end of each run.
    """
    config = make(DemoConfig, options)
    _empty_or_ours(config.output)
    started = time.monotonic()
    try:
        with _inside(config.output):
            results, rows, exported = _chain(config)
    except Interrupted as stopped:  # its own hint would continue one run, and not the demo
        raise Interrupted(
            "kd demo was stopped", "Type it again: it starts anew.", exit_code=stopped.exit_code
        ) from stopped
    _render(config.output, results, rows, exported, time.monotonic() - started)


def _empty_or_ours(folder: Path) -> None:
    """A second demo replaces the first, and nothing that is not a demo's."""
    import shutil

    if not folder.exists():
        return
    marker = folder / "kd-demo.txt"
    if not marker.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not a demo's folder", "Choose another with -o.")
    for name in ("runs", "exports", "weights"):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Make the folder the current one, so that the demo's paths are those a user would type in it."""
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _chain(config: DemoConfig) -> tuple[list[RunResult], list[Row], list[Path]]:
    import shutil

    from kdcli import data, report
    from kdcli.base.files import write_text
    from kdcli.deploy.bench import bench
    from kdcli.deploy.export import export
    from kdcli.engine import fit
    from kdcli.report import speed

    write_text(Path("kd-demo.txt"), "Made by kd demo, which replaces runs/, exports/ and weights/ here.\n")
    teacher_path = Path("weights/teacher.pt")
    common = {**COMMON, "seed": config.seed, "threads": config.threads}
    with _ui.progress() as on_event:
        splits = data.load("digits", on_event=on_event)

        def train(step: str, values: dict[str, Any]) -> RunResult:
            settings = make(TrainConfig, {**common, **values})
            result = fit(settings, splits, on_event=_titled(step, on_event))
            report.curves(result.run.metrics_file, result.run.path / "curves.svg")
            return result

        results = [train("1/4 teacher", {**TEACHER, "name": "teacher"})]
        teacher_path.parent.mkdir(exist_ok=True)
        shutil.copyfile(results[0].run.student, teacher_path)
        for method in methods.REFERENCE:
            values = {**STUDENT, "method": method, "name": method, "teacher": teacher_path}
            results.append(train(f"2/4 {method}", values))
        best = max(results[1:], key=lambda result: result.val_accuracy or 0.0)
        exported = []
        for int8 in (False, True):
            suffix = "-int8" if int8 else ""
            target = Path(f"exports/{best.config.method}{suffix}.onnx")
            wanted = make(ExportConfig, {"output": target, "int8": int8})
            exported.append(
                export(best.run.student, wanted, splits, on_event=_titled("3/4 export", on_event)).path
            )
        models = [teacher_path, *(result.run.student for result in results[1:]), *exported]
        measured = bench(
            models,
            make(BenchConfig, QUICK_BENCH | {"teacher": teacher_path, "threads": config.threads}),
            splits,
            on_event=_titled("4/4 bench", on_event),
        )
        of_bench = speed.of_bench(measured.rows, measured.threads, measured.environment, measured.notes)
        page = report.make_report(
            [result.run.path for result in results],
            make(ReportConfig, {"output": Path("report.html"), "threads": config.threads}),
            speed=of_bench,
            on_event=_titled("4/4 report", on_event),
        )
        report.write_report(page, Path("report.html"))
    return results, list(measured.rows), exported


def _titled(title: str, on_event: OnEvent) -> OnEvent:
    """Say which step of the demo a bar belongs to; leave its parts' own notes out."""
    from dataclasses import replace

    from kdcli.base.events import Event, Progress

    def tell(event: Event) -> None:
        if isinstance(event, Progress):
            group = f"{title}: {event.group or event.task}"
            on_event(replace(event, task=f"{title}: {event.task}", group=group))

    return tell


def _render(
    folder: Path, results: list[RunResult], rows: list[Row], exported: list[Path], seconds: float
) -> None:
    best = max(results[1:], key=lambda result: result.val_accuracy or 0.0)
    if _ui.settings.json:
        _ui.json(
            {
                "folder": folder.as_posix(),
                "seconds": seconds,
                "best": best.config.method,
                "runs": [result.to_json() for result in results],
                "rows": [{**vars(row), "path": row.path.as_posix()} for row in rows],
            }
        )
        return
    # each model on the engine it is deployed with; a checkpoint is exported on the fly for that
    shown = [row for row in rows if row.engine == "onnxruntime"]
    _ui.table(
        ["method", "test %", "agree %", "params", "size", "latency", "speed-up"],
        [_cells(row, row.path in exported) for row in shown],
        marked=next((index for index, row in enumerate(shown) if row.path == best.run.student), -1),
    )
    _ui.say()
    _ui.say(
        f"digits, {results[0].evaluation.count} test images: one image is "
        f"{100 / results[0].evaluation.count:.2f} points, so small differences here mean nothing."
    )
    _ui.say("size, latency: of the network alone, one image, onnxruntime; speed-up: against the teacher.")
    _ui.say(f"best on the validation split: {best.config.method}")
    _ui.say(f"done in {_ui.clock(seconds)}; everything is in {folder.as_posix()}/:")
    for text, path in (
        ("teacher ", Path("weights/teacher.pt")),
        ("students", Path("runs/<method>/student.pt")),
        ("ONNX    ", exported[0]),
        ("int8    ", exported[1]),
        ("report  ", Path("report.html")),
    ):
        _ui.say(f"  {text}  {path.as_posix()}")
    _ui.next_command(f"cd {shlex.quote(folder.as_posix())} && kd test {best.run.student.as_posix()}")


def _cells(row: Row, is_export: bool) -> list[str]:
    name = "teacher" if row.is_teacher else row.path.parent.name
    if is_export:
        name = row.path.name
    return [
        name,
        _ui.percent(row.accuracy),
        _ui.percent(None if row.is_teacher else row.agreement),
        units.count(row.parameters),
        units.size(row.network_bytes),
        f"{row.latency_ms * 1e3:.0f} µs",
        "1.0×" if row.is_teacher or row.speedup is None else f"{row.speedup:.1f}×",
    ]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo", epilog="[bold]kd demo[/bold]\n\n[bold]kd demo -o /tmp/demo --seed 1[/bold]")(demo)
