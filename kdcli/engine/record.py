"""The losses of a run: summed where they arise, written to metrics.jsonl and TensorBoard."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kdcli.config import TrainConfig
from kdcli.engine.result import Metrics
from kdcli.engine.run_dir import RunDir
from kdcli.engine.state import State
from kdcli.engine.tensorboard import Board, board
from kdcli.errors import KdError
from kdcli.runtime import World


class Record:
    """Sums of the terms over an epoch, on the device that computes them; nothing waits for it but what is written."""

    def __init__(
        self, config: TrainConfig, run: RunDir, weights: dict[str, float], state: State, world: World
    ) -> None:
        self.run = run
        self.weights = weights
        self.state = state
        self.world = world
        rows = state.sums or [[0.0] * len(weights)]
        mine = rows[world.rank] if len(rows) == world.size else list(np.mean(rows, axis=0))
        wide = torch.float32 if world.device.type == "mps" else torch.float64
        self.sums = torch.tensor(mine, dtype=wide, device=world.device)  # (terms,)
        self.board: Board = board(config, run.path, state.step, write=world.first)

    def add(self, terms: Tensor) -> None:
        """One step's terms times its images, (terms,)."""
        self.sums += terms

    def store(self) -> None:
        """Put the sums of all processes into the state."""
        self.state.sums = self.world.rows(self.sums)

    def total(self) -> list[float]:
        """Each term's sum over this epoch, all processes together. Waits for the device, and for the others."""
        return [float(value) for value in self.world.mean(self.sums).tolist()]

    def loss_here(self) -> float:
        """Mean loss of this epoch so far, as this process sees it."""
        return self._means(self.sums.tolist(), self.state.images)[0]

    def steps(self, rate: float) -> None:
        """Write a line on the steps since the line before.

        Raises:
            KdError: the loss is no longer finite.
        """
        state, sums = self.state, self.total()
        before = state.logged or [0.0] * len(sums)
        fresh = [value - old for value, old in zip(sums, before, strict=True)]
        self._write("step", fresh, state.images - state.logged_images, state.logged_seconds, rate, None)
        state.logged, state.logged_images, state.logged_seconds = sums, state.images, state.seconds

    def epoch(self, rate: float, val_accuracy: float | None) -> float:
        """Write the epoch's line, and begin the next one; gives the epoch's mean loss.

        Raises:
            KdError: the loss is no longer finite.
        """
        state = self.state
        loss = self._write("epoch", self.total(), state.images, state.epoch_seconds, rate, val_accuracy)
        state.epoch, state.step_in_epoch, state.images, state.epoch_seconds = (
            state.epoch + 1,
            0,
            0,
            state.seconds,
        )
        state.logged, state.logged_images, state.logged_seconds = [], 0, state.seconds
        self.sums = torch.zeros_like(self.sums)
        return loss

    def close(self) -> None:
        """No more lines."""
        self.board.close()

    def _means(self, sums: list[float], images: int) -> tuple[float, dict[str, float]]:
        means = {name: value / images for name, value in zip(self.weights, sums, strict=True)}
        return sum(weight * means[name] for name, weight in self.weights.items()), means

    def _write(
        self, kind: str, sums: list[float], images: int, since: float, rate: float, val_accuracy: float | None
    ) -> float:
        state = self.state
        loss, terms = self._means(sums, images)
        if not np.isfinite(loss):
            raise KdError(
                f"the loss is no longer finite (epoch {state.epoch + 1})",
                "Lower --lr; for logits and noisy also --kd-weight.",
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
        self.run.append_metrics(line.to_json())
        self.board.write(line)
        return loss
