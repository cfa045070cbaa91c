"""Methods that match relations between images, in the last maps or the embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from kdcli.methods.batch import Batch, Training
from kdcli.methods.registry import feature_method, option

if TYPE_CHECKING:
    from torch import Tensor, nn


@feature_method("sp", source="Tung & Mori, ICCV 2019", weight=3000.0)
def similarity(batch: Batch) -> Tensor:
    """Match which images are alike."""
    from kdcli.methods.losses import pairwise

    student, teacher = batch.stages[-1]
    return pairwise.similarity(batch.gather(student), batch.gather(teacher))


@feature_method("rkd", source="Park et al., CVPR 2019")
def relational(
    batch: Batch,
    *,
    distance: Annotated[float, option("weight of distances", ge=0)] = 25.0,
    angle: Annotated[float, option("weight of angles", ge=0)] = 50.0,
) -> Tensor:
    """Match distances and angles between images."""
    from kdcli.methods.losses import pairwise

    return pairwise.relational(*batch.embeddings, distance, angle)


@feature_method("pkt", source="Passalis & Tefas, ECCV 2018", weight=30000.0)
def probabilistic(batch: Batch) -> Tensor:
    """Match neighbourhood probabilities."""
    from kdcli.methods.losses import pairwise

    return pairwise.probabilistic(*batch.embeddings)


def contrast_adapter(
    training: Training,
    *,
    dim: Annotated[int, option("width of the common space", ge=1, le=65536)] = 128,
    negatives: Annotated[int, option("images of other classes per image", ge=1, le=1_000_000)] = 1024,
    temperature: Annotated[float, option("temperature of the similarities", gt=0, le=100)] = 0.07,
) -> nn.Module:
    """Projections of both embeddings, and a memory of them for each image."""
    from kdcli.methods.losses.contrast import Contrast, Negatives

    widths = training.student.embedding, training.teacher.embedding
    module: Any = Contrast(*widths, len(training.labels), dim=dim, temperature=temperature)
    module.draw = Negatives(training.labels, training.samples, negatives)
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
    """Tell the teacher's embedding from those of other classes."""
    import torch

    student, teacher = batch.embeddings
    numbers = batch.gather(torch.from_numpy(batch.samples).to(student.device))
    negatives = batch.adapter.draw(numbers.cpu().numpy(), batch.seed, batch.epoch)
    return batch.adapter(student, teacher, numbers, torch.from_numpy(negatives).to(student.device))
