"""`kd bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.base import units
from kdcli.base.config import BenchConfig, make
from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import write_text
from kdcli.cli import _ui
from kdcli.cli._find import existing_model
from kdcli.cli._options import options_of

if TYPE_CHECKING:
    from kdcli.deploy.bench import BenchResult, Row


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
    from kdcli import report
    from kdcli.base import plotting
    from kdcli.deploy import bench as engine
    from kdcli.deploy.bench import tables

    paths = _models(model or [], config, named_teacher="teacher" in options)
    if config.plot is not None:
        plotting.check_target(config.plot)
    for table in (config.csv, config.markdown):
        if table is not None and table.is_dir():
            raise UsageError(f"{table} is a folder", "Name the file to write.")
    with _ui.progress() as on_event:
        result = engine.bench(paths, config, on_event=on_event, skip=not model)
    if _ui.settings.json:
        _ui.json(result.to_json())
    else:
        _show(result)
    if config.plot is not None:
        report.pareto(result.rows, config.plot)
        _ui.say(f"wrote {config.plot.as_posix()}")
    for table, make_table in ((config.csv, tables.to_csv), (config.markdown, tables.to_markdown)):
        if table is not None:
            write_text(table, make_table(result))
            _ui.say(f"wrote {table.as_posix()}")
    _check(result)


def _models(named: list[Path], config: BenchConfig, *, named_teacher: bool) -> list[Path]:
    """The teacher first: --teacher, else weights/teacher.pt if there is one, else the first model named."""
    if not named:
        from kdcli.deploy.bench import default_models

        return default_models(config)
    paths = list(dict.fromkeys(existing_model(path) for path in named))
    if named_teacher or config.teacher.is_file():
        teacher = existing_model(config.teacher)
        return [teacher, *(path for path in paths if path.resolve() != teacher.resolve())]
    return paths


def _check(result: BenchResult) -> None:
    """Say what keeps to --budget-ms and --max-drop.

    Raises:
        KdError: nothing does.
    """
    wanted = result.wanted
    if wanted is None:
        return
    asked = [f"--budget-ms {wanted.budget_ms:g}"] if wanted.budget_ms is not None else []
    asked += [f"--max-drop {wanted.max_drop:g}"] if wanted.max_drop is not None else []
    if not wanted.met:
        unknown = wanted.max_drop is not None and any(row.accuracy is None for row in result.rows)
        raise KdError(
            f"no model keeps to {' and '.join(asked)}",
            "Accuracy is not known of all: name --data."
            if unknown
            else "The table shows by how much they miss it.",
        )
    first, *others = (f"{name} ({_short(engine)})" for name, engine in wanted.met)
    more = f"; so do {', '.join(others)}" if others else ""
    _ui.say(f"{first} is the fastest that keeps to {' and '.join(asked)}{more}")


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
        ["model", "engine", "95 % of faster", "verdict", "p90", "p95", "p99"],
        [_speed_cells(row) for row in result.rows],
        left=2,
    )
    _ui.say()
    measured = any(row.alone is not None for row in result.rows)
    _ui.table(
        ["model", "engine", "param.", "MACs", "file", *(["load", "1st", "memory"] if measured else [])],
        [_more_cells(row, measured=measured) for row in result.rows],
        left=2,
    )
    _ui.say()
    first = result.rows[0]
    _ui.say(
        f"ms, p90, p95, p99: one image, n = {first.latency_n:,} in {result.rounds} rounds; prepared input"
    )
    paces = ", ".join(f"{size}: {units.count(pace)}" for size, pace in first.throughput.items())
    _ui.say(f"img/s: batches of {max(result.batches)}; of {first.name} ({_engine(first)}) by batch: {paces}")
    _ui.say("faster, smaller: teacher ÷ model; size: the network alone; under 2 %: no difference")
    if measured:
        _ui.say(
            "load: ms, file → ready; 1st: ms, first answer; memory: peak of a process for this model alone"
        )
    for line in _footnotes(result):
        _ui.say(line)


def _cells(row: Row, *, agreed: bool) -> list[str]:
    agreement = "—" if row.agreement is None else f"{row.agreement:.1f}"
    mark = "*" if row.accuracy_source == "recorded" else ""
    return [
        row.name,
        _engine(row),
        units.size(row.network_bytes),
        f"{row.latency_ms:.3g}",
        units.count(row.images_per_s),
        _ratio(row.speedup),
        _ratio(row.size_ratio),
        "—" if row.accuracy is None else f"{row.accuracy:.2f}{mark}",
        *([agreement] if agreed else []),
    ]


def _speed_cells(row: Row) -> list[str]:
    low, high = row.speedup_interval or (None, None)
    return [
        row.name,
        _engine(row),
        "—" if row.is_teacher or low is None else f"{low:.2f}–{high:.2f}",
        "teacher" if row.is_teacher else row.speed or "—",
        *(
            "—" if value is None else f"{value:.3g}"
            for value in (row.latency_p90_ms, row.latency_p95_ms, row.latency_p99_ms)
        ),
    ]


def _more_cells(row: Row, *, measured: bool) -> list[str]:
    cells = [
        row.name,
        _engine(row),
        units.count(row.parameters),
        "—" if row.macs is None else units.count(row.macs),
        units.size(row.file_bytes),
    ]
    if not measured:
        return cells
    alone = row.alone
    if alone is None or alone.load_ms is None or alone.first_ms is None:
        return [*cells, "—", "—", "—"]
    peak = "—" if alone.peak_rss_bytes is None else units.size(alone.peak_rss_bytes)
    return [*cells, f"{alone.load_ms:.3g}", f"{alone.first_ms:.3g}", peak]


def _engine(row: Row) -> str:
    return _short(row.engine) + (" int8" if row.precision == "int8" else "")


def _short(engine: str) -> str:
    return {"onnxruntime": "ort", "compiled": "comp."}.get(engine, engine)


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
                f"{row.name}: the file has {units.size(row.file_bytes)}, "
                f"{units.size(row.preprocessing_bytes)} of it preprocessing"
            )
        seen.add(row.path)
        label = f"{row.name} ({_short(row.engine)})"
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
