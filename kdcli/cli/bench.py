"""`kd bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.base import units
from kdcli.base.config import BenchConfig, shell_command
from kdcli.base.errors import KdError
from kdcli.base.files import sha256_file, write_text
from kdcli.cli import output
from kdcli.cli.arguments import existing_model
from kdcli.cli.defaults import teacher_of
from kdcli.cli.options import command, examples

if TYPE_CHECKING:
    from kdcli.deploy.bench import BenchResult, Row

EPILOG = examples(
    "kd bench --data cifar10 --plot bench.svg",
    "kd bench runs/*/student.pt exports/*.onnx --engine onnxruntime --json",
)


@command(BenchConfig, without={"class_map"})
def bench(
    model: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL", help="Runs, checkpoints and ONNX files; by default all."),
    ] = None,
    *,
    config: BenchConfig,
) -> None:
    """Measure size, latency, throughput and accuracy of models against their teacher, on this CPU.

    By default weights/teacher.pt, every runs/*/student.pt and every exports/*.onnx.
    """
    from kdcli import report
    from kdcli.deploy.bench import bench as run_benchmark
    from kdcli.deploy.bench import to_csv, to_markdown

    paths = distinct(_models(model, config) if model else default_models(config))
    result = run_benchmark(paths, config, on_event=output.on_event, skip=not model)
    output.json(result.to_dict())
    _show(result, config.details)
    if config.plot is not None:
        report.pareto(result.rows, config.plot)
        output.text(f"wrote {config.plot.as_posix()}")
    for table, make_table in ((config.csv, to_csv), (config.markdown, to_markdown)):
        if table is not None:
            write_text(table, make_table(result))
            output.text(f"wrote {table.as_posix()}")
    _check(result, config)


def default_models(config: BenchConfig) -> list[Path]:
    """The teacher, every finished student and every export; a KdError if there is nothing to compare."""
    teacher = teacher_of(config)
    found = [*sorted(Path("runs").glob("*/student.pt")), *sorted(Path("exports").glob("*.onnx"))]
    rest = [path for path in found if path.resolve() != teacher.resolve()]
    if not rest:
        train = shell_command("train", {"teacher": teacher})
        raise KdError(f"nothing to compare {teacher} with", f"Train a student: {train}")
    return [teacher, *rest]


def _models(named: list[Path], config: BenchConfig) -> list[Path]:
    """The teacher first: --teacher, else weights/teacher.pt if there is one, else the first model named."""
    paths = list(dict.fromkeys(existing_model(path) for path in named))
    if "teacher" in config.model_fields_set or config.teacher.is_file():
        teacher = existing_model(config.teacher)
        return [teacher, *(path for path in paths if path.resolve() != teacher.resolve())]
    return paths


def distinct(paths: list[Path]) -> list[Path]:
    """The first of files with the same content; ONNX files may hold their weights in files of their folder."""
    first: dict[tuple[str, Path | None], Path] = {}
    for path in paths:
        place = path.resolve().parent if path.suffix.lower() == ".onnx" else None
        kept = first.setdefault((sha256_file(path), place), path)
        if kept != path:
            output.note(f"{path} has the same content as {kept}")
    return list(first.values())


