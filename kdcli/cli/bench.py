"""`kd bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.base import units
from kdcli.base.config import BenchConfig
from kdcli.base.errors import KdError
from kdcli.base.files import write_text
from kdcli.cli import output
from kdcli.cli.arguments import check_output_files, existing_model
from kdcli.cli.options import command, examples

if TYPE_CHECKING:
    from kdcli.deploy.bench import BenchResult, Row

EPILOG = examples(
    "kd bench --data cifar10 --plot bench.svg",
    "kd bench runs/*/student.pt exports/*.onnx --engine onnxruntime --json",
)


@command(BenchConfig)
def bench(
    model: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL", help="Runs, checkpoints and ONNX files; by default all there are."),
    ] = None,
    *,
    config: BenchConfig,
) -> None:
    """Measure size, latency, throughput and accuracy of models against their teacher, on this CPU.

    By default weights/teacher.pt, every runs/*/student.pt and every exports/*.onnx.
    """
    from kdcli import report
    from kdcli.base import plotting
    from kdcli.deploy.bench import bench as run_benchmark
    from kdcli.deploy.bench import default_models, to_csv, to_markdown

    paths = _models(model, config) if model else default_models(config)
    if config.plot is not None:
        plotting.check_target(config.plot)
    check_output_files(config.csv, config.markdown)
    result = run_benchmark(paths, config, on_event=output.on_event, skip=not model)
    output.json(asdict(result))
    _show(result)
    if config.plot is not None:
        report.pareto(result.rows, config.plot)
        output.text(f"wrote {config.plot.as_posix()}")
    for table, make_table in ((config.csv, to_csv), (config.markdown, to_markdown)):
        if table is not None:
            write_text(table, make_table(result))
            output.text(f"wrote {table.as_posix()}")
    _check(result, config)


def _models(named: list[Path], config: BenchConfig) -> list[Path]:
    """The teacher first: --teacher, else weights/teacher.pt if there is one, else the first model named."""
    paths = list(dict.fromkeys(existing_model(path) for path in named))
    if "teacher" in config.model_fields_set or config.teacher.is_file():
        teacher = existing_model(config.teacher)
        return [teacher, *(path for path in paths if path.resolve() != teacher.resolve())]
    return paths


def _check(result: BenchResult, config: BenchConfig) -> None:
    """Name the models within --budget-ms and --max-drop.

    Raises:
        KdError: there is none.
    """
    if result.within_limits is None:
        return
    limits = [f"within --budget-ms {config.budget_ms:g}"] if config.budget_ms is not None else []
    if config.max_drop is not None:
        points = "point" if config.max_drop == 1 else "points"
        limits.append(f"within {config.max_drop:g} {points} of the teacher (--max-drop)")
    text = " and ".join(limits)
    if not result.within_limits:
        unknown = config.max_drop is not None and any(row.accuracy is None for row in result.rows)
        raise KdError(
            f"no model is {text}",
            "Accuracy is not known for all models: pass --data." if unknown else "See the table for the gap.",
        )
    first, *others = (f"{name} ({_short(engine)})" for name, engine in result.within_limits)
    output.text(f"fastest model {text}: {first}{'; also: ' if others else ''}{', '.join(others)}")


def _peak_memory(row: Row) -> str:
    peak = getattr(row.footprint, "peak_rss_bytes", None)
    return "—" if peak is None else units.size(peak)


Column = tuple[str, Callable[["Row"], str]]
_MAIN: list[Column] = [
    ("size", lambda row: units.size(row.network_bytes)),
    ("ms", lambda row: output.number(row.latency_ms, ".3g")),
    ("img/s", lambda row: units.count(row.images_per_s)),
    ("faster", lambda row: _ratio(row.speedup)),
    ("smaller", lambda row: _ratio(row.size_ratio)),
    ("acc %", lambda row: output.number(row.accuracy) + "*" * (row.accuracy_source == "recorded")),
]
_AGREEMENT: list[Column] = [("agree", lambda row: output.number(row.agreement, ".1f"))]
_SPEED: list[Column] = [
    ("95 % of faster", lambda row: "—" if row.is_teacher else output.interval(row.speedup_interval)),
    ("verdict", lambda row: "teacher" if row.is_teacher else row.speed or "—"),
    ("p90", lambda row: output.number(row.latency_p90_ms, ".3g")),
    ("p95", lambda row: output.number(row.latency_p95_ms, ".3g")),
    ("p99", lambda row: output.number(row.latency_p99_ms, ".3g")),
]
_EXTENT: list[Column] = [
    ("param.", lambda row: units.count(row.parameters)),
    ("MACs", lambda row: "—" if row.macs is None else units.count(row.macs)),
    ("file", lambda row: units.size(row.file_bytes)),
]
_FOOTPRINT: list[Column] = [
    ("load", lambda row: output.number(getattr(row.footprint, "load_ms", None), ".3g")),
    ("1st", lambda row: output.number(getattr(row.footprint, "first_ms", None), ".3g")),
    ("memory", _peak_memory),
]


def _show(result: BenchResult) -> None:
    first, cpu = result.rows[0], result.environment["cpu"]["model"]
    has_agreement = any(row.agreement is not None for row in result.rows)
    has_footprint = any(row.footprint is not None for row in result.rows)
    output.text(f"{cpu}, {result.threads} threads; ratios to {result.teacher} on the same engine")
    _table(result.rows, _MAIN + _AGREEMENT * has_agreement, marked=0)
    _table(result.rows, _SPEED)
    _table(result.rows, _EXTENT + _FOOTPRINT * has_footprint)
    paces = ", ".join(f"{size}: {units.count(pace)}" for size, pace in first.throughput.items())
    output.text(
        f"ms, p90, p95, p99: one image, n = {first.latency_n:,} in {result.rounds} rounds; prepared input",
        f"img/s: batches of {max(result.batches)}; of {first.name} ({_engine(first)}) by batch: {paces}",
        "faster, smaller: teacher ÷ model; size: the network alone; under 2 %: no difference",
    )
    if has_footprint:
        output.text(
            "load: ms, file → ready; 1st: ms, first output; memory: peak of a process for this model alone"
        )
    for line in _footnotes(result):
        output.text(line)


def _table(rows: Sequence[Row], columns: Sequence[Column], marked: int = -1) -> None:
    columns = [("model", lambda row: row.name), ("engine", _engine), *columns]
    cells = [[cell(row) for _, cell in columns] for row in rows]
    output.table([title for title, _ in columns], cells, left=2, marked=marked)
    output.text()


def _ratio(value: float | None) -> str:
    return output.number(value, ".2f" if value is not None and value < 9.95 else ",.0f", "×")


def _engine(row: Row) -> str:
    return _short(row.engine) + ("" if row.precision == "fp32" else f" {row.precision}")


def _short(engine: str) -> str:
    return {"onnxruntime": "ort", "compiled": "comp."}.get(engine, engine)


def _footnotes(result: BenchResult) -> list[str]:
    lines = list(result.notes)
    if any(row.accuracy_source == "recorded" for row in result.rows):
        lines.append("* recorded in the file when it was trained; --data measures it")
    if result.data_label:
        lines.append(f"accuracy and agreement: {result.test_images:,} test images of {result.data_label}")
    files = {row.path: row for row in result.rows}
    for row in files.values():
        if row.preprocessing_bytes > 0.05 * row.network_bytes:
            sizes = units.size(row.file_bytes), units.size(row.preprocessing_bytes)
            lines.append(f"{row.name}: {sizes[1]} of the file's {sizes[0]} are preprocessing")
    for row in result.rows:
        label = f"{row.name} ({_short(row.engine)})"
        if row.worse:
            lines.append(f"{label} is slower or bigger than its teacher: {row.verdict}")
        lines += [f"{label}: {note}" for note in row.notes]
    return lines
