"""Methods that regress the teacher's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from kdcli.methods.batch import Batch
from kdcli.methods.registry import method, option

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor


@method("logits", source="Ba & Caruana, NIPS 2014, eq. 1", regresses=True)
def logits(batch: Batch) -> Tensor:
    """Regress the teacher's logits."""
    from kdcli.methods.losses import logits as losses

    return losses.logit_regression(batch.student_logits, batch.targets)


@method("noisy", source="Sau & Balasubramanian, arXiv:1610.09650, eq. 3", regresses=True)
def noisy_logits(
    batch: Batch,
    *,
    ratio: Annotated[float, option("probability that a sample's target is perturbed", ge=0, le=1)] = 0.5,
    sigma: Annotated[float, option("standard deviation of the relative noise", ge=0, le=100)] = 0.9,
    scope: Annotated[
        Literal["sample", "logit"],
        option("one draw for all logits of a sample, or one for each", name="noise_scope"),
    ] = "sample",
) -> Tensor:
    """Regress logits that noise has scaled."""
    from kdcli.methods.losses import logits as losses

    targets = batch.targets
    classes = targets.shape[1] if scope == "logit" else None
    selected, noise = draw_noise(batch.seed, batch.epoch, batch.samples, ratio, sigma, classes)
    selected, noise = selected.to(targets.device), noise.to(targets.device)
    return losses.logit_regression(batch.student_logits, losses.perturb(targets, selected, noise))


def draw_noise(
    seed: int,
    epoch: int,
    samples: npt.NDArray[np.int64],
    ratio: float,
    sigma: float,
    classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw m, bool (B, 1), True with probability `ratio`, and ξ ~ N(0, sigma²), float32.

    ξ is (B, 1), or (B, classes) if these are given. A function of its arguments: fresh in each epoch, and the same
    after a resume and in any order of the samples.
    """
    import numpy as np
    import torch

    from kdcli.data import augment

    random = augment.random_bits(seed, augment.NOISE, epoch, samples)
    selected = augment.uniform(random[0]) < ratio
    if classes is None:
        noise = augment.normal(random[1], random[2])[:, None]
    else:
        columns = []
        for first in range(0, classes, 2):
            block = augment.random_bits(seed, augment.NOISE, epoch, samples, block=1 + first // 2)
            columns += [augment.normal(block[0], block[1]), augment.normal(block[2], block[3])]
        noise = np.stack(columns[:classes], axis=1)
    return torch.from_numpy(selected)[:, None], torch.from_numpy((sigma * noise).astype(np.float32))
