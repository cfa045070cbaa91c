"""Teacher, student, images and recipe of a comparison on small images, the same for all sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from kdcli import models
from kdcli.data import ImageSet, Splits, preprocess
from kdcli.data.images import fingerprint_of
from kdcli.data.split import split_validation
from kdcli.methods.losses import logits as losses
from kdcli.models import Classifier

Int64 = npt.NDArray[np.int64]
TAU, LAMDA, BATCH, LEARNING_RATE, SEED = 3.0, 0.3, 256, 1e-3, 0


@dataclass(frozen=True)
class Pair:
    """A teacher and a student on one data set.

    Attributes:
        splits: training images cut down to what is measured, and a few test images.
        teacher_path: the checkpoint.
        network: name of the student's network.
        val_fraction: share of the training images that is not trained on.
    """

    splits: Splits
    teacher_path: Path
    network: str = "lenet"
    val_fraction: float = 0.05

    @cached_property
    def rows(self) -> tuple[Int64, Int64]:
        """Numbers of the images trained on and validated on: those that kd itself chooses."""
        return split_validation(self.splits.train.labels, self.val_fraction)

    @cached_property
    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Per channel (C,), of pixels in 0–1: those that kd's student has too."""
        fitted = preprocess.fit("mean-std", self.splits.train.images, self.rows[0])
        assert isinstance(fitted, preprocess.MeanStd)
        return fitted.mean / 255, fitted.std / 255

    @cached_property
    def teacher(self) -> nn.Module:
        """The teacher for a loader's tensors, float32 NCHW, frozen: see `TeacherOnLoader`."""
        return TeacherOnLoader(models.load(self.teacher_path), *self.mean_std)

    def student(self) -> nn.Module:
        """A new student, float32 NCHW; the same weights at every call, those that kd starts from."""
        return new_network(self.network, self.splits.train)

    def transform(self, *, flip: bool) -> Callable[[Image.Image], Tensor]:
        """The usual torchvision pipeline."""
        mean, std = (part.tolist() for part in self.mean_std)
        steps: list[Any] = [transforms.RandomHorizontalFlip()] if flip else []
        composed: Callable[[Image.Image], Tensor] = transforms.Compose(
            [*steps, transforms.ToTensor(), transforms.Normalize(mean, std)]
        )
        return composed

    def dataset(self, rows: Int64, *, flip: bool) -> PilImages:
        """The training images of these rows, as a `Dataset` of the usual kind."""
        train = self.splits.train
        return PilImages(train.images[rows], train.labels[rows], self.transform(flip=flip))

    def examples(self, count: int = 64) -> tuple[npt.NDArray[np.uint8], Int64]:
        """A few training images as they are, uint8 (B, H, W, C), and their labels."""
        rows = spread(len(self.splits.train), count)
        return np.array(self.splits.train.images[rows]), self.splits.train.labels[rows]

    def reference_loss(self) -> float:
        """kd's own loss of the untrained student on `examples`, by kd's own path from pixels to logits."""
        images, labels = self.examples()
        teacher = models.load(self.teacher_path)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        mean, std = (part[:, None, None] for part in self.mean_std)
        with torch.inference_mode():
            targets = teacher(torch.from_numpy(images)).float()
            logits = self.student()((pixels - mean) / std)
        return float(kd_loss(logits, targets, torch.from_numpy(labels)))


def new_network(name: str, train: ImageSet) -> nn.Module:
    """A network with initial weights of a fixed seed, for the classes and the size of these images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = models.build(name, classes=len(train.classes), input_size=train.input_size)
    return network.train()


class TeacherOnLoader(nn.Module):
    """A frozen teacher on the tensors of the student's loader.

    Its own preprocessing starts from raw pixels, so the loader's normalisation is undone: one multiply and one add,
    less than loading every image twice.
    """

    def __init__(self, teacher: Classifier, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.preprocess = teacher.preprocess
        self.network = teacher.network.to(memory_format=torch.contiguous_format)
        self.register_buffer("scale", (std * 255)[:, None, None])
        self.register_buffer("shift", (mean * 255)[:, None, None])
        self.scale: Tensor
        self.shift: Tensor
        self.eval().requires_grad_(False)

    def forward(self, normalised: Tensor) -> Tensor:
        """Normalised pixels (B, C, H, W) → logits (B, classes)."""
        logits: Tensor = self.network(self.preprocess(normalised * self.scale + self.shift))
        return logits


class PilImages(Dataset[tuple[Tensor, int]]):
    """Images in memory, given out one by one as PIL images through a transform, as torchvision's CIFAR10 does."""

    def __init__(
        self, images: npt.NDArray[np.uint8], labels: Int64, transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.images = images
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def kd_loss(logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """λ·CE + (1 − λ)·τ²·KL, from kd's own loss functions."""
    hard = losses.cross_entropy(logits, labels)
    return LAMDA * hard + (1 - LAMDA) * losses.kd_loss(logits, targets, TAU)


def spread(length: int, count: int) -> Int64:
    """`count` row numbers, evenly spaced: data may be sorted by class."""
    return np.linspace(0, length, min(count, length), endpoint=False).astype(np.int64)


def cut(data: ImageSet, count: int) -> ImageSet:
    """Some of a set's images, as a set of its own."""
    rows = spread(len(data), count)
    images, labels = np.array(data.images[rows]), data.labels[rows]
    return ImageSet(images, labels, data.classes, fingerprint_of(images, labels, data.classes))
