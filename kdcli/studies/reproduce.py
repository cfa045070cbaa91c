"""`kd reproduce`: repeat a finished run from its own folder, and compare the two."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcli import methods
from kdcli.base import files
from kdcli.base.config import shell_command
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Note, OnEvent, ignore
from kdcli.data import Splits
from kdcli.engine import RunDir, RunResult, fit, identity, read_result
from kdcli.engine.plan import load_data
from kdcli.engine.run_dir import resume_command
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint
from kdcli.models.checkpoint import Checkpoint

IDENTICAL, WITHIN, DIFFERENT = "bit-identical", "within tolerance", "different"


@dataclass(frozen=True)
class Reproduction:
    """Comparison of a run with its repetition: test accuracies in per cent, SHA-256 of the students' tensors.

    Attributes:
        verdict: `bit-identical`: all tensors of the student and all figures on test images are equal; `within
            tolerance`: test accuracies differ by at most `tolerance` points; `different`: by more.
    """

    run: str
    again: str
    verdict: str
    tolerance: float
    accuracy: float
    accuracy_again: float
    interval: tuple[float, float]  # 95 % interval of the recorded accuracy, for the chance of the test sample
    test_images: int
    sha256: str
    sha256_again: str
    tensors: int
    tensors_differ: int  # how many of `tensors` differ, at most by `largest_difference`
    largest_difference: float
    circumstances: tuple[str, ...]  # differences of machine and versions, a line each

    @property
    def holds(self) -> bool:
        return self.verdict != DIFFERENT

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, read whole; `circumstances` are versions, hardware and threads, by name."""

    run_dir: RunDir
    config: TrainConfig
    student: Checkpoint
    result: RunResult
    circumstances: Mapping[str, str]


def read_finished(folder: Path, method: str = "") -> FinishedRun:
    """A run to repeat; `method` is the custom method as typed.

    A KdError if it is not finished, a UsageError if it had several processes or is a trial of a search.
    """
    run_dir = RunDir.existing(folder)
    config = run_dir.read_config()
    if not run_dir.result_file.is_file():
        raise KdError(f"{folder} is not finished", f"Finish it: {resume_command(folder, config)}")
    methods.check_typed(config, method, str(folder))
    methods.parse(config.method)
    result = read_result(run_dir.result_file)
    if result.test is None:
        raise UsageError(
            f"{folder} is a trial of kd tune, without figures on test images", "Pass another run."
        )
    circumstances = identity.recorded_circumstances(run_dir.environment_file)
    if config.devices > 1 or circumstances.get("processes", "1") != "1":
        again = shell_command("train", {"config": run_dir.config_file, "method": method or None})
        raise UsageError(
            f"{folder} had several processes, and kd reproduce has one",
            f"Repeat it with its processes: {again}",
        )
    return FinishedRun(run_dir, config, checkpoint.load(run_dir.student), result, circumstances)


def check_inputs(found: FinishedRun, on_event: OnEvent = ignore) -> Splits:
    """The run's data; KdError if it, the teacher, the student's file or a custom method is missing or has changed."""
    data = load_data(found.config, on_event)
    recorded = identity.recorded_inputs(found.student.provenance)
    current = identity.input_hashes(found.config, data)
    try:
        identity.check_unchanged(recorded, current, str(found.run_dir.path))
    except KdError as error:
        raise KdError(error.message, "Restore it, or train anew with kd train.") from error
    return data


def reproduce(
    found: FinishedRun, data: Splits, tolerance: float = 0.5, on_event: OnEvent = ignore
) -> Reproduction:
    """Train with the same settings in a folder beside the run, and compare.

    `tolerance` is in points of test accuracy. After Interrupted the same command continues.
    """
    for difference in found.result.resumed_with_differences:
        on_event(Note(f"{found.run_dir.path} was itself resumed with a difference: {difference}"))
    folder, method = found.run_dir.path, found.config.method
    typed = method if methods.is_custom(method) else None  # has to be typed again
    lock = folder.resolve().parent / f".{folder.resolve().name}.lock"
    with files.locked(lock, lambda: on_event(Note("waiting for another kd reproduce of this run"))):
        again = _repetition(found)
        place = {"name": again.path.name, "runs_dir": again.path.parent}
        threads = found.config.threads or int(found.circumstances.get("threads", "0"))
        config = found.config.model_copy(update={**place, "threads": threads})
        try:
            result = fit(config, data, resume=again if again.path.exists() else None, on_event=on_event)
        except Interrupted as error:
            hint = shell_command("reproduce", {"method": typed}, folder)
            raise Interrupted(error.message, hint, exit_code=error.exit_code) from error
    return _compare(found, read_finished(result.run.path, method), tolerance)


def _compare(found: FinishedRun, other: FinishedRun, tolerance: float) -> Reproduction:
    tensors, tensors_again = found.student.state_dict, other.student.state_dict
    differing, largest = _tensor_differences(tensors, tensors_again)
    sha256, sha256_again = checkpoint.digest(tensors), checkpoint.digest(tensors_again)
    test, test_again = found.result.evaluation, other.result.evaluation
    within = abs(test.accuracy - test_again.accuracy) <= tolerance + 1e-9
    verdict = WITHIN if within else DIFFERENT
    if sha256 == sha256_again and test == test_again:
        verdict = IDENTICAL
    return Reproduction(
        run=found.run_dir.path.as_posix(),
        again=other.run_dir.path.as_posix(),
        verdict=verdict,
        tolerance=tolerance,
        accuracy=test.accuracy,
        accuracy_again=test_again.accuracy,
        interval=test.accuracy_interval,
        test_images=test_again.count,
        sha256=sha256,
        sha256_again=sha256_again,
        tensors=len(tensors),
        tensors_differ=differing,
        largest_difference=largest,
        circumstances=tuple(identity.differences(found.circumstances, other.circumstances)),
    )


def _repetition(found: FinishedRun) -> RunDir:
    """The folder `<run>-reproduced-N` of an interrupted repetition, else the first that does not exist."""
    path, own = found.run_dir.path, identity.decisive_settings(found.config)
    folders = (path.parent / f"{path.resolve().name}-reproduced-{number}" for number in itertools.count(1))
    for again in map(RunDir, folders):
        stopped = again.config_file.is_file() and not again.result_file.exists()
        if not again.path.exists() or (stopped and identity.decisive_settings(again.read_config()) == own):
            break
    return again


def _tensor_differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> tuple[int, float]:
    """How many tensors differ, and the largest difference of a value; infinite if shapes differ."""
    count, largest = 0, 0.0
    for name in {**first, **second}:
        one, other = first.get(name), second.get(name)
        if one is None or other is None or one.shape != other.shape:
            count, largest = count + 1, math.inf
        elif not torch.equal(one, other):
            count += 1
            largest = max(largest, float((one.double() - other.double()).abs().max()))
    return count, largest
