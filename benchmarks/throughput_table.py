"""From rounds to numbers, from numbers to a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from pair import Side, Timing


@dataclass
class Measured:
    """All rounds."""

    timings: dict[str, list[Timing]] = field(default_factory=dict)
    peaks: dict[str, list[float]] = field(default_factory=dict)  # dtype -> GFLOP/s


def summary(sides: Sequence[Side], measured: Measured, flops: int) -> dict[str, Any]:
    """Every number of the rounds, and medians."""
    speeds = {key: [timing.images_per_s for timing in found] for key, found in measured.timings.items()}
    shown = []
    for side in sides:
        own = speeds[side.key]
        row: dict[str, Any] = {
            "side": side.key,
            "label": side.label,
            "note": side.note,
            "images_a_round": measured.timings[side.key][0].images,
            "seconds": [timing.seconds for timing in measured.timings[side.key]],
            "images_per_s": spread_of(own),
        }
        walls = [t.images / t.wall_s for t in measured.timings[side.key] if t.wall_s is not None]
        if walls:
            row["images_per_s_whole_call"] = spread_of(walls)
        if "a" in speeds:
            row["a_is_faster_by"] = spread_of([a / b for a, b in zip(speeds["a"], own, strict=True)])
        if side.key in ("a", "b"):
            row["gflop_per_s"] = spread_of([speed * flops / 1e9 for speed in own])
            row["share_of_matmul_peak"] = {
                name: spread_of([s * flops / 1e9 / peak for s, peak in zip(own, peaks, strict=True)])
                for name, peaks in measured.peaks.items()
            }
        shown.append(row)
    peaks = {name: spread_of(found) for name, found in measured.peaks.items()}
    return {"training_flops_per_image": flops, "matmul_peak_gflop_per_s": peaks, "sides": shown}


def spread_of(values: Sequence[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    cpu = report["environment"]["cpu"]
    lines = [
        f"NIN → LeNet on {report['data']}, batch {report['batch']}, {report['rounds']} interleaved rounds, "
        f"precision {report['precision']} (a, b), {report['workers']} loader workers (c, d)",
        f"{cpu['model']}, {cpu['cores']} cores, {report['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
        "| side | | images a round | images/s, median | min – max | a is faster by, median | min – max | |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in report["sides"]:
        lines.append(_line(row, row["label"], row["images_per_s"], row.get("a_is_faster_by"), row["note"]))
        if "images_per_s_whole_call" in row:
            whole = row["images_per_s_whole_call"]
            lines.append(_line(row, f"{row['label']}, whole call", whole, None, "with start-up and test"))
    flops = report["training_flops_per_image"]
    lines += [
        "",
        f"training: {flops / 1e6:.1f} MFLOP an image (2 a multiply-accumulate forward, 4 backward, "
        "less the gradient for the input of the first layer)",
    ]
    for name, peak in report["matmul_peak_gflop_per_s"].items():
        lines.append(f"matmul peak, {name}: {peak['median']:.1f} GFLOP/s ({_range(peak, 1)})")
    for row in report["sides"]:
        for name, share in row.get("share_of_matmul_peak", {}).items():
            speed = row["gflop_per_s"]["median"]
            lines.append(
                f"{row['side']}: {speed:.1f} GFLOP/s, {100 * share['median']:.0f} % of the {name} peak"
            )
    losses = ", ".join(f"{key} {value:.5f}" for key, value in report["losses"].items())
    lines.append(f"loss of the untrained student on the same images: {losses}")
    return "\n".join(lines)


def _line(
    row: dict[str, Any], label: str, speed: dict[str, Any], ratio: dict[str, Any] | None, note: str
) -> str:
    faster = f"{ratio['median']:.2f}× | {_range(ratio, 2)}" if ratio else " | "
    return (
        f"| {row['side']} | {label} | {row['images_a_round']} | {speed['median']:.0f} | {_range(speed, 0)} "
        f"| {faster} | {note} |"
    )


def _range(values: dict[str, Any], digits: int) -> str:
    return f"{values['min']:.{digits}f} – {values['max']:.{digits}f}"
