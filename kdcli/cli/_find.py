"""Finding the models a user may have meant."""

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


def students() -> list[Path]:
    """Trained students below `runs/`, newest first."""
    found = (path for path in Path("runs").glob("*/student.pt") if path.is_file())  # not a link to nowhere
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def existing_model(path: Path) -> Path:
    """The path itself.

    Raises:
        KdError: there is no such file; the hint lists the students that there are.
    """
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "student.pt").is_file():  # a run's folder stands for its student
            return path / "student.pt"
        raise KdError(f"{path} is a folder, not a model", "Name the .pt or .onnx file itself.")
    names = [shlex.quote(student.as_posix()) for student in students()]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise KdError(
        f"no such file: {path}",
        f"There are: {shown}." if names else "There are no students yet: kd train makes one.",
    )


def data_for(
    model: Classifier | OnnxClassifier,
    path: Path,
    spec: str,
    config: TestConfig | ValidateConfig,
    on_event: OnEvent,
    image_size: int | None = None,
) -> Splits:
    """Images as a model takes them: of its size and number of channels, with its classes.

    Raises:
        KdError: model and data do not belong together, or the data cannot be read.
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
        raise KdError(f"{path} {reason}", "Model and data must belong together; see --data.")
    return splits
