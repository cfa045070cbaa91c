"""How long kd and the naive loop train until the student is right often enough on the validation images."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_loop import KdLoop
from naive_loop import NaiveLoop
from pair import tell

from kdcli.base.events import Event, Note, Progress


def kd_to(percent: float, loop: KdLoop, cache_dir: Path, epochs: int) -> dict[str, Any]:
    """A whole run of kd, read off its `metrics.jsonl`.

    The teacher's passes are no part of the run's seconds; they are told beside them, 0 if their outputs are in
    `cache_dir` already.
    """
    clock = _TeacherClock()
    started = time.perf_counter()
    result = loop.train(cache_dir, epochs=epochs, on_event=clock)
    wall = time.perf_counter() - started
    lines = (result.run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    shutil.rmtree(result.run.path)
    records = [json.loads(line) for line in lines]
    return {
        **_reached([(record["seconds"], record["val_accuracy"]) for record in records], percent),
        "teacher_passes": result.teacher_passes,
        "teacher_s": clock.seconds if result.teacher_passes else 0.0,
        "wall_s": wall,
        "precision": result.config.precision,
    }


def naive_to(percent: float, loop: NaiveLoop, epochs: int) -> dict[str, Any]:
    """The naive loop by the same recipe; it ends as soon as the accuracy is reached."""
    return _reached(loop.train_to(percent, epochs), percent)


def line_of(key: str, found: dict[str, Any], percent: float) -> str:
    """What `kd_to` or `naive_to` found, as a sentence."""
    if found["epoch"] is None:
        best = max(point["val_accuracy"] for point in found["curve"])
        return f"{key}: {percent:g} % not reached, best {best:.2f} %"
    line = f"{key}: {percent:g} % after {found['seconds']:.1f} s of training, in epoch {found['epoch']}"
    if "teacher_passes" in found:
        line += f"; beside that {found['teacher_s']:.1f} s of the teacher on train images"
    return line


def _reached(curve: Sequence[tuple[float, float]], percent: float) -> dict[str, Any]:
    first = next((index for index, (_, accuracy) in enumerate(curve) if accuracy >= percent), None)
    return {
        "epoch": None if first is None else first + 1,
        "seconds": None if first is None else curve[first][0],
        "curve": [{"seconds": seconds, "val_accuracy": accuracy} for seconds, accuracy in curve],
    }


class _TeacherClock:
    """An `OnEvent` that adds up the seconds of the teacher's passes over the train images, start-up included."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last = time.perf_counter()

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Progress) and event.task.startswith("teacher on train"):
            self.seconds += now - self.last
        elif isinstance(event, Note):
            tell(event.text)
        self.last = now
