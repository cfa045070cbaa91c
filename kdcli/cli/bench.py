"""`kd bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli import _ui
from kdcli.cli._find import existing_model
from kdcli.cli._options import options_of
from kdcli.config import BenchConfig, make

if TYPE_CHECKING:
    from kdcli.bench import BenchResult, Row


@options_of(BenchConfig)
def bench(
    model: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[MODEL]…", help="Checkpoints and ONNX files; by default all there are."),
    ] = None,
    **options: Any,
) -> None:
    """Measure size, latency, throughput and accuracy of models against their teacher, on this CPU.

    By default weights/teacher.pt, every runs/*/student.pt and every exports/*.onnx.
    """
    config = make(BenchConfig, options)
    from kdcli import bench as engine
    from kdcli import report

    paths = _models(model or [], config, named_teacher="teacher" in options)
    if config.plot is not None:
        report.check_target(config.plot)
    with _ui.progress() as on_event:
        result = engine.bench(paths, config, on_event=on_event, skip=not model)
    if _ui.settings.json:
        _ui.json(result.to_json())
    else:
        _show(result)
    if config.plot is not None:
        report.pareto(result.rows, config.plot)
        _ui.say(f"wrote {config.plot.as_posix()}")


def _models(named: list[Path], config: BenchConfig, *, named_teacher: bool) -> list[Path]:
    """The teacher first: --teacher, else weights/teacher.pt if there is one, else the first model named."""
    if not named:
        from kdcli.bench import default_models

        return default_models(config)
    paths = list(dict.fromkeys(existing_model(path) for path in named))
    if named_teacher or config.teacher.is_file():
        teacher = existing_model(config.teacher)
        return [teacher, *(path for path in paths if path.resolve() != teacher.resolve())]
    return paths


def _show(result: BenchResult) -> None:
    cpu = result.environment["cpu"]["model"]
    _ui.say(f"{cpu}, {result.threads} threads; ratios to {result.teacher} on the same engine")
    agreed = any(row.agreement is not None for row in result.rows)
    _ui.table(
        [
            "model",
            "engine",
            "size",
            "ms",
            "img/s",
            "faster",
            "smaller",
            "acc %",
            *(["agree"] if agreed else []),
        ],
        [_cells(row, agreed=agreed) for row in result.rows],
        left=2,
        marked=0,
    )
    _ui.say()
    _ui.table(
        ["model", "engine", "parameters", "MACs", "file", "ms p90", "ms p95"],
        [_more_cells(row) for row in result.rows],
        left=2,
    )
    _ui.say()
    calls = result.rows[0].latency_n
    _ui.say(
        f"ms: one image, median of n = {calls}; "
        f"img/s: batches of {result.batch}, n = {result.rounds}; prepared input"
    )
    _ui.say("faster, smaller: teacher ÷ model; size: the network alone")
    for line in _footnotes(result):
        _ui.say(line)


def _cells(row: Row, *, agreed: bool) -> list[str]:
    agreement = "—" if row.agreement is None else f"{row.agreement:.1f}"
    mark = "*" if row.accuracy_source == "recorded" else ""
    return [
        row.name,
        _engine(row),
        _ui.size(row.network_bytes),
        f"{row.latency_ms:.3g}",
        _ui.count(row.images_per_s),
        _ratio(row.speedup),
        _ratio(row.size_ratio),
        "—" if row.accuracy is None else f"{row.accuracy:.2f}{mark}",
        *([agreement] if agreed else []),
    ]


def _more_cells(row: Row) -> list[str]:
    return [
        row.name,
        _engine(row),
        _ui.count(row.parameters),
        "—" if row.macs is None else _ui.count(row.macs),
        _ui.size(row.file_bytes),
        f"{row.latency_p90_ms:.3g}",
        f"{row.latency_p95_ms:.3g}",
    ]


def _engine(row: Row) -> str:
    return {"onnxruntime": "ort"}.get(row.engine, row.engine)


def _ratio(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.2f}×" if value < 9.95 else f"{value:,.0f}×"


def _footnotes(result: BenchResult) -> list[str]:
    lines = list(result.notes)
    if any(row.accuracy_source == "recorded" for row in result.rows):
        lines.append("* recorded in the file when it was trained; --data measures it")
    if result.data_label:
        lines.append(f"accuracy and agreement: {result.test_images:,} test images of {result.data_label}")
    seen = set()
    for row in result.rows:
        if row.path not in seen and row.preprocessing_bytes > 0.05 * row.network_bytes:
            lines.append(
                f"{row.name}: the file has {_ui.size(row.file_bytes)}, "
                f"{_ui.size(row.preprocessing_bytes)} of it preprocessing"
            )
        seen.add(row.path)
        label = f"{row.name} ({row.engine})"
        if row.worse:
            lines.append(f"{label} does not win in all: {row.verdict}")
        lines += [f"{label}: {note}" for note in row.notes]
    return lines


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "bench",
        epilog="[bold]kd bench --data cifar10 --plot bench.svg[/bold]\n\n"
        "[bold]kd bench runs/*/student.pt exports/*.onnx --engine onnxruntime --json[/bold]",
    )(bench)
