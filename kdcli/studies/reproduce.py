"""`kd reproduce`: repeat a finished run from its own folder, and compare the two."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcli import methods
from kdcli.base import files
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Note, OnEvent, ignore
from kdcli.data import Splits
from kdcli.engine import Evaluation, RunDir, RunResult, fit, read_result
from kdcli.engine.identity import (
    check_unchanged,
    decisive_settings,
    differences,
    input_hashes,
    recorded_circumstances,
    recorded_inputs,
)
from kdcli.engine.inputs import load_data
from kdcli.engine.run_dir import resume_command
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint
from kdcli.models.checkpoint import Checkpoint

IDENTICAL, WITHIN, DIFFERENT = "bit-identical", "within tolerance", "different"


@dataclass(frozen=True)
class Reproduction:
    """Comparison of a run with its repetition.

    Attributes:
        run, again: their folders.
        verdict: `bit-identical`: all tensors of the student and all figures on test images are equal; `within
            tolerance`: test accuracies differ by at most `tolerance` points; `different`: by more.
        accuracy, accuracy_again: on test images, per cent.
        interval: 95 % interval of the recorded accuracy, for the chance of the test sample.
        sha256, sha256_again: of the students' tensors.
        tensors_differ: how many of `tensors` differ, at most by `largest_difference`.
        circumstances: differences of machine and versions, a line each.
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
        """Whether the repetition agrees."""
        return self.verdict != DIFFERENT

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, read whole.

    Attributes:
        circumstances: versions, hardware and threads, by name.
    """

    run_dir: RunDir
    config: TrainConfig
    student: Checkpoint
    result: RunResult
    circumstances: Mapping[str, str]

    @property
    def test(self) -> Evaluation:
        """Figures on the test images."""
        return self.result.evaluation


def read_finished(folder: Path, method: str = "") -> FinishedRun:
    """A run to repeat.

    Args:
        method: as typed; has to be the run's if that is a method of one's own.

    Raises:
        KdError: it is not finished, or its files cannot be read.
        UsageError: it had several processes, or is a trial of a search.
    """
    run_dir = RunDir.existing(folder)
    config = run_dir.read_config()
    if not run_dir.result_file.is_file():
        raise KdError(f"{folder} is not finished", f"{resume_command(folder, config.method)} finishes it.")
    methods.check_typed(config, method, str(folder))
    methods.parse(config.method)
    result = read_result(run_dir.result_file)
    if result.test is None:
        raise UsageError(
            f"{folder} is a trial of kd tune, without figures on test images", "Pass another run."
        )
    circumstances = recorded_circumstances(run_dir.environment_file)
    if config.devices > 1 or circumstances.get("processes", "1") != "1":
        raise UsageError(
            f"{folder} had several processes, and kd reproduce has one",
            f"kd train --config {shlex.quote(run_dir.config_file.as_posix())} repeats it with --devices.",
        )
    return FinishedRun(run_dir, config, checkpoint.load(run_dir.student), result, circumstances)


def check_inputs(found: FinishedRun, on_event: OnEvent = ignore) -> Splits:
    """The run's data, if it, teacher, student's file and own methods are those that were recorded.

    Raises:
        KdError: one is missing or changed.
    """
    data = load_data(found.config, on_event)
    recorded, current = recorded_inputs(found.student.provenance), input_hashes(found.config, data)
    try:
        check_unchanged(recorded, current, str(found.run_dir.path))
    except KdError as error:
        raise KdError(error.message, "Restore it, or train anew with kd train.") from error
    return data


def reproduce(
    found: FinishedRun, data: Splits, tolerance: float = 0.5, on_event: OnEvent = ignore
) -> Reproduction:
    """Train with the same settings in a folder beside the run, and compare.

    Args:
        tolerance: points of test accuracy by which the two may differ if their bits do.

    Raises:
        KdError: as `engine.fit`.
        Interrupted: SIGINT or SIGTERM; the same command continues.
    """
    for difference in found.result.resumed_with_differences:
        on_event(Note(f"{found.run_dir.path} was itself resumed with a difference: {difference}"))
    path = found.run_dir.path.resolve()
    with files.locked(
        path.parent / f".{path.name}.lock",
        lambda: on_event(Note("waiting for another kd reproduce of this run")),
    ):
        again, started = _repetition(found)
        try:
            result = fit(_config_of(found, again), data, resume=again if started else None, on_event=on_event)
        except Interrupted as error:
            hint = _command(found.run_dir.path, found.config.method)
            raise Interrupted(error.message, hint, exit_code=error.exit_code) from error
    return _compare(found, read_finished(result.run.path, found.config.method), tolerance)


def _compare(found: FinishedRun, other: FinishedRun, tolerance: float) -> Reproduction:
    differing, largest = _tensor_differences(found.student.state_dict, other.student.state_dict)
    sha256, sha256_again = (checkpoint.digest(one.student.state_dict) for one in (found, other))
    if sha256 == sha256_again and found.test == other.test:
        verdict = IDENTICAL
    else:
        apart = abs(found.test.accuracy - other.test.accuracy)
        verdict = WITHIN if apart <= tolerance + 1e-9 else DIFFERENT
    return Reproduction(
        run=found.run_dir.path.as_posix(),
        again=other.run_dir.path.as_posix(),
        verdict=verdict,
        tolerance=tolerance,
        accuracy=found.test.accuracy,
        accuracy_again=other.test.accuracy,
        interval=found.test.accuracy_interval,
        test_images=other.test.count,
        sha256=sha256,
        sha256_again=sha256_again,
        tensors=len(found.student.state_dict),
        tensors_differ=differing,
        largest_difference=largest,
        circumstances=tuple(differences(found.circumstances, other.circumstances)),
    )


def _command(run: Path, method: str) -> str:
    """The command that continues; with the method if it is one of one's own, which has to be typed."""
    typed = f" --method {method}" if methods.is_custom(method) else ""
    return f"kd reproduce {shlex.quote(run.as_posix())}{typed}"


def _config_of(found: FinishedRun, again: RunDir) -> TrainConfig:
    """The run's settings, with as many threads as it had."""
    threads = int(found.circumstances.get("threads", "0"))
    own = {"name": again.path.name, "runs_dir": again.path.parent, "threads": found.config.threads or threads}
    return found.config.model_copy(update=own)


def _repetition(found: FinishedRun) -> tuple[RunDir, bool]:
    """The folder `<run>-reproduced-N`, and whether it holds an interrupted repetition."""
    number, path = 1, found.run_dir.path
    while True:
        again = RunDir(path.parent / f"{path.resolve().name}-reproduced-{number}")
        if not again.path.exists():
            return again, False
        if again.config_file.is_file() and not again.result_file.exists():
            own, stored = (decisive_settings(one) for one in (found.config, again.read_config()))
            if own == stored:
                return again, True
        number += 1


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