def _check(result: BenchResult, config: BenchConfig) -> None:
    """Name the models within --budget-ms and --max-drop.

    Raises KdError if there is none.
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
    first, *others = (f"{name} ({_ENGINES[engine]})" for name, engine in result.within_limits)
    output.text(f"fastest model {text}: {first}{'; also: ' if others else ''}{', '.join(others)}")


def _peak_memory(row: Row) -> str:
    peak = getattr(row.footprint, "peak_rss_bytes", None)
    return "—" if peak is None else units.size(peak)


_ENGINES = {"onnxruntime": "ort", "compiled": "comp.", "torch": "torch"}
Column = tuple[str, Callable[["Row"], str]]
_NAME: list[Column] = [
    ("model", lambda row: row.name),
    ("engine", lambda row: _ENGINES[row.engine] + ("" if row.precision == "fp32" else f" {row.precision}")),
]
_MAIN: list[Column] = [
    ("size", lambda row: units.size(row.network_bytes)),
    ("ms", lambda row: output.number(row.latency_ms, ".3g")),
    ("img/s", lambda row: units.count(row.images_per_s)),
    ("faster", lambda row: _ratio(row.speedup)),
    ("smaller", lambda row: _ratio(row.size_ratio)),
    ("acc %", lambda row: output.number(row.accuracy) + "*" * (row.accuracy_source == "recorded")),
    ("agree", lambda row: output.number(row.agreement, ".1f")),
]
_DETAILS: list[Column] = [
    ("95 % of faster", lambda row: "—" if row.is_teacher else output.interval(row.speedup_interval)),
    ("p90", lambda row: output.number(row.latency_p90_ms, ".3g")),
    ("p95", lambda row: output.number(row.latency_p95_ms, ".3g")),
    ("p99", lambda row: output.number(row.latency_p99_ms, ".3g")),
    ("MACs", lambda row: "—" if row.macs is None else units.count(row.macs)),
]
_FOOTPRINT: list[Column] = [
    ("param.", lambda row: units.count(row.parameters)),
    ("file", lambda row: units.size(row.file_bytes)),
    ("load", lambda row: output.number(getattr(row.footprint, "load_ms", None), ".3g")),
    ("1st", lambda row: output.number(getattr(row.footprint, "first_ms", None), ".3g")),
    ("memory", _peak_memory),
]


def _show(result: BenchResult, details: bool) -> None:
    from kdcli.deploy.bench import deployed

    cpu = result.environment["cpu"]["model"]
    output.text(f"{cpu}, {result.threads} threads; ratios to {result.teacher} on the same engine")
    files = deployed(result.rows)
    rows = result.rows if details else files
    tested = any(row.agreement is not None for row in rows)
    _table(rows, _MAIN if tested else _MAIN[:-1], marked=0)
    for row in files:
        if not row.is_teacher:
            output.text(_sentence(row, result.rows[0]))
    output.text("", *result.notes, *(f"{row.name}: {note}" for row in rows for note in row.notes))
    if any(row.accuracy_source == "recorded" for row in rows):
        output.text("* recorded in the file when it was trained; --data measures it")
    if result.data_label:
        output.text(f"accuracy and agreement: {result.test_images:,} test images of {result.data_label}")
    output.text(f"ms: one image, median of {rows[0].latency_n:,}; img/s: batches of {max(result.batches)}")
    if details:
        _show_details(result)


def _sentence(row: Row, teacher: Row) -> str:
    """`kd: 3.65× faster (3.41–3.80), 150× smaller, accuracy 0.83 points lower`."""
    speed, comma, rest = row.verdict.partition(",")
    if row.speedup_interval and row.speed in ("faster", "slower"):
        low, high = row.speedup_interval
        speed += f" ({output.interval((low, high) if row.speed == 'faster' else (1 / high, 1 / low))})"
    text = f"{'warning: ' * row.worse}{row.name}: {speed}{comma}{rest}"
    if row.accuracy is None or teacher.accuracy is None:
        return text
    points = row.accuracy - teacher.accuracy
    change = f"{abs(points):.2f} points {'higher' if points > 0 else 'lower'}" if points else "unchanged"
    return f"{text}, accuracy {change}"


def _show_details(result: BenchResult) -> None:
    first = result.rows[0]
    output.text()
    _table(result.rows, _DETAILS)
    _table(result.rows, _FOOTPRINT)
    paces = ", ".join(f"{size}: {units.count(pace)}" for size, pace in first.throughput.items())
    output.text(
        f"ms, p90, p95, p99: prepared input, {result.rounds} rounds; img/s of {first.name} by batch: {paces}",
        "faster, smaller: teacher ÷ model; size: the network alone; under 2 %: no difference",
        "load: ms, file → ready; 1st: ms, first output; memory: peak of a process for this model alone",
    )
    for row in {row.path: row for row in result.rows}.values():
        if row.preprocessing_bytes > 0.05 * row.network_bytes:
            sizes = units.size(row.file_bytes), units.size(row.preprocessing_bytes)
            output.text(f"{row.name}: {sizes[1]} of the file's {sizes[0]} are preprocessing")


def _table(rows: Sequence[Row], columns: Sequence[Column], marked: int = -1) -> None:
    columns = [*_NAME, *columns]
    cells = [[cell(row) for _, cell in columns] for row in rows]
    output.table([title for title, _ in columns], cells, left=2, marked=marked)
    output.text()


def _ratio(value: float | None) -> str:
    return output.number(value, ".2f" if value is not None and value < 9.95 else ",.0f", "×")
