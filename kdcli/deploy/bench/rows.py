"""What a benchmark says, as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kdcli.deploy.bench.isolated import Alone

SAME = 1.05  # sizes nearer to each other are called the same
METHOD = (
    "one process, several sittings with the models loaded anew, interleaved rounds in random order; a ratio is "
    "teacher time ÷ model time within a round on the same engine, median of a sitting's rounds, mean over the "
    "sittings, with a bootstrap interval over these; times are of the network on prepared input; memory and start-up "
    "are of a process for each model"
)


@dataclass(frozen=True)
class Row:
    """One model on one engine.

    Attributes:
        name, path: the model.
        engine: `torch`, `compiled` (torch.compile) or `onnxruntime`.
        precision: `fp32`, or `int8` of an ONNX file that quantises.
        is_teacher: the model all ratios refer to.
        file_bytes: size of the file.
        network_bytes: weights and buffers of the network alone.
        preprocessing_bytes: constants of the preprocessing in the file.
        parameters: trainable values (of an ONNX file: values in weights, batch norm folded in).
        macs: multiply-accumulates for one image; None if not known.
        latency_ms, latency_p90_ms, latency_p95_ms, latency_p99_ms: one image; median and percentiles of `latency_n`
            calls; the last None where fewer than ten calls lie beyond it.
        throughput: images a second by batch size, medians.
        images_per_s: that of the largest batch.
        speedup: latency ratio, above 1 is faster than the teacher; None without a teacher on this engine.
        speedup_interval: its 95 % interval.
        speed: `faster`, `slower` or `no difference`; None as above.
        throughput_ratio: above 1: more images a second than the teacher, at the largest batch.
        size_ratio: teacher's network bytes ÷ its own; above 1 is smaller.
        accuracy: per cent of test images.
        accuracy_source: `measured` now, or `recorded` in the file when it was trained.
        agreement: per cent of test images with the teacher's class.
        kl: mean KL(teacher ‖ model) over the test images, nats.
        ece: expected calibration error over them, per cent (15 bins).
        alone: memory and start-up in a process of its own.
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
    precision: str = "fp32"
    latency_ms: float = math.nan
    latency_p90_ms: float = math.nan
    latency_p95_ms: float = math.nan
    latency_p99_ms: float | None = None
    latency_n: int = 0
    throughput: dict[int, float] = field(default_factory=dict)
    images_per_s: float = math.nan
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None
    speed: str | None = None
    throughput_ratio: float | None = None
    size_ratio: float | None = None
    accuracy: float | None = None
    accuracy_source: str | None = None
    agreement: float | None = None
    kl: float | None = None
    ece: float | None = None
    alone: Alone | None = None
    verdict: str = ""
    worse: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """A budget, and the rows that keep to it, fastest first.

    Attributes:
        budget_ms: the most that one image may take, median.
        max_drop: the most points of accuracy below the teacher.
        met: (name, engine) of the rows that do; never the teacher's.
    """

    budget_ms: float | None
    max_drop: float | None
    met: tuple[tuple[str, str], ...]


def keeping(rows: Sequence[Row], budget_ms: float | None, max_drop: float | None) -> Wanted:
    """Which rows are fast enough and near enough to the teacher. What is not known is not kept to."""
    teacher = next(row.accuracy for row in rows if row.is_teacher)

    def keeps(row: Row) -> bool:
        fast = budget_ms is None or row.latency_ms <= budget_ms
        known = teacher is not None and row.accuracy is not None
        return fast and (max_drop is None or (known and teacher - row.accuracy <= max_drop))  # type: ignore[operator]

    met = sorted((row for row in rows if not row.is_teacher and keeps(row)), key=lambda row: row.latency_ms)
    return Wanted(budget_ms, max_drop, tuple((row.name, row.engine) for row in met))


@dataclass(frozen=True)
class BenchResult:
    """All rows, and what they depend on.

    Attributes:
        rows: the teacher's first.
        teacher: its name.
        batches: sizes of `throughput`.
        rounds, sittings, threads: how it was measured.
        data_label, test_images: what accuracy was measured on; None, 0 if it was not.
        environment: CPU, versions, load (see `runtime.environment`).
        notes: what to know about the whole measurement.
        method: the measurement in a sentence.
        wanted: what a model had to keep to, and which do; None if nothing was asked.
    """

    rows: tuple[Row, ...]
    teacher: str
    batches: tuple[int, ...]
    rounds: int
    sittings: int
    threads: int
    data_label: str | None
    test_images: int
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()
    method: str = METHOD
    wanted: Wanted | None = None

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
