"""What runs left behind, read as files of unknown origin: a wrong value is one line, never a crash."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdcli.base.errors import KdError
from kdcli.engine.run_dir import RunDir
from kdcli.models import checkpoint

COMPARISON = "comparison.json"
MOST_BYTES = 64 << 20  # of result.json and metrics.jsonl; a matrix of 1,000 classes takes 11 MB
_SETTINGS_BYTES = 1 << 20  # of config.toml and environment.json
_MOST_ROWS = 200
_DEEPEST = 8

Share = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class Test(BaseModel):
    """`test` of a result.json."""

    model_config = ConfigDict(strict=True, frozen=True)

    count: Annotated[int, Field(ge=1, lt=2**53)]
    accuracy: Share
    accuracy_interval: tuple[Share, Share]
    calibration_error: Share
    per_class: list[Share | None]
    confusion: list[list[Count]]
    agreement: Share | None = None
    teacher_accuracy: Share | None = None

    @model_validator(mode="after")
    def _is_square(self) -> Test:
        count = len(self.per_class)
        if len(self.confusion) != count or any(len(row) != count for row in self.confusion):
            raise ValueError("confusion must be a square with a row for each class")
        return self


class Recorded(BaseModel):
    """A result.json, as far as a report reads it."""

    model_config = ConfigDict(strict=True, frozen=True)

    method: str
    student: str
    seed: int
    epochs: Count
    parameters: Count
    val_accuracy: Share | None = None
    test: Test
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    resumed_with_differences: list[str] = []


class Epoch(BaseModel):
    """A line of metrics.jsonl of kind `epoch`, as far as a report reads it."""

    model_config = ConfigDict(strict=True, frozen=True)

    epoch: Annotated[int, Field(ge=1, lt=2**31)]
    loss: Finite
    val_accuracy: Share | None = None


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        folder: where it lies.
        student: its checkpoint.
        name: of the folder.
        recorded: its result.json.
        epochs: in order; of an epoch that was done twice the last.
        classes, provenance: what its student.pt says.
        config, environment: rows of a setting and its value, nested names joined by spaces.
        problems: what of it could not be read.
    """

    folder: Path
    student: Path
    name: str
    recorded: Recorded
    epochs: tuple[Epoch, ...]
    classes: tuple[str, ...]
    provenance: dict[str, Any]
    config: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]


def folders(named: Sequence[Path], runs_dir: Path = Path("runs")) -> list[Path]:
    """The run folders that are meant: those named (or whose student.pt is), else all below `runs_dir`, or,
    where there are none, those of all comparisons.

    A comparison stands for its runs.

    Raises:
        KdError: one that is named is not there, or there are none.
    """
    if named:
        for path in named:
            if not path.exists():
                raise KdError(
                    f"no such run: {path}",
                    "Name folders below runs/, or leave them out to take all finished runs.",
                )
        found = []
        for path in named:
            whole = path / COMPARISON
            found += _runs_of(path) if whole.is_file() else [path.parent if path.is_file() else path]
        return list({folder.resolve(): folder for folder in found}.values())
    found = [path for path in runs_dir.glob("*") if path.is_dir() and not path.name.startswith(".")]
    found = found or [run for path in comparisons(()) for run in _runs_of(path)]
    if not found:
        raise KdError("there are no runs below runs/", "kd train makes one; or name run folders.")
    return sorted(found)


def comparisons(named: Sequence[Path], below: Path = Path("comparisons")) -> list[Path]:
    """The comparisons among the folders named; where none is named, all below `below`."""
    return [path for path in named or sorted(below.glob("*")) if (path / COMPARISON).is_file()]


def _runs_of(comparison: Path) -> list[Path]:
    """In the order of the names: methods, and each method's seeds."""
    found = [path for path in (comparison / "runs").glob("*") if re.search(r"-seed\d+$", path.name)]
    return sorted(found, key=lambda path: (path.name.rpartition("-seed")[0], len(path.name), path.name))


