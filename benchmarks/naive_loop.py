"""A distillation loop as most repositories have it: the teacher in every step, PIL images, a `DataLoader`."""

from __future__ import annotations

import time

import numpy as np
import torch
from pair import BATCH, LAMDA, LEARNING_RATE, TAU, Int64, Pair, Timing, tell
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader


def loader_of(pair: Pair, rows: Int64, workers: int, *, flip: bool) -> DataLoader[tuple[Tensor, Tensor]]:
    """The usual loader. Workers stay alive between rounds, so that no round pays for their start."""
    return DataLoader(
        pair.dataset(rows, flip=flip),  # type: ignore[arg-type]  # the collation makes tensors of labels
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


class NaiveLoop:
    """Frozen teacher forward in every step, float32 NCHW, Adam as it comes, `loss.item()` in each step."""

    key = "c"
    label = "naive loop"
    note = "teacher in the loop"

    def __init__(self, pair: Pair, rows: Int64, workers: int) -> None:
        self.pair = pair
        self.teacher = pair.teacher
        self.student = pair.student()
        self.optimizer = torch.optim.Adam(self.student.parameters(), LEARNING_RATE)
        self.loader = loader_of(pair, rows, workers, flip=True)

    def loss_of(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """λ·CE + (1 − λ)·τ²·KL of a batch as the loader gives it."""
        with torch.no_grad():
            targets = self.teacher(pixels)
        logits = self.student(pixels)
        soft = F.kl_div(
            F.log_softmax(logits / TAU, dim=1), F.softmax(targets / TAU, dim=1), reduction="batchmean"
        )
        return LAMDA * F.cross_entropy(logits, labels) + (1 - LAMDA) * TAU**2 * soft

    def epoch(self, schedule: torch.optim.lr_scheduler.LRScheduler | None = None) -> Timing:
        """One pass over the loader."""
        self.student.train()
        images, running = 0, 0.0
        started = time.perf_counter()
        for pixels, labels in self.loader:
            loss = self.loss_of(pixels, labels)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            if schedule is not None:
                schedule.step()
            running += loss.item()
            images += len(labels)
        seconds = time.perf_counter() - started
        if not np.isfinite(running):
            raise RuntimeError("the naive loop's loss is not finite")
        return Timing(images, seconds)

    def warm_up(self) -> None:
        pixels, labels = next(iter(self.loader))
        self.loss_of(pixels, labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad()

    def round(self) -> Timing:
        return self.epoch()

    def accuracy(self, rows: Int64) -> float:
        """Per cent of the named train images that the student gets right."""
        self.student.eval()
        right = 0
        with torch.inference_mode():
            for pixels, labels in DataLoader(self.pair.dataset(rows, flip=False), BATCH):
                right += int((self.student(pixels).argmax(dim=1) == labels).sum())
        return 100 * right / len(rows)

    def train_to(self, percent: float, epochs: int) -> list[tuple[float, float]]:
        """Train by kd's recipe until the validation images are right often enough.

        Returns:
            For each epoch the seconds of training so far, evaluation not counted, and the accuracy.
        """
        rate = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            LEARNING_RATE,
            total_steps=epochs * len(self.loader),
            final_div_factor=400,  # of the first rate, the peak / 25: it ends at the peak · 1e-4, as kd does
            cycle_momentum=False,  # on by default, and it would move Adam's β₁
        )
        curve: list[tuple[float, float]] = []
        seconds = 0.0
        for number in range(1, epochs + 1):
            seconds += self.epoch(rate).seconds
            curve.append((seconds, self.accuracy(self.pair.rows[1])))
            tell(f"naive loop, epoch {number}/{epochs}: {curve[-1][1]:.2f} % after {seconds:.1f} s")
            if curve[-1][1] >= percent:
                break
        return curve
