"""What a method sees of one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcli.methods.settings import TrainConfig

if TYPE_CHECKING:  # names for --help must not cost an import of torch
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Features:
    """What lies between a network's pixels and its logits.

    Attributes:
        stages: maps (B, C, H, W) at the end of each stage, from input to output.
        embedding: (B, D), what the last linear layer reads.
    """

    stages: tuple[Tensor, ...]
    embedding: Tensor


@dataclass(frozen=True)
class Shapes:
    """Of features, without B: (C, H, W) of each stage, and D."""

    stages: tuple[Shape, ...]
    embedding: int


@dataclass(frozen=True)
class Training:
    """What an adapter may need to know of the run it is made for.

    Attributes:
        student, teacher: shapes of their features.
        labels: int64 (N,), of all images of the data set; −1 of those without one.
        samples: int64, numbers of those that are trained on.
    """

    config: TrainConfig
    student: Shapes
    teacher: Shapes
    labels: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """What a method sees of one step.

    Attributes:
        student_logits: (B, C), float32, with gradient.
        teacher_logits: (B, C), float32; None for a method that does not need them.
        labels: int64 (B,); −1 of an image without one, which methods that say `needs_labels` never see.
        samples: int64 (B,), the images' numbers in the data set: randomness is drawn by them.
        epoch: number of the pass, from 0.
        config: the run's settings.
        other_labels, shares: of the images mixed in by mixup, (B,), and how much is left of each image itself; None
            where nothing is mixed.
        student_features, teacher_features: None for methods that do not need them.
        adapter: the module that the method has asked for, which learns along with the student.
        done: share of the training that is done, 0 … 1.
        gather: from a part of the batch to the whole, where several processes share it; gradients flow back. For
            methods that compare images with each other.
        tau: temperature: the user's, else the method's own.
    """

    student_logits: Tensor
    teacher_logits: Tensor | None
    labels: Tensor
    samples: npt.NDArray[np.int64]
    epoch: int
    config: TrainConfig
    other_labels: Tensor | None = None
    shares: Tensor | None = None
    student_features: Features | None = None
    teacher_features: Features | None = None
    adapter: nn.Module | None = None
    done: float = 0.0
    gather: Callable[[Any], Any] = lambda values: values
    tau: float = 1.0

    @property
    def targets(self) -> Tensor:
        """The teacher's logits, which this method has asked for."""
        if self.teacher_logits is None:
            raise RuntimeError("a method that reads the teacher must say so in `needs_teacher`")
        return self.teacher_logits

    @property
    def features(self) -> tuple[Features, Features]:
        """The student's and the teacher's, which this method has asked for."""
        if self.student_features is None or self.teacher_features is None:
            raise RuntimeError("a method that reads features must say so in `needs_features`")
        return self.student_features, self.teacher_features

    @property
    def stages(self) -> list[tuple[Tensor, Tensor]]:
        """Maps of student and teacher, paired from the last stage backwards."""
        student, teacher = self.features
        return paired(student.stages, teacher.stages)


def paired(student: tuple[Any, ...], teacher: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """The last with the last, and so on back to where one has no more; from input to output."""
    count = min(len(student), len(teacher))
    return list(zip(student[len(student) - count :], teacher[len(teacher) - count :], strict=True))
