"""What methods compute from maps and embeddings, and the modules that learn along with the student for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kdcli.base.errors import UsageError
from kdcli.methods.batch import Batch, Training, paired

if TYPE_CHECKING:  # names for --help must not cost an import
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn


def hint(batch: Batch) -> Tensor:
    """The guided stage against the teacher's hint."""
    pairs = batch.stages
    return _adapted(batch)(*pairs[_middle(len(pairs), batch.config.hint_stage)])


def hint_adapter(training: Training) -> nn.Module:
    """A regressor from the guided stage's channels to the hint's."""
    from kdcli.methods import adapters

    pairs = _stages(training)
    return adapters.Hint(*pairs[_middle(len(pairs), training.config.hint_stage)])


def attention(batch: Batch) -> Tensor:
    """Attention maps of all stages."""
    from kdcli.methods import losses

    return _sum(losses.attention(student, teacher) for student, teacher in batch.stages)


def similarity(batch: Batch) -> Tensor:
    """Which images of the batch the last stage takes for alike."""
    from kdcli.methods import losses

    student, teacher = batch.stages[-1]
    return losses.similarity(batch.gather(student), batch.gather(teacher))


def relational(batch: Batch) -> Tensor:
    """Distances and angles between embeddings."""
    from kdcli.methods import losses

    student, teacher = _embeddings(batch)
    return losses.relational(student, teacher, batch.config.rkd_distance, batch.config.rkd_angle)


def probabilistic(batch: Batch) -> Tensor:
    """Neighbourhood probabilities of embeddings."""
    from kdcli.methods import losses

    return losses.probabilistic(*_embeddings(batch))


def variational(batch: Batch) -> Tensor:
    """The teacher's maps under a Gaussian whose mean the student's predict, all stages."""
    layers: Any = batch.adapter
    return _sum(layer(*pair) for layer, pair in zip(layers, batch.stages, strict=True))


def variational_adapter(training: Training) -> nn.Module:
    """A regressor and a variance for each stage."""
    from torch import nn

    from kdcli.methods import adapters

    return nn.ModuleList(adapters.Variational(*pair) for pair in _stages(training))


def contrastive(batch: Batch) -> Tensor:
    """The teacher's embedding of the same image, among many of other classes."""
    import torch

    device = batch.student_logits.device
    student, teacher = _embeddings(batch)
    numbers = batch.gather(torch.from_numpy(batch.samples).to(device))
    adapter: Any = batch.adapter
    negatives = adapter.others(numbers.cpu().numpy(), batch.config.seed, batch.epoch)
    return _adapted(batch)(student, teacher, numbers, torch.from_numpy(negatives).to(device))


def contrastive_adapter(training: Training) -> nn.Module:
    """Projections of both sides, and a memory of what they gave for each image."""
    from kdcli.methods import adapters

    config = training.config
    module: Any = adapters.Contrast(
        training.student.embedding,
        training.teacher.embedding,
        len(training.labels),
        dim=config.crd_dim,
        temperature=config.crd_temperature,
    )
    module.others = Others(training.labels, training.samples, config.crd_negatives)
    made: nn.Module = module
    return made


class Others:
    """Draws images of other classes, for each image by its number."""

    def __init__(self, labels: npt.NDArray[np.int64], samples: npt.NDArray[np.int64], count: int) -> None:
        import numpy as np

        self.labels = labels
        self.count = count
        self.by_class = samples[np.argsort(labels[samples], kind="stable")]
        classes = int(labels.max()) + 1 if len(labels) else 0
        self.sizes = np.bincount(labels[samples], minlength=classes)
        self.starts = np.cumsum(self.sizes) - self.sizes
        if np.count_nonzero(self.sizes) < 2:
            raise UsageError(
                "method crd tells images of different classes apart, and there is one class only"
            )

    def __call__(self, samples: npt.NDArray[np.int64], seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Numbers (B, count) of trained images whose class is not the sample's; a function of its arguments."""
        import numpy as np

        from kdcli.data import augment

        own = self.labels[samples]
        limit = (len(self.by_class) - self.sizes[own]).astype(np.uint64)  # (B,)
        blocks = -(-self.count // 4)
        each, numbers = np.repeat(samples, blocks), np.tile(np.arange(blocks), len(samples))
        random = augment.random_bits(seed, augment.CONTRAST, epoch, each, block=numbers).astype(np.uint64)
        drawn = random.T.reshape(len(samples), 4 * blocks)[:, : self.count]  # (B, count)
        places = ((drawn * limit[:, None]) >> np.uint64(32)).astype(np.int64)  # own class skipped
        places += np.where(places >= self.starts[own][:, None], self.sizes[own][:, None], 0)
        found: npt.NDArray[np.int64] = self.by_class[places]
        return found


def review(batch: Batch) -> Tensor:
    """The student's stages, each fused with those after it, against the teacher's."""
    pairs = batch.stages
    return _adapted(batch)([student for student, _ in pairs], [teacher for _, teacher in pairs])


def review_adapter(training: Training) -> nn.Module:
    """The attention-based fusion of stages."""
    from kdcli.methods import adapters

    pairs = _stages(training)
    return adapters.Review([student for student, _ in pairs], [teacher for _, teacher in pairs])


def _stages(training: Training) -> list[tuple[Any, Any]]:
    return paired(training.student.stages, training.teacher.stages)


def _middle(count: int, chosen: int) -> int:
    """The stage of the hint: the one chosen, from 1, else the middle one."""
    if chosen > count:
        raise UsageError(
            f"--hint-stage {chosen}: student and teacher have {count} stages in common", "Use fewer."
        )
    return (chosen or (count + 1) // 2) - 1


def _embeddings(batch: Batch) -> tuple[Tensor, Tensor]:
    student, teacher = batch.features
    return batch.gather(student.embedding), batch.gather(teacher.embedding)


def _adapted(batch: Batch) -> Callable[..., Tensor]:
    if batch.adapter is None:
        raise RuntimeError("the method's adapter was not made")
    return batch.adapter


def _sum(terms: Any) -> Tensor:
    total: Tensor = sum(terms)
    return total
