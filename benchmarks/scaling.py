"""Time and memory of training by images, classes, views and processes.

    python benchmarks/scaling.py [--axes images,classes,views,processes] [--full]

Each case is a process of its own, so that its peak memory is its own; it trains `convnet-tiny`, which is so cheap
that the handling of data shows, through `kdcli.engine.fit`, for as many epochs as there are views. Images are
synthetic, 64×64×3 on the images axis and 16×16×3 elsewhere, and lie in a file that is mapped, not read. Their
fingerprint is a name, not a hash: hashing is not what is measured. Without --full the largest case has 50,000 images;
with it 500,000 (6.1 GB on the disk, removed at the end).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

AXES = ("images", "classes", "views", "processes")
STUDENT, TEACHER = "convnet-tiny", "convnet-small"
TEST_IMAGES = 500


def cases(axes: list[str], full: bool) -> list[dict[str, Any]]:
    """What is measured, smallest first on each axis."""
    plain = {
        "images": 20_000,
        "side": 16,
        "classes": 10,
        "views": 1,
        "processes": 1,
        "method": "kd",
        "top_k": 0,
    }
    found: list[dict[str, Any]] = []
    if "images" in axes:
        counts = [5_000, 50_000, 500_000] if full else [5_000, 15_000, 50_000]
        found += [{**plain, "axis": "images", "images": n, "side": 64, "method": "ce"} for n in counts]
    if "classes" in axes:
        found += [{**plain, "axis": "classes", "classes": n} for n in (10, 100, 1000)]
        found += [{**plain, "axis": "classes, top 10 kept", "classes": n, "top_k": 10} for n in (100, 1000)]
    if "views" in axes:
        found += [{**plain, "axis": "views", "views": n} for n in (1, 2, 4)]
    if "processes" in axes:
        found += [{**plain, "axis": "processes", "processes": n} for n in (1, 2)]
    return found


def write_images(path: Path, count: int, side: int) -> None:
    """Random images as .npy, written in parts: they need not fit into memory."""
    size = count * side * side * 3
    if shutil.disk_usage(path.parent).free < 1.1 * size:
        sys.exit(
            f"error: {path.parent} has no room for {size / 1e9:.1f} GB\nhint: name another folder with --workdir"
        )
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (count, side, side, 3))
    random = np.random.default_rng(0)
    for start in range(0, count, 1000):
        part = images[start : start + 1000]
        part[:] = random.integers(0, 256, part.shape, np.uint8)


def run_case(case: dict[str, Any], folder: Path) -> None:
    """In the case's own process: train, and print what it took as JSON."""
    import resource

    import torch

    from kdcli import models
    from kdcli.base import runtime
    from kdcli.base.config import make
    from kdcli.data import ImageSet, Splits
    from kdcli.data.preprocess import MeanStd
    from kdcli.engine import fit
    from kdcli.methods import TrainConfig
    from kdcli.models import Classifier

    world = runtime.launch("cpu", case["processes"])
    names = tuple(f"class {number}" for number in range(case["classes"]))
    side, count = case["side"], case["images"]
    stored = np.load(folder / f"images-{side}.npy", mmap_mode="r")
    work = folder / "case"

    def split(part: np.ndarray[Any, Any], name: str) -> ImageSet:
        labels = np.arange(len(part), dtype=np.int64) % case["classes"]
        return ImageSet(part, labels, names, f"synthetic {name} {part.shape} {case['classes']}")

    splits = Splits(
        "synthetic", "synthetic", split(stored[:count], "train"), split(stored[:TEST_IMAGES], "test")
    )
    teacher = work / "teacher.pt"
    if world.first:
        torch.manual_seed(0)
        network = models.build(TEACHER, classes=len(names), input_size=(side, side, 3))
        prepare = MeanStd(torch.full((3,), 127.0), torch.full((3,), 74.0))
        Classifier(
            network, prepare, arch=TEACHER, arch_args={}, classes=names, input_size=(side, side, 3)
        ).save(teacher)
    world.barrier()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = make(
        TrainConfig,
        {
            "method": case["method"],
            "student": STUDENT,
            "teacher": teacher,
            "augment": "flip-crop",
            "views": case["views"],
            "epochs": case["views"],
            "cache_top_k": case["top_k"],
            "precision": "32",
            "devices": case["processes"],
            "val_fraction": 0.01,
            "cache_dir": work / "cache",
            "runs_dir": work / "runs",
            "name": "run",
        },
    )
    started = time.perf_counter()
    result = fit(config, splits, world=world)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = world.rows(torch.tensor([float(peak)], dtype=torch.float64))
    if world.first:
        views = list((work / "cache").rglob("view-*.npy"))
        kept = sum(path.stat().st_size for path in views if len(np.load(path, mmap_mode="r")) == count)
        figures = {
            **case,
            "training_s": result.seconds,
            "images_per_s": result.images_per_s,
            "all_s": seconds,
            "cache_bytes": kept,
            "state_bytes": result.run.last.stat().st_size,
            "peak_mib": [value[0] / 1024 for value in peaks],
            "imports_mib": before / 1024,
        }
        (work / "figures.json").write_text(json.dumps(figures))
    world.close()


def measure(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one case in a process of its own."""
    work = folder / "case"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    words = [sys.executable, __file__, "--case", json.dumps(case), "--workdir", str(folder)]
    subprocess.run(words, check=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    figures: dict[str, Any] = json.loads((work / "figures.json").read_text())
    shutil.rmtree(work)
    return figures


def show(rows: list[dict[str, Any]]) -> None:
    """The table, and how each axis grows."""
    print(
        "| axis | images | size | classes | views | processes | training, s | images/s | all, s | cache, MB "
        "| peak, MiB |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        peak = " + ".join(f"{value:,.0f}" for value in row["peak_mib"])
        sizes = " | ".join(f"{row[name]:,}" for name in ("images", "side", "classes", "views", "processes"))
        print(
            f"| {row['axis']} | {sizes} | {row['training_s']:.1f} | {row['images_per_s']:,.0f} "
            f"| {row['all_s']:.1f} | {row['cache_bytes'] / 1e6:.1f} | {peak} |"
        )
    for axis in AXES:
        chosen = [row for row in rows if row["axis"] == axis]
        if len(chosen) > 1:
            slope = [math.log(chosen[-1][name] / chosen[0][name]) for name in ("training_s", axis)]
            print(f"{axis}: training time grows as n^{slope[0] / slope[1]:.2f}")


def main(
    axes: str = ",".join(AXES),
    full: Annotated[bool, typer.Option("--full", help="500,000 images on the images axis.")] = False,
    workdir: Annotated[Path | None, typer.Option(help="Folder of images and runs.")] = None,
    case: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print how time and memory grow along these axes."""
    if case:
        assert workdir is not None
        run_case(json.loads(case), workdir)
        return
    wanted = cases(axes.split(","), full)
    with tempfile.TemporaryDirectory(dir=workdir) as place:
        folder = Path(place)
        for side in sorted({each["side"] for each in wanted}):
            count = max(each["images"] for each in wanted if each["side"] == side)
            print(f"writing {count:,} images of {side}×{side}", file=sys.stderr)
            write_images(folder / f"images-{side}.npy", count, side)
        rows = []
        for each in wanted:
            rows.append(measure(each, folder))
            print(json.dumps(rows[-1]), file=sys.stderr)
    show(rows)


if __name__ == "__main__":
    typer.run(main)
