"""What methods compute from logits and labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcli.methods.batch import Batch
from kdcli.methods.objective import labelled
from kdcli.methods.settings import TrainConfig

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

MULTI_LEVEL_TAUS = (2.0, 3.0, 4.0, 5.0, 6.0)


def smoothed(batch: Batch) -> Tensor:
    """Cross-entropy on smoothed labels."""
    from kdcli.methods import losses

    settings = {"smoothing": batch.config.label_smoothing}
    return labelled(losses.cross_entropy, losses.mixed_cross_entropy, **settings)(batch)


def regression(batch: Batch) -> Tensor:
    """½‖s − t‖²."""
    from kdcli.methods import losses

    return losses.logit_regression(batch.student_logits, batch.targets)


def noisy(batch: Batch) -> Tensor:
    """½‖s − t′‖², t′ scaled by noise."""
    from kdcli.methods import losses

    targets = batch.targets
    selected, noise = noise_of(batch.config, batch.epoch, batch.samples, targets.shape[1])
    selected, noise = selected.to(targets.device), noise.to(targets.device)
    return losses.logit_regression(batch.student_logits, losses.perturb(targets, selected, noise))


def soft_targets(batch: Batch) -> Tensor:
    """τ²·KL of softened probabilities."""
    from kdcli.methods import losses

    return losses.soft_targets(*_logits(batch), batch.tau)


def standardized(batch: Batch) -> Tensor:
    """τ²·KL of the softened probabilities of standardized logits."""
    from kdcli.methods import losses

    return losses.soft_targets(*_standardized(batch), batch.tau)


def decoupled(batch: Batch) -> Tensor:
    """Target and other classes apart; of a mixture, each label with its share."""
    from kdcli.methods import losses

    student, teacher = _logits(batch)
    settings = batch.tau, batch.config.dkd_alpha, batch.config.dkd_beta
    if batch.other_labels is None or batch.shares is None:
        return losses.decoupled(student, teacher, batch.labels, *settings)
    own = losses.decoupled(student, teacher, batch.labels, *settings, batch.shares)
    return own + losses.decoupled(student, teacher, batch.other_labels, *settings, 1 - batch.shares)


def correlated(batch: Batch) -> Tensor:
    """Correlation of rows and columns of probabilities."""
    from kdcli.methods import losses

    student, teacher = batch.gather(batch.student_logits), batch.gather(batch.targets)
    return losses.dist(student, teacher, batch.tau, batch.config.dist_inter, batch.config.dist_intra)


def multi_level(batch: Batch) -> Tensor:
    """Instances, the batch and the classes, at several temperatures."""
    from kdcli.methods import losses

    student, teacher = batch.gather(batch.student_logits), batch.gather(batch.targets)
    return losses.multi_level(student, teacher, MULTI_LEVEL_TAUS)


def _logits(batch: Batch) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's, standardized where that is asked for."""
    return _standardized(batch) if batch.config.standardize else (batch.student_logits, batch.targets)


def _standardized(batch: Batch) -> tuple[Tensor, Tensor]:
    from kdcli.methods import losses

    return losses.standardize(batch.student_logits), losses.standardize(batch.targets)


def noise_of(
    config: TrainConfig, epoch: int, samples: npt.NDArray[np.int64], classes: int
) -> tuple[Tensor, Tensor]:
    """The noisy teacher's draws: m bool (B, 1) with probability `noisy_ratio`, ξ ~ N(0, `noisy_sigma`²).

    ξ is (B, 1) for scope `sample` and (B, classes) for scope `logit`. The draws depend on seed, epoch and sample
    alone, so they are fresh in each epoch and the same after a resume.
    """
    import numpy as np
    import torch

    from kdcli.data import augment

    random = augment.random_bits(config.seed, augment.NOISE, epoch, samples)
    selected = augment.uniform(random[0]) < config.noisy_ratio
    if config.noise_scope == "sample":
        noise = augment.normal(random[1], random[2])[:, None]
    else:
        columns = []
        for first in range(0, classes, 2):
            block = augment.random_bits(config.seed, augment.NOISE, epoch, samples, block=1 + first // 2)
            columns += [augment.normal(block[0], block[1]), augment.normal(block[2], block[3])]
        noise = np.stack(columns[:classes], axis=1)
    scaled = torch.from_numpy((config.noisy_sigma * noise).astype(np.float32))
    return torch.from_numpy(selected)[:, None], scaled
