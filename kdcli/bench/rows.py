"""What a benchmark says, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SAME = 1.05  # ratios nearer to 1 are called the same
METHOD = (
    "one process, interleaved rounds in random order; ratios are medians over rounds of teacher time ÷ model "
    "time on the same engine; times are of the network on prepared input"
)


@dataclass(frozen=True)
class Row:
    """One model on one engine.

    Attributes:
        name, path: the model.
        engine: `torch` or `onnxruntime`.
        is_teacher: the model all ratios refer to.
        file_bytes: size of the file.
        network_bytes: weights and buffers of the network alone.
        preprocessing_bytes: constants of the preprocessing in the file.
        parameters: trainable values (of an ONNX file: values in weights, batch norm folded in).
        macs: multiply-accumulates for one image; None if not known.
        latency_ms, latency_p90_ms, latency_p95_ms: one image; median and percentiles of `latency_n` calls.
        images_per_s: at the batch size of the run, median of the rounds.
        speedup: latency ratio, above 1 is faster than the teacher; None without a teacher on this engine.
        speedup_quartiles: of the rounds' ratios.
        throughput_ratio: above 1: more images a second than the teacher.
        size_ratio: teacher's network bytes ÷ its own; above 1 is smaller.
        accuracy: per cent of test images.
        accuracy_source: `measured` now, or `recorded` in the file when it was trained.
        agreement: per cent of test images with the teacher's class.
        verdict: speed and size against the teacher in words.
        worse: slower or bigger than its teacher.
        notes: what to know about this row.
    """

    name: str
    path: Path
    engine: str
    is_teacher: bool
    file_bytes: int
    network_bytes: int
    preprocessing_bytes: int
    parameters: int
    macs: int | None
    latency_ms: float = math.nan
    latency_p90_ms: float = math.nan
    latency_p95_ms: float = math.nan
    latency_n: int = 0
    images_per_s: float = math.nan
    speedup: float | None = None
    speedup_quartiles: tuple[float, float] | None = None
    throughput_ratio: float | None = None
    size_ratio: float | None = None
    accuracy: float | None = None
    accuracy_source: str | None = None
    agreement: float | None = None
    verdict: str = ""
    worse: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchResult:
    """All rows, and what they depend on.

    Attributes:
        rows: the teacher's first.
        teacher: its name.
        batch: batch size of `images_per_s`.
        rounds, threads: how it was measured.
        data_label, test_images: what accuracy was measured on; None, 0 if it was not.
        environment: CPU, versions, load (see `runtime.environment`).
        notes: what to know about the whole measurement.
        method: the measurement in a sentence.
    """

    rows: tuple[Row, ...]
    teacher: str
    batch: int
    rounds: int
    threads: int
    data_label: str | None
    test_images: int
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()
    method: str = METHOD

    def to_json(self) -> dict[str, Any]:
        """Plain values with a `schema_version`."""
        document = asdict(self)
        document["rows"] = [{**asdict(row), "path": row.path.as_posix()} for row in self.rows]
        return {"schema_version": 1, **document}


def in_words(ratio: float, above: str, below: str, same: str) -> str:
    """2.13 → `2.1× faster`, 0.5 → `2.0× slower`, 1.01 → `as fast`."""
    if 1 / SAME <= ratio <= SAME:
        return same
    times = max(ratio, 1 / ratio)
    return (
        f"{times:,.0f}× {above if ratio > 1 else below}"
        if times >= 10
        else (f"{times:.1f}× {above if ratio > 1 else below}")
    )
