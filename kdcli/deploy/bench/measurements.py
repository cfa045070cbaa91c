"""Results of a benchmark: plain data, CSV, Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from kdcli.base.results import Count, Percent, Positive, Result, Table
from kdcli.base.tables import csv_text, markdown_cell, markdown_text
from kdcli.deploy.bench.footprint import Footprint

_COLUMNS = (
    "model, engine, network (MB), one image (ms), speed-up and 95 % interval, verdict, images/s, peak memory (MB), "
    "accuracy (%)"
)
_MAX_ROWS = 500  # of a file


@dataclass(frozen=True)
class Row:
    """One model on one engine."""

    name: str
    path: Path
    engine: str  # torch, compiled (torch.compile) or onnxruntime
    is_teacher: bool  # the model all ratios refer to
    file_bytes: Count
    network_bytes: Count  # weights and buffers of the network
    preprocessing_bytes: int  # constants of the preprocessing in the file
    parameters: int  # trainable values (of an ONNX file: values in weights, batch norm folded in)
    macs: int | None  # multiply-accumulates for one image; None if unknown
    precision: str = "fp32"  # or fp16 or int8, of an ONNX file
    latency_ms: Positive = math.nan  # one image, median of `latency_n` calls
    latency_p90_ms: float = math.nan
    latency_p95_ms: float = math.nan
    latency_p99_ms: float | None = None  # None where fewer than ten calls lie beyond it
    latency_n: Count = 0
    throughput: dict[int, float] = field(default_factory=dict)  # images per second by batch size, medians
    images_per_s: float = math.nan  # that of the largest batch
    speedup: Positive | None = None  # teacher's latency ÷ its own; None without a teacher on this engine
    speedup_interval: tuple[Positive, Positive] | None = None  # 95 %
    speed: str | None = None  # faster, slower or no difference; None as above
    size_ratio: Positive | None = None  # teacher's network bytes ÷ its own; above 1 is smaller
    accuracy: Percent | None = None  # per cent of test images
    accuracy_interval: tuple[Percent, Percent] | None = None  # 95 %, where it was measured
    accuracy_source: str | None = None  # measured, or recorded in the file when it was trained
    agreement: float | None = None  # per cent of test images with the teacher's class
    kl: float | None = None  # mean KL(teacher ‖ model) over the test images, nats
    ece: float | None = None  # expected calibration error over them, per cent (15 bins)
    footprint: Footprint | None = None
    verdict: str = ""  # speed and size against the teacher as text
    worse: bool = False  # slower or bigger than its teacher
    notes: tuple[str, ...] = ()

    __pydantic_config__ = ConfigDict(validate_default=True)  # of a file: the latency must be there

    def extend(self, *, notes: Sequence[str] = (), **values: Any) -> Row:
        """A copy with further values, and with further notes."""
        return replace(self, **values, notes=(*self.notes, *notes))


def rows_within(rows: Sequence[Row], budget_ms: float | None, max_drop: float | None) -> list[Row]:
    """Rows but the teacher's, fastest first, of at most this latency and known loss of accuracy in points."""
    teacher = next(row for row in rows if row.is_teacher)

    def accuracy(row: Row) -> float:
        return math.nan if row.accuracy is None else row.accuracy  # a comparison with NaN is false

    found = [
        row
        for row in rows
        if not row.is_teacher
        and (budget_ms is None or row.latency_ms <= budget_ms)
        and (max_drop is None or round(accuracy(teacher) - accuracy(row), 9) <= max_drop)
    ]
    return sorted(found, key=lambda row: row.latency_ms)


def deployed(rows: Sequence[Row]) -> list[Row]:
    """One row for each file: onnxruntime's, which deploys it, else that of the first engine."""
    found: dict[Path, Row] = {}
    for row in rows:
        if row.path not in found or row.engine == "onnxruntime":
            found[row.path] = row
    return list(found.values())


@dataclass(frozen=True)
class BenchResult(Result):
    """All rows and the conditions of the measurement."""

    rows: Annotated[tuple[Row, ...], Field(min_length=1, max_length=_MAX_ROWS)]  # the teacher's first
    teacher: str  # its name
    batches: tuple[int, ...]  # sizes of `throughput`
    rounds: int
    sessions: int
    threads: int
    data_label: str | None  # test data of the accuracy
    test_images: int
    environment: dict[str, Any]  # see `runtime.environment`
    notes: tuple[str, ...] = ()
    within_limits: tuple[tuple[str, str], ...] | None = None  # (name, engine); None without limits

    def table(self) -> Table:
        return _COLUMNS.split(", "), [_cells(row) for row in self.rows]


def to_csv(result: BenchResult) -> str:
    """All figures, one line per model and engine; column names include units."""
    return csv_text([_flatten(row) for row in result.rows])


def to_markdown(result: BenchResult) -> str:
    """The main figures as a table, and the conditions of the measurement."""
    table = markdown_text(*result.table(), left=(0, 1, 5))
    cpu = markdown_cell(str(result.environment["cpu"]["model"]))
    notes = (
        f"{cpu}, {result.threads} threads. One image: median of {result.rows[0].latency_n:,} calls in "
        f"{result.rounds} rounds; images/s in batches of {max(result.batches)}."
    )
    if result.data_label:
        notes += f" Accuracy: {result.test_images:,} test images of {markdown_cell(result.data_label)}."
    return f"{table}\n\n{notes}\n"


def _cells(row: Row) -> list[str]:
    peak = row.footprint.peak_rss_bytes if row.footprint else None
    speedup = ""
    if row.speedup is not None and row.speedup_interval is not None and not row.is_teacher:
        low, high = row.speedup_interval
        speedup = f"{row.speedup:.2f}× ({low:.2f}–{high:.2f})"
    return [
        row.name,
        f"{row.engine}{'' if row.precision == 'fp32' else ' ' + row.precision}",
        f"{row.network_bytes / 1e6:.3g}",
        f"{row.latency_ms:.3g}",
        speedup,
        row.verdict,
        f"{row.images_per_s:,.0f}",
        "" if peak is None else f"{peak / 1e6:,.0f}",
        "" if row.accuracy is None else f"{row.accuracy:.2f}",
    ]


def _flatten(row: Row) -> dict[str, Any]:
    values = asdict(row)
    throughput = values.pop("throughput")
    footprint = values.pop("footprint") or dict.fromkeys(Footprint.__dataclass_fields__)
    return {
        **values,
        "path": row.path.as_posix(),
        "notes": "; ".join(row.notes),
        **{f"images_per_s_batch_{size}": pace for size, pace in sorted(throughput.items())},
        **footprint,
    }
