"""`kd reproduce`: a finished run once more from its own folder, and whether the same comes out."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcli import methods
from kdcli.base import files
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Note, OnEvent, ignore
from kdcli.base.text import reason
from kdcli.data import Splits
from kdcli.engine import RunDir, fit
from kdcli.engine.inputs import load_data
from kdcli.engine.run_dir import PLACE, resume_command
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint
from kdcli.models.checkpoint import Checkpoint
from kdcli.teacher.recorded import teachers_of

IDENTICAL, WITHIN, DIFFERENT = "bit-identical", "within tolerance", "different"
_MOST_BYTES = 64 << 20
_CIRCUMSTANCES = (
    "kd_version",
    "python",
    "platform",
    "accelerator",
    "accelerator_name",
    "processes",
    "threads",
)


@dataclass(frozen=True)
class Reproduction:
    """How a run and its repetition agree.

    Attributes:
        run, again: their folders.
        verdict: `bit-identical`: all tensors of the student and all figures on test images; `within tolerance`: the
            same settings and inputs, and test accuracies at most `tolerance` points apart; `different`.
        accuracy, accuracy_again: on test images, per cent.
        interval: 95 % interval of the recorded accuracy, for the chance of the test sample.
        sha256, sha256_again: of the students' tensors.
        tensors_differ: how many of `tensors` do; the largest difference of one value is `largest_difference`.
        circumstances: what was different about machine and versions, a line each.
    """

    run: str
    again: str
    verdict: str
    tolerance: float
    accuracy: float
    accuracy_again: float
    interval: tuple[float, float]
    test_images: int
    sha256: str
    sha256_again: str
    tensors: int
    tensors_differ: int
    largest_difference: float
    circumstances: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return self.verdict != DIFFERENT

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()
        }


@dataclass(frozen=True)
class Finished:
    """A finished run, read and found whole."""

    place: RunDir
    config: TrainConfig
    student: Checkpoint
    test: dict[str, Any]
    environment: dict[str, Any]
    marks: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        return float(self.test["accuracy"])


def read_finished(folder: Path, method: str = "") -> Finished:
    """A run to repeat.

    Raises:
        KdError: it is not finished, or its files cannot be read.
        UsageError: it had several processes.
    """
    place = RunDir.existing(folder)
    config = place.read_config()
    if not place.result_file.is_file():
        raise KdError(f"{folder} is not finished", f"{resume_command(folder, config.method)} finishes it.")
    methods.check_own_method(config, method, str(folder))
    methods.get(config.method)
    result, environment = _json(place.result_file), _json(place.environment_file)
    test = result.get("test")
    if not isinstance(test, dict) or not _is_share(test.get("accuracy")) or not _is_interval(test):
        raise KdError(f"{place.result_file} has no test accuracy", "Name a run that kd train has finished.")
    if config.devices > 1 or environment.get("processes", 1) != 1:
        raise UsageError(
            f"{folder} had several processes, and kd reproduce has one",
            f"kd train --config {shlex.quote(place.config_file.as_posix())} repeats it with --devices.",
        )
    marks = result.get("resumed_with_differences")
    return Finished(
        place,
        config,
        checkpoint.load(place.student),
        test,
        environment,
        tuple(map(str, marks)) if isinstance(marks, list) else (),
    )


def check_inputs(found: Finished, on_event: OnEvent = ignore) -> Splits:
    """The run's data, when it, teacher, student's file and code of one's own are all those that were recorded.

    Raises:
        KdError: one is missing, or is not the one that the run had.
    """
    provenance, folder, config = found.student.provenance, found.place.path, found.config
    recorded = teachers_of(provenance)
    for what, path, sha256 in (
        *(("teacher", path, sha256) for path, (_, sha256) in zip(config.teacher, recorded, strict=False)),
        ("student's file", config.student_file, provenance.get("student_sha256")),
    ):
        if sha256 is None or path is None:
            continue
        if not path.is_file():
            raise KdError(f"the {what} of {folder} is not there: {path}", "Reproduce it where it was made.")
        if files.sha256_file(path) != sha256:
            raise KdError(
                f"the {what} {path} is not the one {folder} was made with: its SHA-256 is another",
                f"Restore the file with SHA-256 {sha256}.",
            )
    code = provenance.get("method_sha256")
    for name, sha256 in methods.sources(config.method).items():
        if isinstance(code, dict) and code.get(name) != sha256:
            raise KdError(
                f"the code of {name} is not the one {folder} was made with: its SHA-256 is another",
                f"Restore the file with SHA-256 {code.get(name)}, or train anew.",
            )
    data = load_data(config, on_event)
    about = provenance.get("data")
    about = about if isinstance(about, dict) else {}
    more = about.get("unlabelled")
    more = more if isinstance(more, dict) else {}
    for what, recorded_as, images in (
        (f"train images of {config.data}", about.get("fingerprint_train"), data.train),
        (f"test images of {config.data}", about.get("fingerprint_test"), data.test),
        (f"images without labels, {config.unlabelled},", more.get("fingerprint"), data.unlabelled),
    ):
        if recorded_as != (None if images is None else images.fingerprint):
            raise KdError(
                f"the {what} are not those {folder} was made with: their SHA-256 is another",
                "Restore the data, or train anew.",
            )
    return data


def reproduce(
    found: Finished, data: Splits, tolerance: float = 0.5, on_event: OnEvent = ignore
) -> Reproduction:
    """Train once more with the same settings, into a folder beside the run, and compare.

    Args:
        tolerance: points of test accuracy that may lie between the two where the bits differ.

    Raises:
        KdError: as `engine.fit`.
        Interrupted: stopped; the same command goes on.
    """
    for mark in found.marks:
        on_event(Note(f"{found.place.path} was itself resumed with a difference: {mark}"))
    path = found.place.path.resolve()
    with files.locked(
        path.parent / f".{path.name}.lock",
        lambda: on_event(Note("another kd reproduce is at work on this run; waiting for it")),
    ):
        again, begun = _place_of(found)
        try:
            result = fit(_config_of(found, again), data, resume=again if begun else None, on_event=on_event)
        except Interrupted as error:
            hint = _command(found.place.path, found.config.method)
            raise Interrupted(error.message, hint, exit_code=error.exit_code) from error
    other = read_finished(result.run.path, found.config.method)
    differ, largest = _compared(found.student.state_dict, other.student.state_dict)
    digests = [checkpoint.digest(one.student.state_dict) for one in (found, other)]
    if digests[0] == digests[1] and found.test == other.test:
        verdict = IDENTICAL
    else:
        verdict = WITHIN if abs(found.accuracy - other.accuracy) <= tolerance + 1e-9 else DIFFERENT
    low, high = found.test["accuracy_interval"]
    return Reproduction(
        run=found.place.path.as_posix(),
        again=result.run.path.as_posix(),
        verdict=verdict,
        tolerance=tolerance,
        accuracy=found.accuracy,
        accuracy_again=other.accuracy,
        interval=(float(low), float(high)),
        test_images=len(data.test),
        sha256=digests[0],
        sha256_again=digests[1],
        tensors=len(found.student.state_dict),
        tensors_differ=differ,
        largest_difference=largest,
        circumstances=tuple(_circumstances(found, other)),
    )


def _command(run: Path, method: str) -> str:
    """What to type again; the method where that is code, which no file may name."""
    typed = f" --method {method}" if methods.any_own(method) else ""
    return f"kd reproduce {shlex.quote(run.as_posix())}{typed}"


def _config_of(found: Finished, again: RunDir) -> TrainConfig:
    """The run's settings; where it took all cores, as many threads as those were."""
    threads = found.config.threads or found.environment.get("threads")
    return found.config.model_copy(
        update={
            "name": again.path.name,
            "runs_dir": again.path.parent,
            "threads": threads if isinstance(threads, int) and 0 < threads <= 1024 else 0,
        }
    )


