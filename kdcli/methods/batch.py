"""Data that a method reads in one step, and about the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported for --help, and so without torch
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Features:
    """Feature maps (B, C, H, W) at the end of each stage, and the input (B, D) of the last linear layer."""

    stages: tuple[Tensor, ...]
    embedding: Tensor


@dataclass(frozen=True)
class Shapes:
    """Shapes of features without B: (C, H, W) of each stage, and D."""

    stages: tuple[Shape, ...]
    embedding: int

    @classmethod
    def of(cls, maps: Sequence[Tensor], embedding: Tensor) -> Shapes:
        sizes = [stage.shape[1:] for stage in maps]
        return cls(tuple((channels, height, width) for channels, height, width in sizes), embedding.shape[1])


@dataclass(frozen=True)
class Training:
    """Data from which an adapter is made."""

    student: Shapes
    teacher: Shapes
    labels: npt.NDArray[np.int64]  # int64 (N,), of all images of the data set; −1 without a label
    samples: npt.NDArray[np.int64]  # int64, indices of the images in the training split

    @property
    def stages(self) -> list[tuple[Shape, Shape]]:
        """Shapes of the maps of student and teacher, in the pairs of `Batch.stages`."""
        return _pairs(self.student.stages, self.teacher.stages)


@dataclass(frozen=True)
class Batch:
    """Inputs of a method in one step.

    Attributes:
        student_logits, teacher_logits: float32 (B, C); the teacher's are None without a teacher.
        samples: int64 (B,), indices of the images in the data set; counters of the random numbers.
        other_labels, shares: with mixup or cutmix, the partners' labels (B,), and λ (B,) in [0, 1], the weight of
            `labels`.
        student_features, teacher_features: None unless a method needs features.
        gather: from a process's part of the batch to the whole, with gradients, for relations between images.
    """

    student_logits: Tensor
    teacher_logits: Tensor | None
    labels: Tensor  # int64 (B,); −1 without a label, which methods that need labels never get
    samples: npt.NDArray[np.int64]
    epoch: int  # from 0
    seed: int
    other_labels: Tensor | None = None
    shares: Tensor | None = None
    student_features: Features | None = None
    teacher_features: Features | None = None
    adapter: Any = None  # module that the method's `adapter` made
    done: float = 0.0  # fraction of the training completed, in [0, 1]
    gather: Callable[[Any], Any] = lambda values: values
    tau: float = 1.0  # temperature of this step

    @property
    def targets(self) -> Tensor:
        """The teacher's logits (B, C)."""
        if self.teacher_logits is None:
            raise RuntimeError("the teacher's logits are there only with needs_teacher=True")
        return self.teacher_logits

    @property
    def features(self) -> tuple[Features, Features]:
        """Features of student and teacher."""
        if self.student_features is None or self.teacher_features is None:
            raise RuntimeError('features are there only with needs=("features",)')
        return self.student_features, self.teacher_features

    @property
    def stages(self) -> list[tuple[Tensor, Tensor]]:
        """Maps of student and teacher, paired from the last stage backwards; from input to output."""
        student, teacher = self.features
        return _pairs(student.stages, teacher.stages)

    @property
    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) of student and teacher, of the whole batch."""
        student, teacher = self.features
        return self.gather(student.embedding), self.gather(teacher.embedding)


def _pairs(student: tuple[Any, ...], teacher: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    count = min(len(student), len(teacher))
    return list(zip(student[len(student) - count :], teacher[len(teacher) - count :], strict=True))
