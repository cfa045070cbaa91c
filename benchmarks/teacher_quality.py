"""Gain of distillation over labels alone by the teacher's quality, augmentation and epochs.

Real runs on scikit-learn's digits. For each cell: what `kd train` measures of the teacher before the first step, and
the paired difference of `--method kd` to `--method ce` over seeds with its 95 % interval. The last line: in how many
of the cells whose interval excludes 0 the warning has the right sign.

    python benchmarks/teacher_quality.py --json cells.json      # 54 cells, 5 seeds: 315 runs
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import typer

# share of the training images, and augmentation, of each teacher
TEACHERS = {
    "1 %": (0.01, "none"),
    "3 %": (0.03, "none"),
    "10 %": (0.1, "none"),
    "30 %": (0.3, "none"),
    "all": (1.0, "none"),
    "all, flips": (1.0, "flip"),
}
AUGMENTS = ("none", "flip", "cutout")
EPOCHS = (4, 12, 40)
COMMON: dict[str, Any] = {
    "data": "digits", "precision": "32", "threads": 1, "save_every": "0", "keep": 1, "log_every": 0, "lr": 1e-2,
}  # fmt: skip


def run(splits: Any, **values: Any) -> Any:
    from kdcli.base.config import make
    from kdcli.engine import fit
    from kdcli.methods import TrainConfig

    return fit(make(TrainConfig, {**COMMON, **values}), splits)


def make_teacher(splits: Any, name: str) -> Path:
    from kdcli.data.images import fingerprint_of

    share, augment = TEACHERS[name]
    train = splits.train
    chosen = np.sort(np.random.default_rng(0).permutation(len(train))[: round(share * len(train))])
    images, labels = train.images[chosen], train.labels[chosen]
    part = replace(
        train, images=images, labels=labels, fingerprint=fingerprint_of(images, labels, train.classes)
    )
    folder = f"teacher {name}".replace(" %", "").replace(",", "").replace(" ", "-")
    values = {
        "student": "convnet-small",
        "epochs": 40,
        "augment": augment,
        "val_fraction": 0.0,
        "name": folder,
    }
    return run(replace(splits, train=part), method="ce", **values).run.student


def main(seeds: int = 5, json: Path | None = None) -> None:
    """Print a line for each cell, and how often the warning is right; write all figures with --json."""
    output = json and json.resolve()
    from kdcli import data
    from kdcli.studies.compare.stats import summary, verdict

    os.chdir(tempfile.mkdtemp())
    splits = data.load("digits")
    teachers = {name: make_teacher(splits, name) for name in TEACHERS}
    cells: list[dict[str, Any]] = []
    for augment in AUGMENTS:
        for epochs in EPOCHS:
            common = {"student": "convnet-tiny", "augment": augment, "epochs": epochs, "view_seed": 0}
            where = f"{augment}-{epochs}"
            base = [
                run(splits, **common, method="ce", seed=seed, name=f"ce-{where}-{seed}").evaluation.accuracy
                for seed in range(seeds)
            ]
            for number, (name, path) in enumerate(teachers.items()):
                taught = [
                    run(
                        splits,
                        **common,
                        method="kd",
                        teacher=path,
                        seed=seed,
                        name=f"kd-{number}-{where}-{seed}",
                    )
                    for seed in range(seeds)
                ]
                pairs = zip(taught, base, strict=True)
                difference = summary([one.evaluation.accuracy - other for one, other in pairs], 100 / 360)
                check = taught[0].teacher
                cell = {
                    "teacher": name, "augment": augment, "epochs": epochs, "ce": sum(base) / len(base),
                    "difference": difference.mean, "interval": difference.interval, "verdict": verdict(difference),
                    "check": check.to_dict(),
                }  # fmt: skip
                cells.append(cell)
                low, high = difference.interval or (0.0, 0.0)
                print(
                    f"{name:10} {augment:6} {epochs:3}  ce {cell['ce']:5.1f}  {difference.mean:+6.2f} "
                    f"({low:+.2f} … {high:+.2f})  views {check.views:5.1f}  plain {check.plain:5.1f}  "
                    f"validation {check.validation:5.1f}  ECE {check.views_calibration_error:.1f}",
                    flush=True,
                )
    clear = [cell for cell in cells if cell["verdict"] in ("better", "worse")]
    right = [cell for cell in clear if (cell["check"]["warning"] is not None) == (cell["verdict"] == "worse")]
    print(
        f"the interval excludes 0 in {len(clear)} of {len(cells)} cells; the warning is right in {len(right)}"
    )
    if output:
        output.write_text(dumps(cells, indent=1))


if __name__ == "__main__":
    typer.run(main)
