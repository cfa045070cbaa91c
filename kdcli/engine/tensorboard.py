"""Metrics for TensorBoard, where it is asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from kdcli.base.errors import UsageError
from kdcli.engine.records import Metrics
from kdcli.methods import TrainConfig


class Board:
    """Takes lines of metrics; this one drops them."""

    def write(self, line: Metrics) -> None:
        """One line."""

    def close(self) -> None:
        """No more lines."""


class _Events(Board):
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(self, line: Metrics) -> None:
        values = {"loss": line.loss, "lr": line.lr, "images_per_s": line.images_per_s, **line.terms}
        if line.val_accuracy is not None:
            values["val_accuracy"] = line.val_accuracy
        for name, value in values.items():
            self.writer.add_scalar(f"{line.kind}/{name}", value, line.step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def require(config: TrainConfig) -> None:
    """Raise UsageError if TensorBoard is asked for and not installed."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard: it is not installed", "pip install 'kdcli[tensorboard]'")


def board(config: TrainConfig, run: Path, step: int, *, write: bool) -> Board:
    """A board for a run's metrics below `<run>/tensorboard`.

    Args:
        step: where the run continues: what lies beyond it from before is not shown any more.
        write: whether this process is the one that writes.
    """
    if not config.tensorboard or not write:
        return Board()
    from torch.utils.tensorboard import SummaryWriter

    return _Events(SummaryWriter(str(run / "tensorboard"), purge_step=step or None))
