"""Position of a run: what is saved of it, how often, and how it is restored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent
from kdcli.engine.adapters import restore_adapters
from kdcli.engine.identity import check_unchanged, differences
from kdcli.engine.run_dir import RunDir
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint
from kdcli.models.checkpoint import Checkpoint


@dataclass
class State:
    """What changes while training; with the weights, the adapters and the optimizer, all that a resume needs.

    Learning rate, order, views, noise and dropout are pure functions of seed, step, epoch and sample: no generator
    has to be restored.

    Attributes:
        epoch: the pass under way, from 0.
        step: steps done in all.
        step_in_epoch: steps done of this pass.
        images: done in this epoch.
        sums: of the terms over the images of this epoch, a row for each process.
        logged: the same sums, all processes together, at the last line of metrics; `logged_images` and
            `logged_seconds` likewise.
        seconds: of training so far; `epoch_seconds`: when this epoch began.
        marks: what was different when the run was resumed, so that it is not the same run any more.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    images: int = 0
    sums: list[list[float]] = field(default_factory=list)
    logged: list[float] = field(default_factory=list)
    logged_images: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    logged_seconds: float = 0.0
    marks: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class SaveSchedule:
    """When the state is saved, from --save-every."""

    def __init__(self, config: TrainConfig) -> None:
        self.number, self.unit = config.saving
        self.last = time.monotonic()

    def after_step(self, step: int) -> bool:
        """In the middle of an epoch."""
        if not self.number:
            return False
        if self.unit == "min":
            return time.monotonic() - self.last >= 60 * self.number
        return self.unit == "steps" and step % self.number == 0

    def after_epoch(self, epoch: int, step: int) -> bool:
        """At the end of one."""
        return bool(self.number) and (
            epoch % self.number == 0 if self.unit == "epochs" else self.after_step(step)
        )

    def saved(self) -> None:
        """Restart the clock."""
        self.last = time.monotonic()


def load_newest(run: RunDir, on_event: OnEvent) -> tuple[Path, Checkpoint] | None:
    """The newest state that can be read; None if none was ever written.

    Raises:
        KdError: there are some, and all of them are damaged.
    """
    problems = []
    for path in run.saved():
        try:
            return path, checkpoint.load(path)
        except KdError as error:
            problems.append(error.message)
            on_event(Note(f"{error.message}; trying the one before it"))
    if problems:
        raise KdError(f"no saved state of {run.path} can be read", "Start the run anew under another --name.")
    return None


def restore(
    stored: Checkpoint,
    source: Path,
    network: torch.nn.Module,
    adapters: Mapping[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    inputs: Mapping[str, str],
    made_with: Mapping[str, Any],
    tell: Callable[[str], None],
) -> State:
    """Fill in weights, adapters and optimizer, and return the position.

    Args:
        inputs: see `identity.input_hashes`; they must be as they were.
        made_with: settings and circumstances, see `identity.made_with`; a difference is told and marked.

    Raises:
        KdError: anything that does not fit. Never a warning.
    """
    training = stored.training or {}
    run = source.parent
    try:
        check_unchanged(training["inputs"], inputs, run.as_posix())
        network.load_state_dict(stored.state_dict)
        restore_adapters(adapters, training["adapters"])
        optimizer.load_state_dict(training["optimizer"])
        state = State(**training["state"])
        changes = differences(training["made_with"], made_with)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise KdError(f"{source} does not fit its run: {error}", "Start the run anew.") from error
    for change in changes:
        tell(f"{change}: the result will not be bit-identical to an uninterrupted run's")
    state.marks += [change for change in changes if change not in state.marks]
    return state
