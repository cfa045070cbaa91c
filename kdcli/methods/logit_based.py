"""Methods on logits: against labels, against the teacher's logits, or its softened probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from kdcli.methods import losses
from kdcli.methods.batch import Batch
from kdcli.methods.registry import CE, method, option

if TYPE_CHECKING:
    from torch import Tensor

MULTI_LEVEL_TAUS = (2.0, 3.0, 4.0, 5.0, 6.0)
Smoothing = Annotated[
    float, option("share of each label distributed over all classes", name="label_smoothing", ge=0, lt=1)
]


@method(CE, source="cross-entropy", needs=("labels",), needs_teacher=False)
def cross_entropy(batch: Batch) -> Tensor:
    """Cross-entropy on labels, without a teacher: the baseline."""
    return label_smoothing(batch, smoothing=0.0)


@method("ls", source="Szegedy et al., CVPR 2016, section 7", needs=("labels",), needs_teacher=False)
def label_smoothing(batch: Batch, *, smoothing: Smoothing = 0.1) -> Tensor:
    """Cross-entropy on smoothed labels, without a teacher."""
    mixup = batch.other_labels, batch.shares
    return losses.logits.cross_entropy(batch.student_logits, batch.labels, smoothing, *mixup)


@method("logits", source="Ba & Caruana, NIPS 2014, eq. 1", regresses=True)
def logits(batch: Batch) -> Tensor:
    """Regress the teacher's logits."""
    return losses.logits.logit_regression(batch.student_logits, batch.targets)


@method("noisy", source="Sau & Balasubramanian, arXiv:1610.09650, eq. 3", regresses=True)
def noisy_logits(
    batch: Batch,
    *,
    ratio: Annotated[
        float, option("probability that a sample's target is perturbed", rare=False, ge=0, le=1)
    ] = 0.5,
    sigma: Annotated[
        float, option("standard deviation of the relative noise", rare=False, ge=0, le=100)
    ] = 0.1,
    scope: Annotated[
        Literal["sample", "logit"],
        option("one random factor for all logits of a sample, or one for each logit", name="noise_scope"),
    ] = "sample",
) -> Tensor:
    """Regress the teacher's logits, perturbed by noise."""
    targets = batch.targets
    classes = targets.shape[1] if scope == "logit" else None
    drawn = losses.logits.draw_noise(batch.seed, batch.epoch, batch.samples, ratio, sigma, classes)
    targets = losses.logits.perturb(targets, *(values.to(targets.device) for values in drawn))
    return losses.logits.logit_regression(batch.student_logits, targets)


def lamda_weights(
    *,
    lamda: Annotated[
        float,
        option("weight of cross-entropy (soft: 1 − λ)", "--lambda", name="lamda", rare=False, ge=0, le=1),
    ] = 0.3,
) -> tuple[float, float]:
    """Weights λ of cross-entropy and 1 − λ of the soft term."""
    return lamda, 1 - lamda


@method("kd", source="Hinton et al., arXiv:1503.02531", balance=lamda_weights, tau=3.0)
def soft_targets(batch: Batch, *, standardize: bool = False) -> Tensor:
    """Match the teacher's softened probabilities."""
    return losses.logits.kd_loss(*_logits(batch, standardize), batch.tau)


@method("born-again", source="Furlanello et al., ICML 2018", ce=1.0, tau=1.0, same_network=True)
def born_again(batch: Batch, *, standardize: bool = False) -> Tensor:
    """Match an earlier student of the same network, and labels."""
    return soft_targets(batch, standardize=standardize)


@method("lskd", source="Sun et al., CVPR 2024", ce=0.1, weight=9.0, tau=2.0)
def standardized(batch: Batch) -> Tensor:
    """Match soft targets of standardized logits."""
    return soft_targets(batch, standardize=True)


@method("dkd", source="Zhao et al., CVPR 2022, eq. 7", ce=1.0, tau=4.0, warm_up=1 / 12, needs=("labels",))
def decoupled(
    batch: Batch,
    *,
    alpha: Annotated[float, option("weight of the target-class term", ge=0)] = 1.0,
    beta: Annotated[float, option("weight of the non-target-class term", ge=0)] = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Match target class and other classes separately.

    With mixup, the loss for each of the two labels has that label's share. The weight rises over 20 of 240 epochs,
    as in the authors' code.
    """
    logits, settings = _logits(batch, standardize), (batch.tau, alpha, beta)
    if batch.other_labels is None or batch.shares is None:
        return losses.logits.decoupled(*logits, batch.labels, *settings)
    own = losses.logits.decoupled(*logits, batch.labels, *settings, batch.shares)
    return own + losses.logits.decoupled(*logits, batch.other_labels, *settings, 1 - batch.shares)


@method("dist", source="Huang et al., NeurIPS 2022", ce=1.0, tau=4.0)
def correlation(
    batch: Batch,
    *,
    inter: Annotated[float, option("weight of the inter-class term, per image", ge=0)] = 2.0,
    intra: Annotated[float, option("weight of the intra-class term, per class", ge=0)] = 2.0,
) -> Tensor:
    """Maximise the correlation with the teacher, per image and per class."""
    student, teacher = batch.gather(batch.student_logits), batch.gather(batch.targets)
    return losses.logits.dist(student, teacher, batch.tau, inter, intra)


@method("mlkd", source="Jin et al., CVPR 2023", ce=1.0)
def multi_level(batch: Batch) -> Tensor:
    """Match images, batch and classes at several temperatures."""
    student, teacher = batch.gather(batch.student_logits), batch.gather(batch.targets)
    return losses.logits.multi_level(student, teacher, MULTI_LEVEL_TAUS)


def _logits(batch: Batch, standardize: bool) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher, each image's standardized if asked for."""
    if not standardize:
        return batch.student_logits, batch.targets
    return losses.logits.standardize(batch.student_logits), losses.logits.standardize(batch.targets)
