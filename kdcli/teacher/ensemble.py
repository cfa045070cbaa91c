"""Several teachers as one: the weighted mean of their logits. Each keeps its own outputs, shared with other runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kdcli.data import ImageSet
from kdcli.teacher import Outputs, Teacher
from kdcli.teacher.live import Live


@dataclass(frozen=True)
class MeanOutputs:
    """The weighted mean of what several teachers gave for one view; see `Outputs`."""

    parts: tuple[Outputs, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    def logits(self, samples: npt.NDArray[np.int64] | slice = slice(None)) -> Tensor:
        """Logits float32 (B, classes) of the named samples."""
        return _mean([part.logits(samples) for part in self.parts], self.weights)

    def chunks(self, samples: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float64]]:
        """Logits float64 of the named samples, piece by piece."""
        for pieces in zip(*(part.chunks(samples) for part in self.parts), strict=True):
            yield sum(weight * piece for weight, piece in zip(self.weights, pieces, strict=True))


@dataclass(frozen=True)
class MeanLive:
    """Several teachers that are run in each step; see `Live`."""

    parts: tuple[Live, ...]
    weights: tuple[float, ...]

    def __call__(self, images: Tensor, epoch: int, samples: npt.NDArray[np.int64]) -> Tensor:
        """Logits (B, classes) for a batch, without gradient."""
        return _mean([part(images, epoch, samples) for part in self.parts], self.weights)


@dataclass(frozen=True)
class Ensemble:
    """Several teachers as one; what is said of `Teacher` holds of it.

    Attributes:
        weights: of each in the mean, in all 1.
    """

    teachers: tuple[Teacher, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, teachers: Sequence[Teacher], weights: Sequence[float] = ()) -> Ensemble:
        """With weights in any scale; without, equal ones."""
        given = tuple(weights) or (1.0,) * len(teachers)
        return cls(tuple(teachers), tuple(weight / sum(given) for weight in given))

    @property
    def sha256(self) -> str:
        """Of the files' hashes and the weights."""
        lines = [f"{teacher.sha256} {weight!r}" for teacher, weight in self._pairs()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def passes(self) -> int:
        return sum(teacher.passes for teacher in self.teachers)

    @property
    def gives_probabilities(self) -> bool:
        return any(teacher.gives_probabilities for teacher in self.teachers)

    def record(self) -> dict[str, Any]:
        """For a student's provenance."""
        return {"teachers": [{**teacher.record(), "weight": weight} for teacher, weight in self._pairs()]}

    def _pairs(self) -> list[tuple[Teacher, float]]:
        return list(zip(self.teachers, self.weights, strict=True))

    def check(self, data: ImageSet) -> None:
        """Raise KdError unless all take these images and know these classes."""
        for teacher in self.teachers:
            teacher.check(data)

    def live(self, dropout: float = 0.0, seed: int = 0, precision: str = "32") -> MeanLive:
        """All models for use in each step."""
        return MeanLive(
            tuple(
                teacher.live(dropout, seed, precision, stream=number)
                for number, teacher in enumerate(self.teachers, 1)
            ),
            self.weights,
        )

    def logits(self, data: ImageSet, **settings: Any) -> list[MeanOutputs]:
        """The mean logits for each view; fewer if stopped."""
        views = []
        for number, teacher in enumerate(self.teachers, 1):
            task = f"{settings.get('task', 'teacher')} ({number} of {len(self.teachers)})"
            views.append(teacher.logits(data, **{**settings, "task": task}))
            if len(views[-1]) < settings.get("views", 1):
                return []
        return [MeanOutputs(parts, self.weights) for parts in zip(*views, strict=True)]


def _mean(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = weights[0] * parts[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + weight * part
    return total
