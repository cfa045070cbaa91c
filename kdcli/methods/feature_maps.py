"""Methods that match the feature maps of paired stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from kdcli.base.errors import UsageError
from kdcli.methods.batch import Batch, Training
from kdcli.methods.registry import feature_method, option

if TYPE_CHECKING:
    from torch import Tensor, nn

HintStage = Annotated[
    int, option("the stage that is guided, from 1; 0: the middle one", name="hint_stage", ge=0, le=1000)
]


def hint_adapter(training: Training, *, stage: HintStage = 0) -> nn.Module:
    """Regressor from the guided stage's channels to the hint's."""
    from kdcli.methods.losses import maps

    return maps.Hint(*training.stages[_index(len(training.stages), stage)])


@feature_method("fitnet", source="Romero et al., ICLR 2015, eq. 3", weight=100.0, adapter=hint_adapter)
def hint(batch: Batch, *, stage: HintStage = 0) -> Tensor:
    """Regress the maps of a middle stage."""
    return batch.adapter(*batch.stages[_index(len(batch.stages), stage)])


def _index(count: int, stage: int) -> int:
    if stage > count:
        raise UsageError(
            f"--hint-stage {stage}: student and teacher have {count} stages in common", "Use fewer."
        )
    return (stage or (count + 1) // 2) - 1


@feature_method("at", source="Zagoruyko & Komodakis, ICLR 2017, eq. 2", weight=1000.0)
def attention(batch: Batch) -> Tensor:
    """Match attention maps of all stages."""
    from kdcli.methods.losses import maps

    total: Tensor = sum(maps.attention(*pair) for pair in batch.stages)  # type: ignore[assignment]
    return total


def variational_adapter(training: Training) -> nn.Module:
    """Regressor and variances of each stage."""
    from torch import nn

    from kdcli.methods.losses import maps

    return nn.ModuleList(maps.Variational(*pair) for pair in training.stages)


@feature_method("vid", source="Ahn et al., CVPR 2019", adapter=variational_adapter)
def variational(batch: Batch) -> Tensor:
    """Predict the teacher's maps, with a variance."""
    return sum(layer(*pair) for layer, pair in zip(batch.adapter, batch.stages, strict=True))


def review_adapter(training: Training) -> nn.Module:
    """Attention-based fusion of stages."""
    from kdcli.methods.losses import maps

    student, teacher = zip(*training.stages, strict=True)
    return maps.Review(student, teacher)


@feature_method("reviewkd", source="Chen et al., CVPR 2021", warm_up=1 / 12, adapter=review_adapter)
def review(batch: Batch) -> Tensor:
    """Fuse later stages into earlier ones.

    The weight rises over 20 of 240 epochs, as in the authors' code.
    """
    return batch.adapter(*zip(*batch.stages, strict=True))
