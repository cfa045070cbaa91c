"""What a run's settings name: its images, and what else it begins with, by content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kdcli import data, methods, models
from kdcli.base import files
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import OnEvent, ignore
from kdcli.base.text import reason
from kdcli.data import Splits
from kdcli.methods import TrainConfig


def load_data(config: TrainConfig, on_event: OnEvent = ignore) -> Splits:
    """Training and test images; where the student is a file, in the shape that it takes.

    Raises:
        KdError: there are none, or they cannot be read.
        UsageError: the student's file is not there.
    """
    stored = config.student_file
    if stored is not None and not stored.is_file():
        raise UsageError(f"no such student: {stored}", "--student takes a network's name or a .pt file.")
    return data.load(
        config.data,
        data_dir=config.data_dir,
        cache_dir=config.cache_dir,
        image_size=config.image_size,
        grey=config.grey,
        fit_to=None if stored is None else models.load(stored).input_size,
        skip_broken=config.skip_broken,
        unlabelled=config.unlabelled,
        on_event=on_event,
    )


def fingerprints(config: TrainConfig, splits: Splits) -> dict[str, str]:
    """SHA-256 of all that a run is made of beside its settings, by what it is called.

    Raises:
        KdError: a file cannot be read.
        UsageError: there is no such method.
    """
    found = {"train images": splits.train.fingerprint, "test images": splits.test.fingerprint}
    if splits.unlabelled is not None:
        found["images without labels"] = splits.unlabelled.fingerprint
    if methods.get(config.method).active(config).needs_teacher:
        for path in config.teacher:
            found[f"teacher {path}" if len(config.teacher) > 1 else "teacher"] = _sha256(path)
    if config.student_file is not None:
        found["student"] = _sha256(config.student_file)
    return found | {f"code of {name}": sha256 for name, sha256 in methods.sources(config.method).items()}


def check_unchanged(known: Mapping[str, str | None], now: Mapping[str, str], what: str) -> None:
    """Raise KdError if an input is not the one it was, or there are others.

    Args:
        what: has these inputs, for the message.
    """
    for name in {**known, **now}:
        if known.get(name) != now.get(name):
            raise KdError(
                f"the {name} of {what} changed since it was begun",
                "Restore what it began with, or choose another --name.",
            )


def _sha256(path: Path) -> str:
    try:
        return files.sha256_file(path)
    except OSError as error:
        raise KdError(f"cannot read {path}: {reason(error)}", "Name a file that is there.") from error
