"""Checkpoints and ONNX files as models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kdcli import models
from kdcli.base.config import NO_ASSUMPTIONS, InputSettings
from kdcli.base.errors import UsageError
from kdcli.base.files import sha256_file
from kdcli.models import Classifier

if TYPE_CHECKING:  # importing onnxruntime takes a third of a second
    from kdcli.deploy.onnx_model import OnnxClassifier

M = TypeVar("M", bound=Any)
_NAME_FILES = ("labels.txt", "config.json")  # beside a model


def name_files(path: Path, assumed: InputSettings) -> list[Path]:
    """The files that class names of another program's ONNX file may be read from."""
    beside = [path.parent / name for name in _NAME_FILES]
    return [assumed.class_names] if assumed.class_names else [file for file in beside if file.is_file()]


def names_sha256(path: Path, assumed: InputSettings) -> list[str]:
    """SHA-256 of these files."""
    return [sha256_file(file) for file in name_files(path, assumed) if file.is_file()]


def in_order_of(model: M, classes: tuple[str, ...]) -> M:
    """A model whose outputs are in this order of classes; as it is if it has other classes or is a checkpoint."""
    if isinstance(model, Classifier) or model.classes == classes or sorted(model.classes) != sorted(classes):
        return model
    return replace(model, classes=classes, order=tuple(map(model.classes.index, classes)))


def load_model(
    path: Path,
    threads: int = 0,
    assumed: InputSettings = NO_ASSUMPTIONS,
    input_size: tuple[int, int, int] | None = None,
) -> Classifier | OnnxClassifier:
    """A checkpoint (.pt) or an ONNX file as a model that gives logits for images; a KdError if it is neither.

    Args:
        assumed: what an ONNX file of another program leaves open; a UsageError for other files.
        input_size: (H, W, C) of the data, for sides that the file and `assumed` leave open.
    """
    if path.suffix.lower() == ".onnx":
        from kdcli.deploy.onnx_model import OnnxClassifier

        model: Classifier | OnnxClassifier = OnnxClassifier.load(path, threads, assumed, input_size)
        foreign = model.is_foreign
    else:
        model, foreign = models.load(path), False
    if assumed.given and not foreign:
        raise UsageError(
            f"{path} records its own input and classes",
            f"Leave out {', '.join(map(assumed.flag, assumed.given))}.",
        )
    return model
