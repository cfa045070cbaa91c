"""Model files given on the command line, and their data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from kdcli.base.errors import KdError

if TYPE_CHECKING:
    from kdcli.base.config import TestConfig, ValidateConfig
    from kdcli.base.events import OnEvent
    from kdcli.data import Splits
    from kdcli.deploy.onnx_model import OnnxClassifier
    from kdcli.models import Classifier


def existing_model(path: Path) -> Path:
    """The model file at `path`, or `student.pt` in it if it is a run folder.

    Raises:
        KdError: no such file; the hint lists the trained students, newest first.
    """
    if path.is_file():
        return path
    if (path / "student.pt").is_file():
        return path / "student.pt"
    if path.is_dir():
        raise KdError(f"{path} is a folder, not a model", "Pass the .pt or .onnx file.")
    students = [student for student in Path("runs").glob("*/student.pt") if student.is_file()]
    students.sort(key=lambda student: student.stat().st_mtime, reverse=True)
    names = ", ".join(shlex.quote(student.as_posix()) for student in students[:8])
    raise KdError(
        f"no such file: {path}",
        f"Trained students: {names}." if names else "Train a student first: kd train.",
    )


def data_for(
    model: Classifier | OnnxClassifier,
    path: Path,
    spec: str,
    config: TestConfig | ValidateConfig,
    on_event: OnEvent,
    image_size: int | None = None,
) -> Splits:
    """The data set `spec` with images of the model's size and channels.

    Raises:
        KdError: classes or image sizes do not match, or the data cannot be read.
    """
    from kdcli import data

    splits = data.load(
        spec,
        data_dir=config.data_dir,
        cache_dir=config.cache_dir,
        image_size=image_size,
        fit_to=model.input_size,
        skip_broken=config.skip_broken,
        on_event=on_event,
    )
    reason = data.incompatibility(model.classes, model.input_size, splits.test)
    if reason:
        raise KdError(f"{path} {reason}", "Pass the data of this model with --data.")
    return splits