def _place_of(found: Finished) -> tuple[RunDir, bool]:
    """The folder `<run>-reproduced-N`, and whether it holds a repetition that was stopped."""
    number, path = 1, found.place.path.resolve()
    while True:
        again = RunDir(path.parent / f"{path.name}-reproduced-{number}")
        if not again.path.exists():
            return RunDir(found.place.path.parent / again.path.name), False
        if again.config_file.is_file() and not again.result_file.exists():
            mine, theirs = (
                config.model_dump(exclude=PLACE) for config in (_config_of(found, again), again.read_config())
            )
            if mine == theirs:
                return RunDir(found.place.path.parent / again.path.name), True
        number += 1


def _compared(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[int, float]:
    """How many tensors differ, and the largest difference of one value among those of the same shape."""
    count, largest = 0, 0.0
    for name in {**ours, **theirs}:
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None or one.shape != other.shape:
            count, largest = count + 1, math.inf
        elif not torch.equal(one, other):
            count += 1
            largest = max(largest, float((one.double() - other.double()).abs().max()))
    return count, largest


def _circumstances(found: Finished, other: Finished) -> Iterator[str]:
    """What was different about machine and versions, from environment.json and the saved states."""
    before, now = (dict(_flat(one)) for one in (found, other))
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            yield f"{name} was {before.get(name)}, is {now.get(name)}"


def _flat(run: Finished) -> Iterator[tuple[str, str]]:
    environment = run.environment
    for name in _CIRCUMSTANCES:
        yield name, str(environment.get(name))
    for part, names in (("packages", None), ("cpu", ("model", "flags"))):
        values = environment.get(part)
        for name, value in values.items() if isinstance(values, dict) else ():
            if names is None or name in names:
                yield f"{part} {name}", " ".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        training = checkpoint.load(run.place.last).training or {}
    except KdError:
        return
    made_with = training.get("made_with")
    for name, value in made_with.items() if isinstance(made_with, dict) else ():
        if name in ("device", "instructions"):
            yield str(name), str(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise KdError(f"{path} is larger than any that kd train writes")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise KdError(f"cannot read {path}: {reason(error)}", "Name a run's folder.") from error
    except (ValueError, RecursionError) as error:
        raise KdError(f"{path} is not JSON", "Name a run that kd train has finished.") from error
    if not isinstance(document, dict):
        raise KdError(f"{path} holds no figures", "Name a run that kd train has finished.")
    return document


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 100


def _is_interval(test: dict[str, Any]) -> bool:
    interval = test.get("accuracy_interval")
    return isinstance(interval, list) and len(interval) == 2 and all(map(_is_share, interval))
