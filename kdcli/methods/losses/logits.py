"""Losses on logits: against labels, and against the teacher's logits."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcli.base.metrics import divergences
from kdcli.data import augment
from kdcli.methods.losses.numerics import divisor, pair, precise


def cross_entropy(
    student_logits: Tensor,
    labels: Tensor,
    smoothing: float = 0.0,
    other_labels: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """−Σ q·log softmax(s), mean over the batch, with q = (1 − ε)·onehot(y) + ε/C; logits (B, C), labels (B,) → ().

    ε is the `smoothing`, in [0, 1]: label smoothing (Szegedy et al., CVPR 2016, section 7); 0 is −log softmax(s)[y].
    With mixup (Zhang et al., arXiv:1710.09412), λ·CE(s, y) + (1 − λ)·CE(s, y′), where `other_labels` are y′ and
    `shares` λ, (B,) each.
    """
    logits = precise(student_logits)
    if other_labels is None or shares is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    own = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    other = F.cross_entropy(logits, other_labels, reduction="none", label_smoothing=smoothing)
    return (shares * own + (1 - shares) * other).mean()


def logit_regression(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """½‖s − t‖²: sum over classes, mean over the batch (Ba & Caruana, NIPS 2014, eq. 1); (B, C) each → ()."""
    student, teacher = pair(student_logits, teacher_logits)
    return 0.5 * (student - teacher).square().sum(dim=1).mean()


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


def perturb(teacher_logits: Tensor, selected: Tensor, noise: Tensor) -> Tensor:
    """t′ = (1 + m·ξ)·t (Sau & Balasubramanian, arXiv:1610.09650, eq. 3); m and ξ are those of `draw_noise`.

    A sample that is not selected keeps its target exactly.
    """
    return torch.where(selected, teacher_logits * (1 + noise), teacher_logits)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """τ²·KL(softmax(t/τ) ‖ softmax(s/τ)): sum over classes, mean over the batch (Hinton et al. 2015); → ().

    τ² keeps the gradient's size independent of the temperature.
    """
    logits = pair(student_logits, teacher_logits)
    student, teacher = (F.log_softmax(side / tau, dim=1) for side in logits)
    return tau * tau * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def standardize(logits: Tensor) -> Tensor:
    """(z − mean) / (std + 1e-7) of each sample over its classes; (B, C) → (B, C), C ≥ 2.

    Sun et al., CVPR 2024. As in their code the standard deviation has C − 1 in its denominator. A sample whose logits
    are all equal gives 0, with the gradient of z − mean.
    """
    logits = precise(logits)
    centred = logits - logits.mean(dim=1, keepdim=True)
    rounding = 4 * torch.finfo(logits.dtype).eps * logits.detach().abs().amax(dim=1, keepdim=True)
    return centred / (divisor(logits.std(dim=1, keepdim=True), rounding) + 1e-7)


def decoupled(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    tau: float,
    alpha: float,
    beta: float,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """τ²·(α·TCKD + β·NCKD), mean over the batch: DKD (Zhao et al., CVPR 2022, eq. 7); (B, C ≥ 2) each → ().

    With b = (p_y, 1 − p_y) and p̂ the softmax over the other classes alone, both at temperature τ,
    TCKD = KL(bᵗ ‖ bˢ) and NCKD = KL(p̂ᵗ ‖ p̂ˢ). Both are computed from log-probabilities, so that they hold where p_y
    is next to 0 or 1. Of two classes only one is other: NCKD is 0. `sample_weights` (B,) multiply each sample's loss;
    the mean is over the batch, not over the weights.
    """
    classes = torch.arange(student_logits.shape[1] - 1, device=labels.device)
    own = labels[:, None]
    others = classes + (classes >= own)  # (B, C − 1): every class but the label's
    target, rest = [], []
    for logits in pair(student_logits, teacher_logits):
        rest.append((logits / tau).gather(1, others))
        whole = rest[-1].logsumexp(dim=1, keepdim=True)
        target.append(torch.cat([(logits / tau).gather(1, own), whole], dim=1))
    each = alpha * divergences(*target) + beta * divergences(*rest)  # (B,)
    return tau * tau * (each if sample_weights is None else each * sample_weights).mean()


def dist(
    student_logits: Tensor, teacher_logits: Tensor, tau: float, inter_weight: float, intra_weight: float
) -> Tensor:
    """τ²·(β·inter + γ·intra): DIST (Huang et al., NeurIPS 2022); (B, C) each → ().

    inter is 1 − ρ of each sample's probabilities softmax(·/τ), mean over samples; intra is 1 − ρ of each class's
    probabilities over the batch, mean over classes; ρ is Pearson's correlation. A sample or class without spread
    correlates with nothing, ρ = 0; of one sample intra is 0.
    """
    logits = pair(student_logits, teacher_logits)
    student, teacher = (F.log_softmax(side / tau, dim=1) for side in logits)
    loss = inter_weight * (1 - _correlations(student, teacher, 1).mean())
    if len(student) > 1:
        loss = loss + intra_weight * (1 - _correlations(student, teacher, 0).mean())
    return tau * tau * loss


def _correlations(log_student: Tensor, log_teacher: Tensor, dim: int) -> Tensor:
    """Pearson's ρ along one dimension, of probabilities given as logarithms.

    It is blind to scale, so each row or column is brought to a maximum of 1 first: nothing underflows.
    """
    sides = []
    for logarithms in (log_student, log_teacher):
        values = (logarithms - logarithms.detach().amax(dim=dim, keepdim=True)).exp()
        centred = values - values.mean(dim=dim, keepdim=True)
        rounding = 8 * torch.finfo(values.dtype).eps * math.sqrt(values.shape[dim])
        sides.append(centred / divisor(torch.linalg.vector_norm(centred, dim=dim, keepdim=True), rounding))
    return (sides[0] * sides[1]).sum(dim=dim)


def multi_level(student_logits: Tensor, teacher_logits: Tensor, taus: Sequence[float]) -> Tensor:
    """Multi-level logit distillation (Jin, Wang & Lin, CVPR 2023), summed over temperatures; (B, C) each → ().

    For each τ, with P = softmax(·/τ), (B, C): the instances' τ²·KL(Pᵗ ‖ Pˢ), mean over the batch, plus the batch's
    ‖PᵗPᵗᵀ − PˢPˢᵀ‖²/B, plus the classes' ‖PᵗᵀPᵗ − PˢᵀPˢ‖²/C (squared Frobenius norms).
    """
    logits = pair(student_logits, teacher_logits)
    batch, classes = logits[0].shape
    loss = logits[0].new_zeros(())
    for tau in taus:
        student, teacher = (F.softmax(side / tau, dim=1) for side in logits)
        loss = loss + kd_loss(*logits, tau)
        loss = loss + (teacher @ teacher.T - student @ student.T).square().sum() / batch
        loss = loss + (teacher.T @ teacher - student.T @ student).square().sum() / classes
    return loss
