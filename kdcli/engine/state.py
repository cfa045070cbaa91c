"""Position of a run: what is saved of it, how often, and how it is restored."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent
from kdcli.engine.identity import check_unchanged, differences
from kdcli.engine.plan import RunPlan
from kdcli.engine.records import cut_metrics
from kdcli.engine.run_dir import RunDir
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint
from kdcli.models.checkpoint import Checkpoint


@dataclass
class State:
    """Position and sums of a run; a resume needs these, the weights, the adapters and the optimizer's state.

    Learning rate, order, views, noise and dropout are pure functions of seed, step, epoch and sample: no random
    generator has to be restored.

    Attributes:
        epoch: the pass under way, from 0.
        step: steps done in all.
        step_in_epoch: steps done of this pass.
        images: done in this epoch.
        sums: of the terms over the images of this epoch, a row for each process.
        logged: the same sums, all processes together, at the last line of metrics; `logged_images` and
            `logged_seconds` likewise.
        seconds: of training so far; `epoch_seconds`: when this epoch began.
        marks: differences of settings or circumstances at a resume, which end bit-identity.
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


def restore(
    plan: RunPlan,
    run: RunDir,
    network: nn.Module,
    adapters: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    on_event: OnEvent,
) -> tuple[State, int | None]:
    """Load the newest saved state into network, adapters and optimizer, and cut the metrics after it.

    Returns:
        The position, at the start if no state was ever saved, and the step of `last.pt` if that is readable.

    Raises:
        KdError: every saved state is damaged, or the newest readable one does not fit the run.
    """
    state, saved_step = State(), None
    newest = _load_newest(run, on_event)
    if newest is not None:
        path, stored = newest
        training = stored.training or {}
        try:
            check_unchanged(training["inputs"], plan.inputs, run.path.as_posix())
            network.load_state_dict(stored.state_dict)
            if set(adapters) != set(training["adapters"]):
                raise KeyError("adapters")
            for name, module in adapters.items():
                module.load_state_dict(training["adapters"][name])
            optimizer.load_state_dict(training["optimizer"])
            state = State(**training["state"])
            changes = differences(training["made_with"], plan.made_with)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise KdError(f"{path} does not fit its run: {error}", "Start the run anew.") from error
        for change in changes:
            on_event(Note(f"{change}: the result will not be bit-identical to an uninterrupted run's"))
        state.marks += [change for change in changes if change not in state.marks]
        saved_step = state.step if path == run.last else None
    if plan.world.first:
        cut_metrics(run.metrics_file, state.step, state.epoch)
    plan.world.barrier()
    if newest is not None:
        on_event(Note(f"continuing {run.path.as_posix()} after step {state.step} of {plan.steps}"))
    return state, saved_step


def _load_newest(run: RunDir, on_event: OnEvent) -> tuple[Path, Checkpoint] | None:
    """The newest readable state; None if none was ever saved.

    Raises:
        KdError: all of them are damaged.
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
