"""Defaults of options that are not given: teacher, data set, and student."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Container
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kdcli import methods
from kdcli.base import files, runs
from kdcli.base.config import TeacherInputSettings, make, shell_command
from kdcli.base.config.settings import TeacherPath
from kdcli.base.errors import START, KdError, UsageError
from kdcli.cli import output
from kdcli.cli.arguments import existing_model, is_external
from kdcli.methods import TrainConfig

if TYPE_CHECKING:
    from kdcli.base.config import BenchConfig, ValidateConfig

INPUTS = ("teacher_channel_order", "teacher_scale", "teacher_mean", "teacher_std")
_LISTED = 8  # teachers in a hint
_SMALL_STUDENT = "convnet-tiny"
C = TypeVar("C", bound=TrainConfig)


def teacher_of(config: BenchConfig | ValidateConfig) -> Path:
    """The teacher as set, or else `default_teacher`."""
    return existing_model(config.teacher) if "teacher" in config.model_fields_set else default_teacher()


def default_teacher() -> Path:
    """weights/teacher.pt, or else the only teacher in weights/ and among the runs of --method ce.

    Of several, the hint of the KdError repeats the command with each, the newest first.
    """
    if TeacherPath.is_file():
        return TeacherPath
    trained = [
        run for run in runs.run_folders() if runs.document(run / "config.toml").get("method") == methods.CE
    ]
    found = [run / "student.pt" for run in trained]
    found += [path for path in Path("weights").glob("*") if path.suffix.lower() in (".pt", ".onnx")]
    found = sorted(filter(Path.is_file, found), key=lambda path: path.stat().st_mtime, reverse=True)
    if not found:
        raise KdError("no teacher in weights/ or runs/", START)
    if len(found) > 1:
        from kdcli.cli.app import COMMANDS

        typed = ["kd", *sys.argv[1:]] if sys.argv[1:] and sys.argv[1] in COMMANDS else []  # empty from Python
        choices = (shlex.join([*typed, "--teacher", path.as_posix()]) for path in found[:_LISTED])
        raise UsageError(f"{len(found)} teachers in weights/ and runs/", f"Choose one: {'; '.join(choices)}")
    return found[0]


def with_defaults(config: C, *, needs_teacher: bool, tuned: Collection[str] = ()) -> C:
    """Settings of kd train, completed; `tuned` are those that a search sets. A KdError without a teacher."""
    from kdcli.data.datasets import DATASETS

    given = {*config.model_fields_set, *tuned}
    made: dict[str, Any] = {}
    side = config.image_size
    if needs_teacher and "teacher" not in tuned:
        made |= _typed_teachers(config) if "teacher" in given else {"teacher": (default_teacher(),)}
        made |= _recorded_inputs(made["teacher"], config)
        known, size = _training_of(made["teacher"][0], config.model_copy(update=made))
        # a pack's number of views is for its own augmentation
        other = "augment" in given and ("augment" in tuned or config.augment != known.get("augment"))
        if other or "teacher_cache" in tuned or config.teacher_cache == "fixed":
            known.pop("views", None)
        made |= {name: value for name, value in known.items() if name not in given}
        side = made.get("image_size", side) or size
    name = made.get("data", config.data)
    if side is None and name in DATASETS:
        side = DATASETS[name].input_size[0]
    if "student" not in given and side and _is_too_large(config.student, side):
        output.note(
            f"{config.student} is too large for {side}×{side} images: the student is {_SMALL_STUDENT}"
        )
        made["student"] = _SMALL_STUDENT
    return make(type(config), {**{name: getattr(config, name) for name in config.model_fields_set}, **made})


def note_unread_by_student(config: TrainConfig, given: Container[str]) -> None:
    """Print a note for each option given that the student does not read; a UsageError for an unknown network."""
    from kdcli import models

    networks = (*config.assistant, *(() if config.student_file else (config.student,)))
    takes = {name: [models.accepts(each, name) for each in networks] for name in ("dropout", "width")}
    if config.student_file is not None:
        unread = ["dropout", "preprocess", "width", "student_weights", "student_size"]
        output.note_ignored(given, unread, f"with --student {config.student_file}, which defines it")
    else:
        unread = [name for name in takes if not any(takes[name])]
        output.note_ignored(given, unread, f"with --student {config.student}, which takes none")


def _typed_teachers(config: TrainConfig) -> dict[str, Any]:
    """Teachers as files: external networks become checkpoints, which record their settings."""
    settings = {
        "args": config.teacher_args,
        "assumed": config.teacher_inputs,
        "image_size": config.image_size,
    }
    weights, found = list(config.teacher_weights), list[Path]()
    external = [is_external(path) for path in config.teacher]
    for path, bare in zip(config.teacher, external, strict=True):
        named = weights and bare and str(path).count(":") == 1
        found.append(existing_model(Path(f"{path}:{weights.pop(0)}") if named else path, **settings))
    if weights or (config.teacher_args and not any(external)):
        raise UsageError(
            "--teacher-weights and --teacher-args are for an external network",
            "Name it: --teacher torchvision:NAME, timm:NAME, or a function as package.module:function.",
        )
    recorded = {*TeacherInputSettings.model_fields} - {"teacher_class_map"} if all(external) else ()
    return {"teacher": tuple(found), "teacher_weights": (), "teacher_args": (), **dict.fromkeys(recorded)}


def inputs_file(teacher: Path) -> Path:
    """The file beside an ONNX file in which kd validate --probe records its input."""
    return teacher.with_name(f"{teacher.name}.toml")


def _recorded_inputs(teachers: tuple[Path, ...], config: TrainConfig) -> dict[str, Any]:
    """Recorded settings of the only teacher's input, where none is given."""
    path = inputs_file(teachers[0])
    if len(teachers) > 1 or any(getattr(config, name) for name in INPUTS) or not path.is_file():
        return {}
    recorded = files.read_document(path)
    if recorded.get("sha256") != files.sha256_file(teachers[0]):
        data = config.data if "data" in config.model_fields_set else None
        again = {"teacher": teachers[0], "data": data, "probe": True}
        raise KdError(
            f"{path.as_posix()} was recorded for another content of {teachers[0].as_posix()}",
            f"Delete it, or measure again: {shell_command('validate', again)}",
        )
    output.note(f"the input of {teachers[0].as_posix()} is as recorded in {path.as_posix()}")
    return {name: recorded[name] for name in INPUTS if name in recorded}


