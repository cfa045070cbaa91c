"""Files and runs given on the command line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kdcli.base import code, runs
from kdcli.base.errors import START, KdError, UsageError
from kdcli.base.names import similar
from kdcli.base.text import dims
from kdcli.cli import output

if TYPE_CHECKING:
    from kdcli.base.config import TestConfig, ValidateConfig
    from kdcli.base.events import OnEvent
    from kdcli.data import Splits
    from kdcli.deploy.onnx_model import OnnxClassifier
    from kdcli.models import Classifier

M = TypeVar("M", bound="Classifier | OnnxClassifier")


def is_external(path: Path) -> bool:
    """Whether this names an external network, such as `torchvision:NAME:FILE`."""
    return code.is_network(str(path)) and not path.exists()


def existing_model(path: Path, **settings: Any) -> Path:
    """The file at `path`, the `student.pt` of a run or the `pack.json` of a pack; `student.pt` alone: the newest.

    An external network is saved as a checkpoint in weights/, see `pretrained.load_pretrained` for its settings.

    The hint of the KdError lists the trained students, newest first.
    """
    if is_external(path):
        from kdcli.deploy import pretrained

        model = pretrained.load_pretrained(str(path), **settings)
        file = pretrained.keep(model, Path("weights"))
        form = (
            f"{len(model.classes):,} classes, {dims(model.network_size)}, {model.provenance['preprocessing']}"
        )
        output.note(f"{path} is {file.as_posix()}: {form}")
        return file
    found = runs.by_name(path)
    files = [found, found / "student.pt", found / "pack.json"]
    if path == Path(path.name):  # a folder here, as of images, may have the name of a run
        files.append(runs.RUNS / path / "student.pt")
    for file in filter(Path.is_file, files):
        return file
    run = found.parent if found.name == "student.pt" else found
    if (run / "config.toml").is_file():
        from kdcli.engine.run_dir import RunDir, resume_command

        finish = f"Finish it: {resume_command(run, RunDir(run).read_config())}"
        raise KdError(f"{run} is not finished", "See: kd runs" if runs.state(run) == "running" else finish)
    if found.is_dir():
        from kdcli.models.foreign import explain

        if (problem := explain(found)) is not None:
            raise problem
    students = [student for student in Path("runs").glob("*/student.pt") if student.is_file()]
    students.sort(key=lambda student: student.stat().st_mtime, reverse=True)
    if path == Path("student.pt") and students:
        output.note(f"no student.pt here: {students[0].as_posix()} of the newest run is used")
        return students[0]
    names = ", ".join(shlex.quote(student.as_posix()) for student in students[:8])
    known = f"Trained students: {names}." if names else START
    named = path.parent.name if path.name == "student.pt" else path.name
    near = similar(named, (student.parent.name for student in students))
    raise KdError(f"no such file: {path}", near or known)


def run_folder(path: Path) -> Path:
    """The run or comparison at `path` or of this name; a KdError if there is none."""
    found = runs.by_name(path)
    if not found.exists():
        names = (known.name for place in runs.PLACES for known in place.glob("*"))
        hint = similar(path.name, names) or "Pass a folder inside runs/, or list them: kd runs"
        raise KdError(f"no such run: {path}", hint)
    return found


def run_to_resume(name: str) -> Path:
    """The run of a path or name; without one, the newest interrupted run; a KdError if there is none."""
    if name:
        return run_folder(Path(name))
    interrupted = [run for run in runs.run_folders() if runs.state(run) == "interrupted"]
    if not interrupted:
        raise KdError("no interrupted run in runs/", "List the runs: kd runs")
    return interrupted[-1]


def data_for(
    model: M, config: TestConfig | ValidateConfig, on_event: OnEvent, splits: Splits | None = None
) -> tuple[M, Splits]:
    """The model with outputs in the data's order of classes, and the data: `splits`, or as set or recorded."""
    from kdcli import data
    from kdcli.deploy.load import fitted
    from kdcli.teacher import assumptions

    splits = splits or data.load(
        **data.source_for(model, config), image_size=config.image_size, on_event=on_event
    )
    model = fitted(model, splits.test, config.class_map)
    assumptions.note_order(str(model.path), model, splits.test, on_event)
    return model, splits


def check_image_size(path: str | Path, input_size: tuple[int, int, int], side: int | None) -> None:
    """Raise UsageError unless a model takes images of the given side."""
    if side is not None and input_size[:2] != (side, side):
        raise UsageError(f"{path} takes {dims(input_size)} images", "Leave out --image-size.")
