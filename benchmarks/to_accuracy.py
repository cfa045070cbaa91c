"""Minutes from raw images to a student of given accuracy, by kd and by loops with the teacher in each step.

    kd train --recipe teacher --data cifar10-jpeg.tar.xz --name teacher
    kd train --recipe patient --teacher runs/teacher/student.pt --name patient
    python benchmarks/to_accuracy.py --teacher-run runs/teacher --student-run runs/patient

kd: the seconds that the two runs recorded, the student's until an epoch ends at that accuracy, and the teacher's
passes, by the times of the cached views. The loops are not run to the end: the epochs of the two runs times the
seconds of an epoch, from images/s in interleaved rounds. The teacher's training is counted on all sides,
torchdistill's teacher is the naive loop's; packing, validation and tests are counted on none. The loops flip, but
do not crop, which is in their favour.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from naive_loop import LabelLoop, NaiveLoop, loader_of
from pair import Pair, cut, new_network
from rounds import Side, log, machine, measure, pass_rates, shown, spread_of
from torchdistill_loop import TorchdistillLoop, reason_against

from kdcli.base import runtime
from kdcli.data import Splits
from kdcli.engine import RunResult, read_result
from kdcli.engine.plan import load_data


def trained_images(run: RunResult) -> int:
    """Images that a run trained on, over all epochs."""
    return round(run.images_per_s * run.seconds)


def rates(
    teacher: RunResult, student: RunResult, images: int, rounds: int, workers: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Images/s of the loops, by key: the teacher's training from labels, and the student's by each other loop."""
    splits = load_data(student.config)
    few = Splits(splits.spec, splits.label, cut(splits.train, images), splits.test)
    pair = Pair(few, teacher.run.student, student.student)
    rows = pair.rows[0]
    loader = loader_of(pair.dataset(rows, flip=True), workers)
    sides: list[Side] = [
        LabelLoop(new_network(teacher.student, few.train), loader),
        NaiveLoop(pair.teacher, pair.student(), loader),
    ]
    if reason := reason_against("d1"):
        log(reason)
    else:
        sides.append(TorchdistillLoop("d1", pair, rows, workers))
    timings = measure(sides, rounds, threads)
    return {key: spread_of([timing.images_per_s for timing in found]) for key, found in timings.items()}


def main(
    teacher_run: Annotated[Path, typer.Option(help="A run of kd train --recipe teacher.")],
    student_run: Annotated[Path, typer.Option(help="A run of its student, with the cache of its teacher.")],
    percent: Annotated[list[float], typer.Option(help="Validation accuracies.")] = [78.0, 81.0],  # noqa: B006
    images: Annotated[int, typer.Option(help="Images a round of the loops.")] = 1280,
    rounds: int = 3,
    workers: Annotated[int, typer.Option(help="DataLoader workers.")] = 0,
    threads: Annotated[int, typer.Option(help="0: all available cores.")] = 0,
) -> None:
    """Print minutes to each accuracy."""
    teacher, student = (read_result(run / "result.json") for run in (teacher_run, student_run))
    config = student.config
    count, passes = pass_rates(config.cache_dir, teacher.run.student, config.augment)
    pass_s = config.views * count / median(passes)
    found = rates(teacher, student, images, rounds, workers, threads)
    loops = [key for key in found if key != "labels"]
    names = {"c": "naive loop", "d1": "torchdistill"}
    print(f"{teacher.student} → {student.student}, {machine(runtime.set_threads(threads))}\n")
    print(f"| validation accuracy | epoch | kd, min | {' | '.join(f'{names[key]}, min' for key in loops)} |")
    print("| ---: | ---: | ---: |" + " ---: |" * len(loops))
    for wanted in percent:
        line = next((each for each in student.history if (each.val_accuracy or 0) >= wanted), None)
        if line is None:
            log(f"{student.run.path} never reaches {wanted:g} %")
            continue
        kd = (teacher.seconds + pass_s + line.seconds) / 60
        taught = trained_images(student) / student.epochs * line.epoch
        cells = []
        for key in loops:
            seconds = trained_images(teacher) / found["labels"]["median"] + taught / found[key]["median"]
            cells.append(f"{seconds / 60:.0f} ({seconds / 60 / kd:.1f}×)")
        print(f"| {wanted:g} % | {line.epoch} | {kd:.0f} | {' | '.join(cells)} |")
    speeds = {"the teacher's pass": spread_of(passes), **found}
    print("\nimages/s: " + "; ".join(f"{key} {shown(values)}" for key, values in speeds.items()))


if __name__ == "__main__":
    typer.run(main)
