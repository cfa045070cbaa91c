"""Latency and size: measured now, or taken from what `kd bench --json` printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdcli.base.config import BenchConfig, ReportConfig, make
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent
from kdcli.deploy.bench import Row, bench
from kdcli.report.gather import Count, Share, complaint, read_json

_BENCH_BYTES = 16 << 20
_MOST_ROWS = 500
_Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Speed:
    """Rows to draw.

    Attributes:
        said: how, where and how often it was measured.
        notes: what to know about the measurement.
        why_not: why there are no rows.
    """

    rows: tuple[Row, ...] = ()
    said: str = ""
    notes: tuple[str, ...] = ()
    why_not: str = ""


class _Row(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    path: str
    engine: str
    is_teacher: bool
    file_bytes: Count
    network_bytes: Count
    latency_ms: _Ratio | None
    latency_n: Count = 0
    speedup: _Ratio | None = None
    size_ratio: _Ratio | None = None
    accuracy: Share | None = None
    accuracy_source: str | None = None


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    rows: Annotated[list[_Row], Field(min_length=1, max_length=_MOST_ROWS)]
    threads: Annotated[int, Field(ge=1)]
    environment: dict[str, Any] = {}
    notes: list[str] = []


def from_file(path: Path) -> Speed:
    """What `kd bench --json > FILE` printed.

    Raises:
        KdError: it cannot be read, or is something else.
    """
    hint = "Make it with: kd bench --json > bench.json"
    try:
        document = _File.model_validate(read_json(path, _BENCH_BYTES))
    except KdError as error:
        raise KdError(f"--bench {path}: {error.message}", hint) from error
    except ValidationError as error:
        raise KdError(f"--bench {complaint(str(path), error)}", hint) from error
    rows = tuple(
        Row(
            name=row.name,
            path=Path(row.path),
            engine=row.engine,
            is_teacher=row.is_teacher,
            file_bytes=row.file_bytes,
            network_bytes=row.network_bytes,
            preprocessing_bytes=0,
            parameters=0,
            macs=None,
            latency_ms=row.latency_ms,
            latency_n=row.latency_n,
            speedup=row.speedup,
            size_ratio=row.size_ratio,
            accuracy=row.accuracy,
            accuracy_source=row.accuracy_source,
        )
        for row in document.rows
        if row.latency_ms is not None
    )
    if not rows:
        raise KdError(f"--bench {path}: no row has a latency", hint)
    said = _said(rows, document.threads, document.environment, f"measured before this page ({path.name})")
    return Speed(rows, said, tuple(document.notes))


def measured(
    students: Sequence[Path],
    teacher: Path | None,
    others: Sequence[Path],
    config: ReportConfig,
    on_event: OnEvent,
) -> Speed:
    """Time the models here and now, in a few rounds."""
    first = teacher if teacher is not None else students[0]
    rest = [path for path in (*students, *others) if path.resolve() != first.resolve()]
    settings = make(
        BenchConfig,
        {
            "rounds": config.bench_rounds,
            "batch": "1",
            "no_memory": True,
            "threads": config.threads,
            "teacher": first,
        },
    )
    try:
        result = bench([first, *rest], settings, on_event=on_event, skip=True)
    except KdError as error:
        return Speed(why_not=f"The models could not be timed: {error.message}")
    rows = result.rows
    if teacher is None:  # the first student is then no teacher, and ratios to it would say nothing
        rows = tuple(replace(row, is_teacher=False, speedup=None, size_ratio=None) for row in rows)
    said = _said(
        rows, result.threads, result.environment, "measured while this page was made, on this machine"
    )
    return Speed(tuple(rows), said, result.notes)


def of_bench(
    rows: Sequence[Row], threads: int, environment: dict[str, Any], notes: Sequence[str] = ()
) -> Speed:
    """A benchmark that has just been made."""
    return Speed(
        tuple(rows), _said(rows, threads, environment, "measured with kd bench on this machine"), tuple(notes)
    )


def deployed(rows: Sequence[Row]) -> list[Row]:
    """A row for each model: onnxruntime's, the engine it is deployed with, else whichever there is."""
    found: dict[Path, Row] = {}
    for row in rows:
        if row.path not in found or row.engine == "onnxruntime":
            found[row.path] = row
    return list(found.values())


def _said(rows: Sequence[Row], threads: int, environment: dict[str, Any], when: str) -> str:
    cpu = environment.get("cpu")
    model = str(cpu.get("model", "")) if isinstance(cpu, dict) else ""
    calls = rows[0].latency_n
    count = f", median of n = {calls}" if calls else ""
    return f"One image{count}; {when}: {model or 'CPU unknown'}, {threads} threads."
