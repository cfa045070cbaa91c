"""A teacher that is run in each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcli.models.reproducible import DropoutKeys
from kdcli.teacher.runner import Run


@dataclass(frozen=True)
class Live:
    """A teacher that is run in each step, on the pictures the student sees.

    Attributes:
        run: uint8 (B, H, W, C) → logits float32 (B, classes).
        draw: what its dropout draws by; None where that is off.
        tap: the same with features, for methods that read them: logits, maps of each stage, embedding.
    """

    run: Run
    draw: DropoutKeys | None = None
    tap: Callable[[Tensor], tuple[Tensor, list[Tensor], Tensor]] | None = None

    def __call__(self, images: Tensor, epoch: int, samples: npt.NDArray[np.int64]) -> Tensor:
        """Logits (B, classes) for a batch, without gradient."""
        self._draw(images, epoch, samples)
        with torch.inference_mode():
            logits = self.run(images).float()
        return logits.clone()  # an inference tensor cannot be saved for backward

    def features(
        self, images: Tensor, epoch: int, samples: npt.NDArray[np.int64]
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Logits (B, classes), maps (B, C, H, W) of each stage and embedding (B, D), without gradient."""
        if self.tap is None:
            raise RuntimeError("this teacher was not asked for features")
        self._draw(images, epoch, samples)
        with torch.no_grad():
            logits, maps, embedding = self.tap(images)
        return logits.float(), tuple(stage.float() for stage in maps), embedding.float()

    def _draw(self, images: Tensor, epoch: int, samples: npt.NDArray[np.int64]) -> None:
        if self.draw is not None:
            self.draw.step(epoch, samples, images.device)
