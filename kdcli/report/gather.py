"""Files of runs and comparisons, untrusted: wrong content is a KdError or a line of `problems`."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from kdcli.base.errors import START, KdError
from kdcli.base.files import read_document
from kdcli.engine.records import Metrics, RunResult, epoch_lines, read_result
from kdcli.engine.run_dir import RunDir
from kdcli.models import checkpoint

COMPARISON = "comparison.json"
_MAX_SETTINGS = 200  # values of config.toml and environment.json

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One finished run; classes and provenance are from student.pt, config and environment (setting, value)."""

    folder: Path
    student: Path  # path of its checkpoint
    name: str  # of the folder
    result: RunResult  # its result.json, with figures on test images
    validation: tuple[tuple[int, float], ...]  # (epoch, validation accuracy in per cent), in order
    classes: tuple[str, ...]
    provenance: dict[str, Any]
    config: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]  # files that could not be read, one line each


def folders(named: Sequence[Path]) -> list[Path]:
    """Run folders: those named (a student.pt stands for its folder, a comparison for its runs), else all below
    runs/, or, where there are none, those of all comparisons; a KdError if there are none.
    """
    found: list[Path] = []
    for path in named:
        if any(path.glob("comparison.*")):  # .json of a finished one, .toml of any
            found += _runs_of(path)
        else:
            found.append(path.parent if path.is_file() else path)
    if named:
        return list({folder.resolve(): folder for folder in found}.values())
    found = [path for path in Path("runs").glob("*") if path.is_dir() and not path.name.startswith(".")]
    found = found or [run for path in sorted(Path("comparisons").glob("*")) for run in _runs_of(path)]
    if not found:
        raise KdError("no runs in runs/", START)
    return sorted(found)


def comparisons(named: Sequence[Path]) -> list[Path]:
    """Comparisons among the named folders; where none is named, all below comparisons/."""
    candidates = named or sorted(Path("comparisons").glob("*"))
    return [path for path in candidates if (path / COMPARISON).is_file()]


def _runs_of(comparison: Path) -> list[Path]:
    """Runs of a comparison, by method and seed."""
    found = [path for path in (comparison / "runs").glob("*") if re.search(r"-seed\d+$", path.name)]
    return sorted(found, key=lambda path: (path.name.rpartition("-seed")[0], len(path.name), path.name))


def gather(paths: Sequence[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """The finished runs among folders, and (name, reason) of the others; a KdError if none is finished."""
    runs, left_out = read_each(paths, read_run)
    if not runs:
        name, why = left_out[0]
        more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
        raise KdError(f"no finished run to report on: {name}: {why}{more}", "List the runs: kd runs")
    return runs, left_out


def read_each(paths: Sequence[Path], read: Callable[[Path], T]) -> tuple[list[T], list[tuple[str, str]]]:
    """Readable contents, and (name, reason) of the other paths."""
    found: list[T] = []
    left_out: list[tuple[str, str]] = []
    for path in paths:
        try:
            found.append(read(path))
        except KdError as error:
            left_out.append((path.name or path.as_posix(), error.message))
    return found, left_out


def read_run(folder: Path) -> Run:
    """The files of a run; a KdError if it is not finished, or its result or student cannot be read."""
    place = RunDir(folder)
    if not place.result_file.is_file():
        raise KdError("not finished (no result.json)" if place.config_file.is_file() else "not a run folder")
    result = read_result(place.result_file)
    if result.test is None:
        raise KdError("not measured on test images (a trial of kd tune)")
    loaded = checkpoint.load(place.student)
    if len(loaded.classes) != len(result.test.per_class):
        raise KdError(
            f"result.json is of {len(result.test.per_class)} classes, student.pt of {len(loaded.classes)}"
        )
    problems: list[str] = []
    epochs: list[Metrics] = []
    try:
        epochs = epoch_lines(place.metrics_file)
    except KdError as error:
        problems.append(error.message)
    return Run(
        folder=folder,
        student=place.student,
        name=folder.name or folder.resolve().name,
        result=result,
        validation=tuple((line.epoch, line.val_accuracy) for line in epochs if line.val_accuracy is not None),
        classes=loaded.classes,
        provenance=loaded.provenance,
        config=_settings(place.config_file, problems),
        environment=_settings(place.environment_file, problems),
        problems=tuple(problems),
    )


def _settings(path: Path, problems: list[str]) -> tuple[tuple[str, str], ...]:
    """(setting, value) pairs of a TOML or JSON file; adds to `problems` if it cannot be read."""
    try:
        return tuple(islice(_flattened(read_document(path)), _MAX_SETTINGS))
    except KdError as error:
        problems.append(error.message)
        return ()


def _flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{prefix} {key}".strip()
        if isinstance(value, dict):
            yield from _flattened(value, name)
        elif isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
            yield name, ", ".join(map(str, value))
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield name, text
