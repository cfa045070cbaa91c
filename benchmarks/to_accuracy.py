"""Minutes from raw images and no teacher to a student of given validation accuracies: by kd, and by loops with the
teacher in each step.

    kd train --recipe teacher --data cifar10-jpeg.tar.xz --name teacher
    kd train --recipe patient --teacher runs/teacher/student.pt --name patient
    python benchmarks/to_accuracy.py --data cifar10-jpeg.tar.xz --teacher-run runs/teacher --student-run runs/patient

kd: seconds of the two runs, the student's until an epoch ends at that accuracy, and of the teacher's passes over
all views, from a pass over some images. The loops are not run to the end: epochs of the two runs times the seconds of
an epoch, from images/s in interleaved rounds. They flip, but do not crop, which is in their favour. torchdistill's
teacher is the plain loop's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kd_loop import KdLoop, set_threads
from naive_loop import LabelLoop, NaiveLoop
from pair import Pair, Side, cut, spread, tell
from torchdistill_loop import TorchdistillLoop, reason_against

from kdcli import data
from kdcli.base.events import Event, Progress
from kdcli.data import Splits
from kdcli.engine.records import read_result
from kdcli.engine.run_dir import RunDir


class PassClock:
    """An `OnEvent` that adds up the seconds of the teacher's passes over training images."""

    def __init__(self) -> None:
        self.seconds, self.last = 0.0, time.perf_counter()

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Progress) and event.task.startswith("teacher on train"):
            self.seconds += now - self.last
        self.last = now


def pass_rate(pair: Pair, scratch: Path, threads: int) -> float:
    """Images/s of the teacher in kd, over the views that fill its cache."""
    clock = PassClock()
    result = KdLoop(pair, scratch, threads=threads, precision="auto").train(
        scratch / "cache", epochs=1, on_event=clock
    )
    return result.teacher_passes * len(pair.rows[0]) / clock.seconds


def rates(sides: list[Side], rounds: int, threads: int) -> dict[str, float]:
    """Median images/s of each side."""
    found: dict[str, list[float]] = {side.key: [] for side in sides}
    for side in sides:
        set_threads(threads)
        side.warm_up()
    for number in range(rounds):
        for side in sides:
            set_threads(threads)
            found[side.key].append(side.round().images_per_s)
            tell(f"round {number + 1}/{rounds}, {side.label}: {found[side.key][-1]:.0f} images/s")
    return {key: median(values) for key, values in found.items()}


def first_at(run: RunDir, percent: float) -> tuple[int, float] | None:
    """Epoch and seconds of training at whose end the validation accuracy is reached first."""
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    epochs = [line for line in lines if line["kind"] == "epoch"]
    return next(((e["epoch"], e["seconds"]) for e in epochs if e["val_accuracy"] >= percent), None)


def main() -> int:
    """Print a table and write every number with --json."""
    args = _parse()
    teacher, student = RunDir(args.teacher_run), RunDir(args.student_run)
    of_teacher, of_student = (read_result(run.result_file) for run in (teacher, student))
    splits = data.load(args.data, cache_dir=args.cache_dir)
    few = Splits(splits.spec, splits.label, cut(splits.train, args.images), cut(splits.test, 512))
    pair = Pair(few, teacher.student, 0.05)
    some = pair.rows[0][spread(len(pair.rows[0]), args.slow_images)]
    sides: list[Side] = [
        LabelLoop(pair, some, args.workers, of_teacher.student),
        NaiveLoop(pair, some, args.workers),
    ]
    with tempfile.TemporaryDirectory() as name:
        if reason := reason_against("d1"):
            tell(reason)
        else:
            sides.append(TorchdistillLoop("d1", pair, some, args.workers, Path(name)))
        measured = {
            "pass": pass_rate(pair, Path(name), args.threads),
            **rates(sides, args.rounds, args.threads),
        }
    count = round(of_student.images_per_s * of_student.seconds / of_student.epochs)  # training images
    passes = student.read_config().views * count / measured["pass"]
    rows: list[dict[str, Any]] = []
    for percent in args.percent:
        reached = first_at(student, percent)
        if reached is None:
            tell(f"{student.path} never reaches {percent:g} %")
            continue
        epoch, seconds = reached
        minutes = {"kd": (of_teacher.seconds + passes + seconds) / 60}
        for key in [side.key for side in sides[1:]]:
            images = {measured["labels"]: of_teacher.epochs * count, measured[key]: epoch * count}
            minutes[key] = sum(number / rate for rate, number in images.items()) / 60
        rows.append({"percent": percent, "epoch": epoch, "minutes": minutes})
        shown = (f"{key} {value:.0f} min ({value / minutes['kd']:.1f}×)" for key, value in minutes.items())
        print(f"{percent:g} % in epoch {epoch}: {', '.join(shown)}")
    report = {
        "rates": measured,
        "training_images": count,
        "threads": torch.get_num_threads(),
        "reached": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="as for kd train")
    add("--teacher-run", type=Path, required=True, help="a run of kd train --recipe teacher")
    add("--student-run", type=Path, required=True, help="a run of its student")
    add("--percent", type=float, nargs="+", default=[78.0, 81.0], help="of the validation images")
    add("--images", type=int, default=5120, help="train images of kd's pass")
    add("--slow-images", type=int, default=1280, help="images a round of the loops")
    add("--rounds", type=int, default=3)
    add("--workers", type=int, default=0, help="DataLoader workers")
    add("--threads", type=int, default=0, help="0: all available cores")
    add("--cache-dir", type=Path, default=Path("cache"), help="packed images")
    add("--json", type=Path, help="write every number to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
