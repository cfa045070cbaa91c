"""A benchmark as a table for programs, and as one for a README."""

from __future__ import annotations

import csv
import io
from typing import Any

from kdcli.base.tables import csv_cell, markdown_cell
from kdcli.deploy.bench.rows import BenchResult, Row


def to_csv(result: BenchResult) -> str:
    """All figures, a line for each model and engine; columns are named with their units."""
    buffer = io.StringIO(newline="")
    rows = [_flat(row) for row in result.rows]
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def to_markdown(result: BenchResult) -> str:
    """The table that matters, and what it was measured on."""
    titles = ["model", "engine", "network, MB", "one image, ms", "speed-up, 95 % interval", "verdict"]
    lines = [[*titles, "images/s", "peak memory, MB", "accuracy, %"]]
    lines.append([":--", ":--", *["--:"] * 3, ":--", *["--:"] * 3])
    for row in result.rows:
        alone = row.alone
        peak = alone.peak_rss_bytes if alone is not None else None
        lines.append(
            [
                markdown_cell(row.name),
                f"{row.engine}{' int8' if row.precision == 'int8' else ''}",
                f"{row.network_bytes / 1e6:.3g}",
                f"{row.latency_ms:.3g}",
                _speedup(row),
                markdown_cell(row.verdict),
                f"{row.images_per_s:,.0f}",
                "" if peak is None else f"{peak / 1e6:,.0f}",
                "" if row.accuracy is None else f"{row.accuracy:.2f}",
            ]
        )
    cpu = result.environment["cpu"]
    size = max(result.batches)
    notes = [
        f"{markdown_cell(str(cpu['model']))}, {result.threads} threads. One image: median of "
        f"{result.rows[0].latency_n:,} calls in {result.rounds} rounds; images/s in batches of {size}."
    ]
    if result.data_label:
        notes.append(f"Accuracy: {result.test_images:,} test images of {markdown_cell(result.data_label)}.")
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{' '.join(notes)}\n"


def _speedup(row: Row) -> str:
    if row.speedup is None or row.speedup_interval is None or row.is_teacher:
        return ""
    low, high = row.speedup_interval
    return f"{row.speedup:.2f}× ({low:.2f}–{high:.2f})"


def _flat(row: Row) -> dict[str, Any]:
    low, high = row.speedup_interval or (None, None)
    flat: dict[str, Any] = {
        "name": csv_cell(row.name),
        "path": csv_cell(row.path.as_posix()),
        "engine": row.engine,
        "precision": row.precision,
        "is_teacher": row.is_teacher,
        "file_bytes": row.file_bytes,
        "network_bytes": row.network_bytes,
        "parameters": row.parameters,
        "macs": row.macs,
        "latency_ms": row.latency_ms,
        "latency_p90_ms": row.latency_p90_ms,
        "latency_p95_ms": row.latency_p95_ms,
        "latency_p99_ms": row.latency_p99_ms,
        "latency_n": row.latency_n,
        "speedup": row.speedup,
        "speedup_low": low,
        "speedup_high": high,
        "speed": row.speed,
        "size_ratio": row.size_ratio,
    }
    flat |= {f"images_per_s_batch_{size}": pace for size, pace in sorted(row.throughput.items())}
    measured = row.alone
    for name in (
        "import_ms",
        "load_ms",
        "first_ms",
        "base_rss_bytes",
        "peak_rss_bytes",
        "peak_rss_batch_bytes",
    ):
        flat[name] = None if measured is None else getattr(measured, name)
    return {
        **flat,
        "accuracy": row.accuracy,
        "accuracy_source": row.accuracy_source,
        "agreement": row.agreement,
        "kl": row.kl,
        "ece": row.ece,
        "verdict": row.verdict,
        "notes": csv_cell("; ".join(row.notes)),
    }
