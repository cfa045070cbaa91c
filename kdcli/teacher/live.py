"""A teacher that runs on each batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcli.models import Classifier
from kdcli.models.feature_extractor import FeatureExtractor
from kdcli.models.reproducible import DropoutKeys, use_sample_dropout
from kdcli.teacher.cache import weighted_mean
from kdcli.teacher.runner import Engine, Forward, forward_of

FeatureForward = Callable[[Tensor], tuple[Tensor, list[Tensor], Tensor]]


@dataclass(frozen=True)
class LiveModel:
    """One model of a live teacher.

    Attributes:
        forward: uint8 (B, H, W, C) → logits float32 (B, classes).
        keys: of its dropout; None where that is off.
        features: the same with features: logits, maps of each stage, embedding; None where no stages were named.
    """

    forward: Forward
    keys: DropoutKeys | None = None
    features: FeatureForward | None = None

    @classmethod
    def of(
        cls, model: Any, precision: str, stages: Sequence[str], dropout_stream: tuple[int, int] | None
    ) -> LiveModel:
        """From a frozen classifier, or an ONNX model, which runs on the CPU in float32 and has no features.

        Args:
            precision: `bf16`, else float32.
            dropout_stream: seed and stream of its dropout, where that is on.
        """
        if not isinstance(model, Classifier):
            return cls(lambda images: model(images.cpu()))
        keys = None
        if dropout_stream is not None:
            keys = DropoutKeys(*dropout_stream)
            use_sample_dropout(model, keys)
        bf16 = precision == "bf16"
        forward = forward_of(model, Engine("torch", "bf16" if bf16 else "32"))
        if not stages:
            return cls(forward, keys)
        extractor = FeatureExtractor(model.network, stages)

        def features(images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
            prepared = model.prepare(images)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                found: tuple[Tensor, list[Tensor], Tensor] = extractor(prepared)
            return found

        return cls(forward, keys, features)

    def set_batch(self, images: Tensor, epoch: int, samples: npt.NDArray[np.int64]) -> None:
        """Key the dropout masks by epoch and sample."""
        if self.keys is not None:
            self.keys.step(epoch, samples, images.device)


@dataclass(frozen=True)
class LiveTeacher:
    """Models that run on each batch as the student sees it; without gradient."""

    models: tuple[LiveModel, ...]
    weights: tuple[float, ...]

    def __call__(self, images: Tensor, epoch: int, samples: npt.NDArray[np.int64]) -> Tensor:
        """Images uint8 (B, H, W, C) → the weighted mean of the models' logits (B, classes)."""
        parts = []
        for model in self.models:
            model.set_batch(images, epoch, samples)
            with torch.inference_mode():
                logits = model.forward(images).float()
            parts.append(logits.clone())  # an inference tensor cannot be saved for backward
        return weighted_mean(parts, self.weights)

    def features(
        self, images: Tensor, epoch: int, samples: npt.NDArray[np.int64]
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Logits (B, classes), maps (B, C, H, W) of each stage and embedding (B, D), of a teacher of one model."""
        [model] = self.models
        if model.features is None:
            raise RuntimeError("this teacher was made without stages")
        model.set_batch(images, epoch, samples)
        with torch.no_grad():
            logits, maps, embedding = model.features(images)
        return logits.float(), tuple(stage.float() for stage in maps), embedding.float()
