"""Position of a run: where it is, when it is saved, and the losses that it sums and records."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent
from kdcli.base.runtime import World
from kdcli.engine.identity import check_unchanged
from kdcli.engine.records import Metrics, append_metrics
from kdcli.engine.run_dir import RunDir
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint
from kdcli.models.checkpoint import Checkpoint


@dataclass
class State:
    """Position and sums of a run; a resume needs these, the weights and their average,
    the adapters and the optimizer's state.

    Learning rate, order, views, noise and dropout are pure functions of seed, step, epoch and sample: no random
    generator has to be restored. `logged…` are the values at the last line of metrics, all processes together.
    """

    epoch: int = 0  # the pass under way, from 0
    step: int = 0  # steps done in all
    step_in_epoch: int = 0  # steps done of this pass
    images: int = 0  # done in this epoch
    sums: list[list[float]] = field(default_factory=list)
    logged: list[float] = field(default_factory=list)
    logged_images: int = 0
    seconds: float = 0.0  # of training so far; `epoch_seconds`: when this epoch began
    epoch_seconds: float = 0.0
    logged_seconds: float = 0.0
    marks: list[str] = field(default_factory=list)


def load_newest(run: RunDir, inputs: Mapping[str, str], on_event: OnEvent) -> tuple[Path, Checkpoint] | None:
    """The newest readable state, if the run's inputs are still those it began with; None if none was ever saved."""
    saved = run.saved()
    for path in saved:
        try:
            stored = checkpoint.load(path)
        except KdError as error:
            on_event(Note(f"{error.message}; trying the one before it"))
            continue
        known = (stored.training or {}).get("inputs")
        check_unchanged(known if isinstance(known, dict) else {}, inputs, run.path.as_posix())
        return path, stored
    if saved:
        raise KdError(f"no saved state of {run.path} can be read", "Start the run anew under another --name.")
    return None


class SaveSchedule:
    """When the state is saved, from --save-every."""

    def __init__(self, config: TrainConfig) -> None:
        self.number, self.unit = config.saving
        self.last = time.monotonic()

    def due(self, state: State, *, epoch_ended: bool) -> bool:
        """Whether to save at this position."""
        if self.number == 0:
            return False
        if self.unit == "min":
            return time.monotonic() - self.last >= 60 * self.number
        if self.unit == "steps":
            return state.step % self.number == 0
        return epoch_ended and state.epoch % self.number == 0

    def saved(self) -> None:
        """Restart the clock."""
        self.last = time.monotonic()


class Recorder:
    """Sums of the terms over an epoch, on the training device, which is waited for only to write or report them."""

    def __init__(
        self, config: TrainConfig, run: RunDir, terms: Iterable[str], state: State, world: World
    ) -> None:
        """Continue from the sums in the state; `terms` are in the order in which a step gives them."""
        self.run = run
        self.terms = tuple(terms)
        self.state = state
        self.world = world
        rows = state.sums or [[0.0] * (1 + len(self.terms))]
        mine = rows[world.rank] if len(rows) == world.size else list(np.mean(rows, axis=0))
        wide = torch.float32 if world.device.type == "mps" else torch.float64
        self.sums = torch.tensor(mine, dtype=wide, device=world.device)  # (1 + terms,)
        self.tensorboard: Any = None
        if config.tensorboard and world.first:
            from torch.utils.tensorboard import SummaryWriter

            # lines beyond the step that a resumed run continues from are dropped
            self.tensorboard = SummaryWriter(str(run.path / "tensorboard"), purge_step=state.step + 1)

    def total(self) -> list[float]:
        """Sums of the loss and the terms over this epoch, all processes together. Waits for device and others."""
        return [float(value) for value in self.world.mean(self.sums).tolist()]

    def loss_here(self) -> float:
        """Mean loss of this epoch so far, as this process sees it."""
        return self._means(self.sums.tolist(), self.state.images)[0]

    def steps(self, rate: float) -> None:
        """Write a line for the steps since the previous line; a KdError if the loss is not finite."""
        state, sums = self.state, self.total()
        before = state.logged or [0.0] * len(sums)
        fresh = [value - old for value, old in zip(sums, before, strict=True)]
        self._write("step", fresh, state.images - state.logged_images, state.logged_seconds, rate, None)
        state.logged, state.logged_images, state.logged_seconds = sums, state.images, state.seconds

    def epoch(self, rate: float, val_accuracy: float | None) -> float:
        """Write the epoch's line, go to the next epoch and return the mean loss; a KdError if it is not finite."""
        state = self.state
        loss = self._write("epoch", self.total(), state.images, state.epoch_seconds, rate, val_accuracy)
        state.epoch += 1
        state.step_in_epoch, state.images, state.epoch_seconds = 0, 0, state.seconds
        state.logged, state.logged_images, state.logged_seconds = [], 0, state.seconds
        self.sums = torch.zeros_like(self.sums)
        return loss

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _means(self, sums: list[float], images: int) -> tuple[float, dict[str, float]]:
        loss, *means = (value / images for value in sums)
        return loss, dict(zip(self.terms, means, strict=True))

    def _write(
        self,
        kind: Literal["step", "epoch"],
        sums: list[float],
        images: int,
        since: float,
        rate: float,
        val_accuracy: float | None,
    ) -> float:
        state = self.state
        loss, terms = self._means(sums, images)
        if not np.isfinite(loss):
            raise KdError(
                f"the loss is no longer finite (epoch {state.epoch + 1})",
                "Lower --lr, or the weights of the terms: --weight.",
            )
        if not self.world.first:
            return loss
        line = Metrics(
            kind=kind,
            epoch=state.epoch + 1,
            step=state.step,
            loss=loss,
            terms=terms,
            val_accuracy=val_accuracy,
            lr=rate,
            images_per_s=images / max(state.seconds - since, 1e-9),
            seconds=state.seconds,
        )
        append_metrics(self.run.metrics_file, line)
        if self.tensorboard is not None:
            values = {"loss": loss, "lr": rate, "images_per_s": line.images_per_s, **terms}
            if val_accuracy is not None:
                values["val_accuracy"] = val_accuracy
            for name, value in values.items():
                self.tensorboard.add_scalar(f"{kind}/{name}", value, line.step)
            self.tensorboard.flush()
        return loss