def _training_of(teacher: Path, config: TrainConfig) -> tuple[dict[str, Any], int | None]:
    """Recorded settings of a teacher's data, and the side of its images; unknown for some files of other programs.

    For other data its split and its size; a pack, whose images are those of the run at any path, has all.
    """
    from kdcli import data
    from kdcli.data.datasets import DATASETS
    from kdcli.deploy.load import kind_of, load_model
    from kdcli.teacher.stored import made_with

    if kind_of(teacher) == "outputs":
        return made_with(teacher), None
    try:
        model = load_model(teacher, config.threads, config.teacher_inputs)
    except KdError:  # reported where the teacher is run
        return {}, None
    height, width, _ = model.input_size
    needed = not model.any_size or config.data not in DATASETS
    side, known = height if needed and height == width else None, data.recorded_source(model)
    if "data" in config.model_fields_set and not data.is_same_source(config.data, known.get("data", "")):
        known = {"test_fraction": known.get("test_fraction"), "image_size": side}
    elif config.image_size not in (None, known.get("image_size")):
        known.pop("resize", None)  # it is for the recorded size
    return known, side


def _is_too_large(network: str, side: int) -> bool:
    import torch

    from kdcli import models

    try:
        with torch.device("meta"):
            models.build(network, classes=2, input_size=(side, side, 3))
    except UsageError:
        return True
    return False
