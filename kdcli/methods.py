"""The methods by name: what each computes from a batch, with which weights, and what it needs.

Adding a method: one function in `losses`, one function and one entry here, one parity test, one row in
`docs/methods.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcli.config import TrainConfig
from kdcli.errors import UsageError

if TYPE_CHECKING:  # names for --help must not cost an import of torch
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What a method sees of one step.

    Attributes:
        student_logits: (B, C), float32, with gradient.
        teacher_logits: (B, C), float32; None for a method that does not need them.
        labels: int64 (B,).
        samples: int64 (B,), the images' numbers in the data set: randomness is drawn by them.
        epoch: number of the pass, from 0.
        config: the run's settings.
        other_labels, shares: of the images mixed in by mixup, (B,), and how much is left of each image itself; None
            where nothing is mixed.
    """

    student_logits: Tensor
    teacher_logits: Tensor | None
    labels: Tensor
    samples: npt.NDArray[np.int64]
    epoch: int
    config: TrainConfig
    other_labels: Tensor | None = None
    shares: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """The teacher's logits, which this method has asked for."""
        if self.teacher_logits is None:
            raise RuntimeError("a method that reads the teacher must say so in `needs_teacher`")
        return self.teacher_logits


@dataclass(frozen=True)
class Method:
    """A way to learn.

    Attributes:
        soft_term: the teacher's term, unweighted; None for training on labels alone.
        ce_weight, kd_weight: the default weights under these settings.
        summary, source: one line each, for help and reports.
        reads: its own settings.
        regresses: the student's logits must take on the teacher's values, not only their softmax.
    """

    name: str
    soft_term: Callable[[Batch], Tensor] | None
    ce_weight: Callable[[TrainConfig], float]
    kd_weight: Callable[[TrainConfig], float]
    summary: str
    source: str
    reads: tuple[str, ...] = ()
    regresses: bool = False

    @property
    def needs_teacher(self) -> bool:
        return self.soft_term is not None

    def weights(self, config: TrainConfig) -> dict[str, float]:
        """Weight of each term: the user's, else the method's own; terms of weight 0 are left out."""
        ce = self.ce_weight(config) if config.ce_weight is None else config.ce_weight
        soft = self.kd_weight(config) if config.kd_weight is None else config.kd_weight
        chosen = {"ce": ce, "kd": soft if self.needs_teacher else 0.0}
        if not any(chosen.values()):
            raise UsageError(f"all weights of method {self.name} are 0", "Raise --ce-weight or --kd-weight.")
        return {term: weight for term, weight in chosen.items() if weight}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The named, unweighted terms whose weight is not 0, each a scalar."""
        from kdcli import losses

        wanted = self.weights(batch.config)
        found: dict[str, Tensor] = {}
        if "ce" in wanted:
            if batch.other_labels is None or batch.shares is None:
                found["ce"] = losses.cross_entropy(batch.student_logits, batch.labels)
            else:
                found["ce"] = losses.mixed_cross_entropy(
                    batch.student_logits, batch.labels, batch.other_labels, batch.shares
                )
        if "kd" in wanted and self.soft_term is not None:
            found["kd"] = self.soft_term(batch)
        return found


def _logits(batch: Batch) -> Tensor:
    from kdcli import losses

    return losses.logit_regression(batch.student_logits, batch.targets)


def _noisy(batch: Batch) -> Tensor:
    from kdcli import losses

    targets = batch.targets
    selected, noise = noise_of(batch.config, batch.epoch, batch.samples, targets.shape[1])
    selected, noise = selected.to(targets.device), noise.to(targets.device)
    return losses.logit_regression(batch.student_logits, losses.perturb(targets, selected, noise))


def _kd(batch: Batch) -> Tensor:
    from kdcli import losses

    return losses.soft_targets(batch.student_logits, batch.targets, batch.config.tau)


def noise_of(
    config: TrainConfig, epoch: int, samples: npt.NDArray[np.int64], classes: int
) -> tuple[Tensor, Tensor]:
    """The noisy teacher's draws: m bool (B, 1) with probability `noisy_ratio`, ξ ~ N(0, `noisy_sigma`²).

    ξ is (B, 1) for scope `sample` and (B, classes) for scope `logit`. The draws depend on seed, epoch and sample
    alone, so they are fresh in each epoch and the same after a resume.
    """
    import numpy as np
    import torch

    from kdcli import augment

    random = augment.words(config.seed, augment.NOISE, epoch, samples)
    selected = augment.uniform(random[0]) < config.noisy_ratio
    if config.noise_scope == "sample":
        noise = augment.normal(random[1], random[2])[:, None]
    else:
        columns = []
        for first in range(0, classes, 2):
            block = augment.words(config.seed, augment.NOISE, epoch, samples, block=1 + first // 2)
            columns += [augment.normal(block[0], block[1]), augment.normal(block[2], block[3])]
        noise = np.stack(columns[:classes], axis=1)
    scaled = torch.from_numpy((config.noisy_sigma * noise).astype(np.float32))
    return torch.from_numpy(selected)[:, None], scaled


def _never(config: TrainConfig) -> float:
    return 0.0


def _fully(config: TrainConfig) -> float:
    return 1.0


METHODS = {
    method.name: method
    for method in (
        Method("ce", None, _fully, _never, "labels alone, no teacher: the baseline", "cross-entropy"),
        Method(
            "logits",
            _logits,
            _never,
            _fully,
            "regress the teacher's logits",
            "Ba & Caruana, NIPS 2014",
            regresses=True,
        ),
        Method(
            "noisy",
            _noisy,
            _never,
            _fully,
            "regress logits that noise has scaled",
            "Sau & Balasubramanian, arXiv:1610.09650",
            reads=("noisy_ratio", "noisy_sigma", "noise_scope"),
            regresses=True,
        ),
        Method(
            "kd",
            _kd,
            lambda config: config.lamda,
            lambda config: 1 - config.lamda,
            "match the teacher's softened probabilities",
            "Hinton et al., arXiv:1503.02531",
            reads=("tau", "lamda"),
        ),
    )
}


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method: {name}", f"Known are {', '.join(METHODS)}.")
    return METHODS[name]


def unread(name: str, settings: Iterable[str]) -> list[str]:
    """Those of some settings that belong to methods, and that this method does not read."""
    method = get(name)
    others = {setting for other in METHODS.values() for setting in other.reads} - set(method.reads)
    if not method.needs_teacher:
        others |= {
            "teacher",
            "teacher_dropout",
            "teacher_cache",
            "teacher_precision",
            "cache_top_k",
            "kd_weight",
        }
    return [setting for setting in settings if setting in others]
