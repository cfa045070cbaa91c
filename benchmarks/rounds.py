"""Interleaved rounds of several sides of a comparison: timings, ratios within a round, and their table."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from kdcli.base import runtime
from kdcli.base.files import sha256_file


@dataclass(frozen=True)
class Timing:
    """One round of one side.

    Attributes:
        images: number of images processed.
        seconds: of the measured work.
        wall_s: of the whole call, where it is more than that.
    """

    images: int
    seconds: float
    wall_s: float | None = None

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds


class Side(Protocol):
    """One side of a comparison.

    Attributes:
        key, label, note: for options and the table.
        keeps_memory: whether it runs with `runtime.keep_freed_memory`, as kd does.
    """

    key: str
    label: str
    note: str
    keeps_memory: bool

    def warm_up(self) -> None:
        """All work that is not measured: caches filled, kernels chosen."""

    def round(self) -> Timing:
        """One measurement."""


Timings = dict[str, list[Timing]]  # by key of the side


def prepare(side: Side, threads: int) -> int:
    """Set threads and malloc for a side, whatever the one before has left; returns the number of threads.

    Without `keeps_memory`: the values that glibc's own adaptation to large blocks ends with.
    """
    if side.keeps_memory:
        runtime.keep_freed_memory()
    elif sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD
    return runtime.set_threads(threads)


def measure(
    sides: Sequence[Side], rounds: int, threads: int, after_round: Callable[[], None] = lambda: None
) -> Timings:
    """Warm up all sides, then run each once a round, in rotated order."""
    for side in sides:
        log(f"warming up {side.key}: {side.label}")
        prepare(side, threads)
        side.warm_up()
    timings: Timings = {side.key: [] for side in sides}
    for number in range(rounds):
        turn = number % max(1, len(sides))
        for side in (*sides[turn:], *sides[:turn]):
            prepare(side, threads)
            timing = side.round()
            timings[side.key].append(timing)
            log(f"round {number + 1}/{rounds}, {side.key}: {timing.images_per_s:.0f} images/s")
        after_round()
    return timings


def summary(sides: Sequence[Side], timings: Timings) -> list[dict[str, Any]]:
    """A row for each side: all values, medians, and the ratio of the first side to it within each round."""
    speeds = {key: [timing.images_per_s for timing in found] for key, found in timings.items()}
    rows = []
    for side in sides:
        own = timings[side.key]
        row: dict[str, Any] = {
            "side": side.key,
            "label": side.label,
            "note": side.note,
            "images_a_round": own[0].images,
            "seconds": [timing.seconds for timing in own],
            "images_per_s": spread_of(speeds[side.key]),
        }
        if walls := [timing.images / timing.wall_s for timing in own if timing.wall_s is not None]:
            row["images_per_s_whole_call"] = spread_of(walls)
        if side is not sides[0]:
            pairs = zip(speeds[sides[0].key], speeds[side.key], strict=True)
            row["first_is_faster_by"] = spread_of([first / second for first, second in pairs])
        rows.append(row)
    return rows


def spread_of(values: Sequence[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def shown(values: dict[str, Any], digits: int = 0, unit: str = "") -> str:
    """`1,983 (1,910 – 2,004)`: median, lowest and highest."""
    middle, low, high = (f"{values[name]:,.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle}{unit} ({low} – {high})"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [
        f"| | | images a round | images/s, median (min – max) | {rows[0]['side']} is faster by | |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        ratio = shown(row["first_is_faster_by"], 2, "×") if "first_is_faster_by" in row else ""
        start = f"| {row['side']} | {row['label']}"
        speed = shown(row["images_per_s"])
        lines.append(f"{start} | {row['images_a_round']:,} | {speed} | {ratio} | {row['note']} |")
        if "images_per_s_whole_call" in row:
            whole = shown(row["images_per_s_whole_call"])
            lines.append(
                f"{start}, whole call | {row['images_a_round']:,} | {whole} | | with start-up and test |"
            )
    return lines


def machine(threads: int) -> str:
    """CPU, threads and versions, one line."""
    cpu = runtime.cpu_info()
    found = []
    for name in ("torch", "torchvision", "pillow", "numpy", "torchdistill"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return f"{cpu['model']}, {cpu['cores']} cores, {threads} threads; {', '.join(found)}"


def pass_rates(cache_dir: Path, teacher: Path, augment: str) -> tuple[int, list[float]]:
    """Images in a view, and images/s of the teacher's pass over each view but the first.

    From the times of the cached files; includes making the view, excludes the choice of the engine.
    """
    sha256 = sha256_file(teacher)
    for manifest in sorted(cache_dir.glob("teacher/*/manifest.json")):
        recipe = json.loads(manifest.read_text(encoding="utf-8"))["recipe"]
        views = sorted(manifest.parent.glob("view-*.npy"))
        if (recipe["teacher"], recipe["augment"]) == (sha256, augment) and len(views) > 1:
            count = len(np.load(views[0], mmap_mode="r"))
            times = sorted(view.stat().st_mtime for view in views)
            return count, [count / (end - begin) for begin, end in pairwise(times)]
    sys.exit(f"error: no two cached views of {teacher} with --augment {augment} in {cache_dir}")


def log(text: str) -> None:
    """To stderr: stdout is for the tables."""
    print(text, file=sys.stderr, flush=True)
