"""Checkpoints and ONNX files as models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from kdcli import models
from kdcli.base import code
from kdcli.base.config import NO_ASSUMPTIONS, InputSettings, TeacherInputs, make
from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import recorded_path, sha256_file
from kdcli.data.images import ImageSet, incompatibility, knows_names
from kdcli.models import Classifier, checkpoint, class_map

if TYPE_CHECKING:  # importing onnxruntime takes a third of a second
    from kdcli.deploy.onnx_model import OnnxClassifier

M = TypeVar("M", bound=Any)
# Kinds of files by suffix; all others are checkpoints. Stored outputs of a teacher: see `teacher.stored`.
_KINDS = {".onnx": "onnx", ".csv": "outputs", ".json": "outputs"}
_NAME_FILES = ("labels.txt", "config.json")  # in the model's folder


def kind_of(path: Path) -> str:
    """`checkpoint`, `onnx`, or `outputs` of a teacher for certain images."""
    return _KINDS.get(path.suffix.lower(), "checkpoint")


def name_files(path: Path, assumed: InputSettings) -> list[Path]:
    """The files that class names of another program's ONNX file may be read from."""
    if assumed.class_names:
        return [assumed.class_names]
    return [file for name in _NAME_FILES if (file := path.parent / name).is_file()]


def dependency_hashes(path: Path, assumed: InputSettings) -> list[str]:
    """SHA-256 of the further files that a model's outputs depend on: class names, class map, user's code."""
    files = name_files(path, assumed) if kind_of(path) == "onnx" else []
    files += [assumed.class_map] if assumed.class_map else []
    hashes = [sha256_file(file) for file in files if file.is_file()]
    return [*hashes, *source_digests(path).values()]


def source_digests(path: Path) -> dict[str, str]:
    """SHA-256 of the user's function that makes a checkpoint's network, if functions may run; else empty."""
    if kind_of(path) != "checkpoint" or not code.allowed():
        return {}
    arch = checkpoint.load(path).arch
    return models.source_digests(arch) if code.is_name(arch) else {}


def with_classes(model: M, classes: tuple[str, ...], file: Path | None = None) -> M:
    """The model with outputs mapped to these classes, by a class map or by name; unchanged where no names match."""
    if model.class_map is not None or (not file and (model.classes == classes or not knows_names(model))):
        return model
    if (found := class_map.find(model.classes, classes, file)) is None:
        return model
    mapped = copy.copy(model)  # of the same network
    vars(mapped).update(classes=classes, class_map=found)
    return mapped


def fitted(model: M, images: ImageSet, file: Path | None = None) -> M:
    """A model of the images' classes, see `with_classes`; a KdError if it does not take these images."""
    made = with_classes(model, images.classes, file)
    if problem := incompatibility(made, images):
        raise KdError(f"{model.path} {problem}", "Pass the data of this model with --data.")
    return made


def load_model(
    path: Path,
    threads: int = 0,
    assumed: InputSettings = NO_ASSUMPTIONS,
    input_size: tuple[int, int, int] | None = None,
    *,
    several: bool = False,
) -> Classifier | OnnxClassifier:
    """A checkpoint (.pt) or an ONNX file as a model that gives logits for images; a KdError if it is neither.

    Args:
        assumed: what an ONNX file of another program leaves open; a UsageError for other files.
        input_size: (H, W, C) of the data, for sides that the file and `assumed` leave open.
        several: it is one of several models: `assumed` may concern others. Weights in further files are accepted.
    """
    kind = kind_of(path)
    if kind == "outputs":
        raise KdError(
            f"{path} holds outputs for certain images, and no model",
            "Train with it by --teacher, with a method of logits and no --teacher-dropout or --teacher-cache off.",
        )
    if kind == "onnx":
        from kdcli.deploy.onnx_model import OnnxClassifier

        model: Classifier | OnnxClassifier = OnnxClassifier.load(
            path, threads, assumed, input_size, external=several
        )
    else:
        model = models.load(path)
    if assumed.described and not model.is_foreign and not several:
        raise UsageError(
            f"{path} records its own input and classes", f"Leave out {', '.join(assumed.described)}."
        )
    return model


class RecordedTeacher(NamedTuple):
    """A teacher in a student's provenance."""

    path: Path
    sha256: str
    inputs: InputSettings


def teachers_of(provenance: Mapping[str, Any], student: Path = Path()) -> list[RecordedTeacher]:
    """Each teacher in an untrusted provenance, paths found from the student's file; empty if malformed."""
    recorded = provenance.get("teacher")
    if not isinstance(recorded, Mapping):
        return []
    several = recorded.get("teachers")
    entries = several if isinstance(several, list) else [recorded]
    return [
        RecordedTeacher(
            recorded_path(Path(entry["path"]), student),
            str(entry.get("sha256")),
            _recorded_inputs(entry.get("inputs"), student),
        )
        for entry in entries
        if isinstance(entry, Mapping) and isinstance(entry.get("path"), str) and "\0" not in entry["path"]
    ]


def _recorded_inputs(values: Any, student: Path) -> InputSettings:
    try:
        found = make(TeacherInputs, values if isinstance(values, Mapping) else {})
    except UsageError:
        return NO_ASSUMPTIONS
    files = {name: getattr(found, name) for name in ("class_names", "class_map")}
    return found.model_copy(
        update={name: recorded_path(path, student) for name, path in files.items() if path}
    )
