"""Methods that match features: the maps of paired stages, or relations between images in maps or embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from kdcli.base.errors import UsageError
from kdcli.methods import losses
from kdcli.methods.batch import Batch, Training
from kdcli.methods.registry import feature_method, option

if TYPE_CHECKING:
    from torch import Tensor, nn

HintStage = Annotated[
    int, option("stage to match, from 1; 0: the middle one", name="hint_stage", ge=0, le=1000)
]


def hint_adapter(training: Training, *, stage: HintStage = 0) -> nn.Module:
    return losses.features.Hint(*training.stages[_index(len(training.stages), stage)])


@feature_method("fitnet", source="Romero et al., ICLR 2015, eq. 3", weight=100.0, adapter=hint_adapter)
def hint(batch: Batch, *, stage: HintStage = 0) -> Tensor:
    """Regress the feature maps of a middle stage."""
    return batch.adapter(*batch.stages[_index(len(batch.stages), stage)])


def _index(count: int, stage: int) -> int:
    if stage > count:
        raise UsageError(
            f"--hint-stage {stage}: student and teacher have {count} stages in common", f"Use 1 to {count}."
        )
    return (stage or (count + 1) // 2) - 1


@feature_method("at", source="Zagoruyko & Komodakis, ICLR 2017, eq. 2", weight=1000.0)
def attention(batch: Batch) -> Tensor:
    """Match attention maps of all stages."""
    total: Tensor = sum(losses.features.attention(*pair) for pair in batch.stages)  # type: ignore[assignment]
    return total


def variational_adapter(training: Training) -> nn.Module:
    from torch import nn

    return nn.ModuleList(losses.features.Variational(*pair) for pair in training.stages)


@feature_method("vid", source="Ahn et al., CVPR 2019", adapter=variational_adapter)
def variational(batch: Batch) -> Tensor:
    """Regress the teacher's feature maps with learned variances."""
    return sum(layer(*pair) for layer, pair in zip(batch.adapter, batch.stages, strict=True))


def review_adapter(training: Training) -> nn.Module:
    student, teacher = zip(*training.stages, strict=True)
    return losses.features.Review(student, teacher)


@feature_method("reviewkd", source="Chen et al., CVPR 2021", warm_up=1 / 12, adapter=review_adapter)
def review(batch: Batch) -> Tensor:
    """Match the feature maps of fused stages.

    The weight rises over 20 of 240 epochs, as in the authors' code.
    """
    return batch.adapter(*zip(*batch.stages, strict=True))


@feature_method("sp", source="Tung & Mori, ICCV 2019", weight=3000.0)
def similarity(batch: Batch) -> Tensor:
    """Match similarities between images."""
    student, teacher = batch.stages[-1]
    return losses.features.similarity(batch.gather(student), batch.gather(teacher))


@feature_method("rkd", source="Park et al., CVPR 2019")
def relational(
    batch: Batch,
    *,
    distance: Annotated[float, option("weight of the distance term", ge=0)] = 25.0,
    angle: Annotated[float, option("weight of the angle term", ge=0)] = 50.0,
) -> Tensor:
    """Match distances and angles between images."""
    return losses.features.relational(*batch.embeddings, distance, angle)


@feature_method("pkt", source="Passalis & Tefas, ECCV 2018", weight=30000.0)
def probabilistic(batch: Batch) -> Tensor:
    """Match the probabilities of neighbours in a batch."""
    return losses.features.probabilistic(*batch.embeddings)


def contrast_adapter(
    training: Training,
    *,
    dim: Annotated[int, option("dimension of the common embedding", ge=1, le=65536)] = 128,
    negatives: Annotated[int, option("negatives per image", ge=1, le=1_000_000)] = 1024,
    temperature: Annotated[float, option("temperature of the contrastive loss", gt=0, le=100)] = 0.07,
) -> nn.Module:
    """Projections of both embeddings, and a memory of them for each image."""
    widths = training.student.embedding, training.teacher.embedding
    module = losses.contrast.Contrast(*widths, len(training.labels), dim=dim, temperature=temperature)
    module.draw = losses.contrast.Negatives(training.labels, training.samples, negatives)
    return module


@feature_method(
    "crd",
    source="Tian et al., ICLR 2020, eq. 18",
    weight=0.8,
    needs=("features", "labels"),
    no_mixup=True,
    adapter=contrast_adapter,
)
def contrastive(batch: Batch) -> Tensor:
    """Contrast embeddings with those of other classes."""
    numbers = batch.gather(batch.labels.new_tensor(batch.samples))
    negatives = batch.adapter.draw(numbers.cpu().numpy(), batch.seed, batch.epoch)
    return batch.adapter(*batch.embeddings, numbers, numbers.new_tensor(negatives))
