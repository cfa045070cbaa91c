"""Finding the models a user may have meant."""

from __future__ import annotations

import shlex
from pathlib import Path

from kdcli.errors import KdError


def students() -> list[Path]:
    """Trained students below `runs/`, newest first."""
    found = Path("runs").glob("*/student.pt")
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
