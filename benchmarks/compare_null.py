"""False positives and power of `kd compare`.

Real runs on scikit-learn's digits: one method is compared with itself.

- Independent seeds: the two sides differ by all the chance there is in training.
  Of 200 comparisons of 5 seeds each, at most 7 % may call one better or worse; 5 % are expected.
- The same runs, 10 seeds a comparison, the second side's accuracies raised by one standard deviation of the paired
  differences: how often is it called better? The noncentral t-distribution says 80 %.

    python benchmarks/compare_null.py                        # 200 comparisons, 4,000 runs: minutes on 2 cores
    python benchmarks/compare_null.py --comparisons 10       # a look
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import typer

SEEDS, MORE_SEEDS = 5, 10
OTHER_SEEDS = 1_000_000  # where those of the second side begin
TRAIN: dict[str, Any] = {
    "data": "digits",
    "student": "convnet-tiny",
    "batch_size": 32,
    "lr": 3e-2,
    "val_fraction": 0.0,
    "precision": "32",
    "threads": 1,
    "save_every": "0",
    "keep": 1,
    "log_every": 0,
}


@cache
def digits(count: int) -> Any:
    """The digits, cut to so many training images; the 360 test images are whole."""
    import numpy as np

    from kdcli import data
    from kdcli.data import ImageSet
    from kdcli.data.images import fingerprint_of

    splits = data.load("digits")
    train = splits.train
    chosen = np.sort(np.random.default_rng(0).permutation(len(train))[:count])
    images, labels = np.asarray(train.images)[chosen], train.labels[chosen]
    fewer = ImageSet(images, labels, train.classes, fingerprint_of(images, labels, train.classes))
    return replace(splits, train=fewer)


def accuracy(method: str, seed: int, asked: dict[str, Any]) -> float:
    """Test accuracy of one run, per cent."""
    from kdcli.base.config import make
    from kdcli.engine import fit
    from kdcli.methods import TrainConfig

    with tempfile.TemporaryDirectory(dir=asked["folder"]) as name:
        values = {
            **TRAIN,
            "method": method,
            "seed": seed,
            "view_seed": 0,
            "epochs": asked["epochs"],
            "runs_dir": name,
            "teacher": asked["teacher"],
            "cache_dir": asked["cache"],
        }
        return fit(make(TrainConfig, values), digits(asked["images"])).evaluation.accuracy


def pairs(number: int, asked: dict[str, Any]) -> list[tuple[float, float]]:
    """One comparison: runs of the method and of the same method with other seeds."""
    first = MORE_SEEDS * number
    return [
        (accuracy(asked["method"], seed, asked), accuracy(asked["method"], OTHER_SEEDS + seed, asked))
        for seed in range(first, first + MORE_SEEDS)
    ]


def claims(found: list[list[float]], resolution: float) -> dict[str, float]:
    """Shares of verdicts, per cent."""
    from kdcli.studies.compare.stats import summary, verdict

    verdicts = [verdict(summary(values, resolution)) for values in found]
    return {name: 100 * verdicts.count(name) / len(verdicts) for name in ("better", "worse", "inconclusive")}


def teacher_of(asked: dict[str, Any]) -> str:
    """A teacher for methods that need one."""
    from kdcli.base.config import make
    from kdcli.engine import fit
    from kdcli.methods import TrainConfig

    values = {**TRAIN, "method": "ce", "student": "convnet-small", "epochs": 10, "name": "teacher"}
    values |= {"runs_dir": asked["folder"], "cache_dir": asked["cache"]}
    return fit(make(TrainConfig, values), digits(asked["images"])).run.student.as_posix()


def main(
    comparisons: int = 200,
    method: str = "ce",
    images: int = 400,
    epochs: int = 4,
    jobs: int = os.cpu_count() or 1,
) -> None:
    """Print the rates; exit 1 if the null claims too often."""
    memory = Path("/dev/shm")  # runs are written and synced; nothing of them is kept
    folder = tempfile.mkdtemp(dir=memory if memory.is_dir() else None)
    begun = time.perf_counter()
    try:
        asked: dict[str, Any] = {
            "method": method,
            "images": images,
            "epochs": epochs,
            "folder": folder,
            "cache": f"{folder}/cache",
            "teacher": "",
        }
        asked["teacher"] = teacher_of(asked)
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(pairs, number, asked) for number in range(comparisons)]
            runs = []
            for number, future in enumerate(futures, 1):
                runs.append(future.result())
                if number % 10 == 0 or number == len(futures):
                    seconds = time.perf_counter() - begun
                    sys.stderr.write(f"{number} of {len(futures)} comparisons, {seconds:.0f} s\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    resolution = 100 / len(digits(images).test)
    differences = [[other - own for own, other in one] for one in runs]
    deviation = statistics.stdev(value for one in differences for value in one)
    mean = statistics.fmean(value for one in runs for pair in one for value in pair)
    few = claims([one[:SEEDS] for one in differences], resolution)
    more = claims(differences, resolution)
    planted = claims([[value + deviation for value in one] for one in differences], resolution)
    error = 100 * math.sqrt(0.05 * 0.95 / comparisons)
    print(
        f"{method}, {images} digits, {epochs} epochs: {mean:.2f} % right, differences of independent pairs have "
        f"deviation {deviation:.2f} points\n"
        f"no difference, {SEEDS} seeds: {100 - few['inconclusive']:.1f} % of {comparisons} comparisons claim one "
        f"(5 ± {error:.1f} expected, at most 7 wanted)\n"
        f"no difference, {MORE_SEEDS} seeds: {100 - more['inconclusive']:.1f} %\n"
        f"one standard deviation more, {MORE_SEEDS} seeds: {planted['better']:.1f} % say better (80 expected)\n"
        f"{time.perf_counter() - begun:.0f} s"
    )
    if few["inconclusive"] < 93:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