def gather(paths: Sequence[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """The finished runs among folders, and (name, reason) of those that are left out.

    Raises:
        KdError: none is finished.
    """
    runs: list[Run] = []
    left_out: list[tuple[str, str]] = []
    for path in paths:
        try:
            runs.append(read_run(path))
        except KdError as error:
            left_out.append((path.name or path.as_posix(), error.message))
    if not runs:
        name, reason = left_out[0]
        more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
        raise KdError(
            f"no finished run to report on: {name}: {reason}{more}",
            "kd train --resume runs/NAME finishes one.",
        )
    return runs, left_out


def read_run(folder: Path) -> Run:
    """One run's files.

    Raises:
        KdError: it is not finished, or its result or student cannot be read.
    """
    place = RunDir(folder)
    if not place.result_file.is_file():
        raise KdError("not finished (no result.json)" if place.config_file.is_file() else "not a run")
    recorded = _recorded(place.result_file)
    if not place.student.is_file():
        raise KdError("has no student.pt")
    loaded = checkpoint.load(place.student)
    if len(loaded.classes) != len(recorded.test.per_class):
        raise KdError(
            f"result.json is of {len(recorded.test.per_class)} classes, student.pt of {len(loaded.classes)}"
        )
    problems: list[str] = []
    return Run(
        folder=folder,
        student=place.student,
        name=folder.name or folder.resolve().name,
        recorded=recorded,
        epochs=_epochs(place.metrics_file, problems),
        classes=loaded.classes,
        provenance=loaded.provenance,
        config=_settings(place.config_file, problems),
        environment=_settings(place.environment_file, problems),
        problems=tuple(problems),
    )


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """A JSON file of any origin.

    Raises:
        KdError: unreadable, too large, too deep, or not JSON.
    """
    try:
        return json.loads(_text(path, most_bytes))
    except (ValueError, RecursionError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else "is not JSON"
        raise KdError(f"{path.name} {reason}") from error


def complaint(name: str, error: ValidationError) -> str:
    """The first thing pydantic says, as one line: `result.json: test accuracy: Input should be …`."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = " ".join(str(part) for part in first["loc"])
    return f"{name}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"


def _text(path: Path, most_bytes: int) -> str:
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise KdError(f"{path.name} has {size:,} bytes, more than the {most_bytes:,} a report reads")
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise KdError(f"cannot read {path.name}: {error.strerror or error}") from error


def _recorded(path: Path) -> Recorded:
    try:
        return Recorded.model_validate_json(_text(path, MOST_BYTES))
    except ValidationError as error:
        raise KdError(complaint(path.name, error)) from error


def _epochs(path: Path, problems: list[str]) -> tuple[Epoch, ...]:
    try:
        lines = _text(path, MOST_BYTES).splitlines()
    except KdError as error:
        problems.append(error.message)
        return ()
    found: dict[int, Epoch] = {}
    wrong = 0
    for number, line in enumerate(lines):
        try:
            value = json.loads(line)
            if isinstance(value, dict) and value.get("kind") == "step":
                continue
            epoch = Epoch.model_validate(value)
        except (ValueError, RecursionError):
            wrong += number < len(lines) - 1  # a kill may have cut the last one short
        else:
            found[epoch.epoch] = epoch
    if wrong:
        problems.append(f"{path.name}: {wrong:,} lines are not what kd train writes, and are left out")
    return tuple(found[number] for number in sorted(found))


def _settings(path: Path, problems: list[str]) -> tuple[tuple[str, str], ...]:
    try:
        if path.suffix == ".toml":
            document: Any = tomllib.loads(_text(path, _SETTINGS_BYTES))
        else:
            document = read_json(path, _SETTINGS_BYTES)
        if not isinstance(document, dict):
            raise KdError(f"{path.name} holds no settings")
        rows = list(_flat(document))
    except KdError as error:
        problems.append(error.message)
        return ()
    except (ValueError, RecursionError):
        problems.append(f"{path.name} is not TOML")
        return ()
    if len(rows) > _MOST_ROWS:
        problems.append(f"{path.name}: {_MOST_ROWS} of {len(rows):,} values are shown")
    return tuple(rows[:_MOST_ROWS])


def _flat(values: dict[str, Any], before: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{before} {key}".strip()
        if isinstance(value, dict) and depth < _DEEPEST:
            yield from _flat(value, name, depth + 1)
        elif value is not None:
            yield name, value if isinstance(value, str) else _value(value)


def _value(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False, default=str)
