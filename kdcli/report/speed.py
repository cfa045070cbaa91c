"""Latency and size of the models of a page: measured now, or read from what `kd bench --json` printed."""

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
from kdcli.report.gather import read_text

_MAX_BYTES = 16 << 20
_MAX_ROWS = 500
_Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True)
class Speed:
    """Rows of a benchmark.

    Attributes:
        method: how, where and how often it was measured, one line.
        notes: remarks of the benchmark.
        unavailable: why there are no rows.
    """

    rows: tuple[Row, ...] = ()
    method: str = ""
    notes: tuple[str, ...] = ()
    unavailable: str = ""


class _BenchRow(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    path: Annotated[str, Field(pattern="^[^\\x00]*$")]
    engine: str
    is_teacher: bool
    file_bytes: _Count
    network_bytes: _Count
    latency_ms: _Positive | None
    latency_n: _Count = 0
    speedup: _Positive | None = None
    size_ratio: _Positive | None = None
    accuracy: _Percent | None = None
    accuracy_source: str | None = None

    def to_row(self) -> Row:
        values = self.model_dump() | {"path": Path(self.path)}
        return Row(**values, preprocessing_bytes=0, parameters=0, macs=None)


class _BenchFile(BaseModel):
    model_config = ConfigDict(strict=True)

    rows: Annotated[list[_BenchRow], Field(min_length=1, max_length=_MAX_ROWS)]
    threads: Annotated[int, Field(ge=1)]
    environment: dict[str, Any] = {}
    notes: list[str] = []


def from_file(path: Path) -> Speed:
    """Rows of what `kd bench --json > FILE` printed.

    Raises:
        KdError: it cannot be read, or holds something else.
    """
    hint = "Make it with: kd bench --json > bench.json"
    try:
        content = _BenchFile.model_validate_json(read_text(path, _MAX_BYTES))
    except KdError as error:
        raise KdError(f"--bench {path}: {error.message}", hint) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = " ".join(str(part) for part in first["loc"])
        raise KdError(f"--bench {path}: {place}: {first['msg']}", hint) from error
    rows = tuple(row.to_row() for row in content.rows if row.latency_ms is not None)
    if not rows:
        raise KdError(f"--bench {path}: no row has a latency", hint)
    method = _method(rows, content.threads, content.environment, f"measured before this page ({path.name})")
    return Speed(rows, method, tuple(content.notes))


def measure(
    students: Sequence[Path],
    teacher: Path | None,
    others: Sequence[Path],
    config: ReportConfig,
    on_event: OnEvent,
) -> Speed:
    """Time the models now, in `config.bench_rounds` rounds."""
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
        return Speed(unavailable=f"The models could not be timed: {error.message}")
    rows = tuple(result.rows)
    if teacher is None:  # `bench` takes the first student for the teacher
        rows = tuple(replace(row, is_teacher=False, speedup=None, size_ratio=None) for row in rows)
    when = "measured while this page was made, on this machine"
    return Speed(rows, _method(rows, result.threads, result.environment, when), result.notes)


def of_bench(
    rows: Sequence[Row], threads: int, environment: dict[str, Any], notes: Sequence[str] = ()
) -> Speed:
    """Rows of a benchmark that was made just now."""
    method = _method(rows, threads, environment, "measured with kd bench on this machine")
    return Speed(tuple(rows), method, tuple(notes))


def deployed(rows: Sequence[Row]) -> list[Row]:
    """One row for each model: onnxruntime's, the engine for deployment, else the first."""
    found: dict[Path, Row] = {}
    for row in rows:
        if row.path not in found or row.engine == "onnxruntime":
            found[row.path] = row
    return list(found.values())


def _method(rows: Sequence[Row], threads: int, environment: dict[str, Any], when: str) -> str:
    cpu = environment.get("cpu")
    model = str(cpu.get("model", "")) if isinstance(cpu, dict) else ""
    calls = rows[0].latency_n
    count = f", median of n = {calls}" if calls else ""
    return f"One image{count}; {when}: {model or 'CPU unknown'}, {threads} threads."
