"""A distillation loop as most repositories have it: the teacher in every step, PIL images, a `DataLoader`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from pair import BATCH, LAMDA, LEARNING_RATE, TAU
from rounds import Timing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

Loader = DataLoader[tuple[Tensor, Tensor]]


def loader_of(dataset: Any, workers: int, batch_size: int = BATCH) -> Loader:
    """The usual loader. Workers stay alive between rounds, so that no round pays for their start."""
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


class NaiveLoop:
    """Frozen teacher forward in every step, float32 NCHW, Adam as it comes, `loss.item()` in each step."""

    key = "c"
    label = "naive loop"
    note = "teacher in each step"
    keeps_memory = False

    def __init__(self, teacher: nn.Module, student: nn.Module, loader: Loader) -> None:
        self.teacher, self.student, self.loader = teacher, student, loader
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(student.parameters(), LEARNING_RATE)

    def loss_of(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """λ·CE + (1 − λ)·τ²·KL of a batch as the loader gives it."""
        with torch.no_grad():
            targets = self.teacher(pixels)
        logits = self.student(pixels)
        soft = F.kl_div(
            F.log_softmax(logits / TAU, dim=1), F.softmax(targets / TAU, dim=1), reduction="batchmean"
        )
        return LAMDA * F.cross_entropy(logits, labels) + (1 - LAMDA) * TAU**2 * soft

    def round(self) -> Timing:
        """One pass over the loader."""
        self.student.train()
        images, running = 0, 0.0
        started = time.perf_counter()
        for pixels, labels in self.loader:
            loss = self.loss_of(pixels, labels)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
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


class LabelLoop(NaiveLoop):
    """The same loop training a network from labels alone, by SGD."""

    key = "labels"
    label = "naive loop, the teacher's training"
    note = "labels"

    def __init__(self, network: nn.Module, loader: Loader) -> None:
        super().__init__(nn.Identity(), network, loader)
        weights = [value for value in network.parameters() if value.requires_grad]
        self.optimizer = torch.optim.SGD(weights, 1e-3, momentum=0.9, nesterov=True)

    def loss_of(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of a batch as the loader gives it."""
        return F.cross_entropy(self.student(pixels), labels)
