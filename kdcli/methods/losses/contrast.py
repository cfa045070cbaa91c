"""Contrastive representation distillation: loss, module with memory banks, and the choice of negatives."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli.base.errors import UsageError
from kdcli.data import augment
from kdcli.methods.losses.numerics import pair, precise, unit


def contrastive(log_scores: Tensor, samples: int) -> Tensor:
    """−log h(positive) − Σ log(1 − h(negative)), mean over the batch: CRD's (Tian et al., ICLR 2020, eq. 18); → ().

    h = P/(P + K/n): probability that a pair of score P is positive, with K negatives drawn uniformly from n samples
    (noise-contrastive estimation). `log_scores` are log P, (B, 1 + K), the positive first; n is `samples`.
    """
    log_scores = precise(log_scores)
    odds = log_scores - math.log((log_scores.shape[1] - 1) / samples)  # log h/(1 − h)
    return -(F.logsigmoid(odds[:, 0]) + F.logsigmoid(-odds[:, 1:]).sum(dim=1)).mean()


class Contrast(nn.Module):
    """CRD (Tian et al., ICLR 2020): contrast each network's embedding with the other network's memory bank.

    Both embeddings (B, D) are projected to `dim` and normalised. Positive: the same image; negatives: K images. Score
    exp(cos/T)/Z; Z is set by the first batch to a mean of 1/`samples`. After its loss a batch updates the banks:
    m·old + (1 − m)·new, normalised; not in eval mode.

    Several processes that share a batch must each be given all of it, so that their banks stay equal.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_scale: Tensor
    scaled: Tensor
    draw: "Negatives"

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        samples: int,
        dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        """Initialise a memory of `samples` images uniformly in ±√(3/dim); the widths are D of the two embeddings."""
        super().__init__()
        self.samples = samples
        self.temperature, self.momentum = temperature, momentum
        self.student = nn.Linear(student_width, dim)
        self.teacher = nn.Linear(teacher_width, dim)
        bound = math.sqrt(3 / dim)
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, torch.empty(samples, dim).uniform_(-bound, bound))
        self.register_buffer("log_scale", torch.zeros(2))  # log Z, anchored at the student and at the teacher
        self.register_buffer("scaled", torch.tensor(False))

    def forward(
        self, student_embedding: Tensor, teacher_embedding: Tensor, samples: Tensor, negatives: Tensor
    ) -> Tensor:
        """The sum of both anchors' losses, mean over the batch; → ().

        Embeddings are (B, D), or what flattens to it; `samples`, int64 (B,), are the images' numbers, each once, and
        `negatives`, int64 (B, K), those of other images.
        """
        student, teacher = pair(student_embedding.flatten(1), teacher_embedding.flatten(1))
        student, teacher = unit(self.student(student)), unit(self.teacher(teacher))
        numbers = torch.cat([samples[:, None], negatives], dim=1)  # (B, 1 + K)
        sides = ((student, self.teacher_bank), (teacher, self.student_bank))
        # (2, B, 1 + K)
        scores = torch.stack([_products(*side, numbers) for side in sides]) / self.temperature
        with torch.no_grad():
            mean = scores.flatten(1).logsumexp(dim=1) - math.log(numbers.numel())
            log_scale = torch.where(self.scaled, self.log_scale, mean + math.log(self.samples))
            if self.training:
                self.log_scale.copy_(log_scale)
                self.scaled.fill_(True)
                for bank, vectors in ((self.student_bank, student), (self.teacher_bank, teacher)):
                    mixed = self.momentum * bank[samples] + (1 - self.momentum) * vectors
                    bank.index_copy_(0, samples, unit(mixed))
        scores = scores - log_scale[:, None, None]
        return contrastive(scores[0], self.samples) + contrastive(scores[1], self.samples)


def _products(vectors: Tensor, bank: Tensor, numbers: Tensor) -> Tensor:
    """Products of each vector with the numbered rows: (B, D), (N, D), (B, K) → (B, K).

    Where these rows are a good part of all, products with all are several times faster than gathering rows.
    """
    if len(bank) <= 16 * numbers.shape[1]:
        # cloned, since the bank changes before the backward pass
        return (vectors @ bank.clone().T).gather(1, numbers)
    return torch.bmm(bank[numbers], vectors[:, :, None]).squeeze(2)


class Negatives:
    """Sampler of images of other classes than an image's own."""

    def __init__(self, labels: npt.NDArray[np.int64], samples: npt.NDArray[np.int64], count: int) -> None:
        """Sort the training images `samples` by class, to draw `count` for each; `labels` (N,) are of all images."""
        self.labels = labels
        self.count = count
        self.by_class = samples[np.argsort(labels[samples], kind="stable")]
        classes = int(labels.max()) + 1 if len(labels) else 0
        self.sizes = np.bincount(labels[samples], minlength=classes)
        self.starts = np.cumsum(self.sizes) - self.sizes
        if np.count_nonzero(self.sizes) < 2:
            raise UsageError("method crd contrasts images of different classes, and there is only one class")

    def __call__(self, samples: npt.NDArray[np.int64], seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Draw numbers (B, count) of training images, each class but the sample's; a function of the arguments."""
        own = self.labels[samples]
        limit = (len(self.by_class) - self.sizes[own]).astype(np.uint64)  # (B,)
        blocks = -(-self.count // 4)
        each, numbers = np.repeat(samples, blocks), np.tile(np.arange(blocks), len(samples))
        random = augment.random_bits(seed, augment.CONTRAST, epoch, each, block=numbers).astype(np.uint64)
        drawn = random.T.reshape(len(samples), 4 * blocks)[:, : self.count]  # (B, count)
        places = ((drawn * limit[:, None]) >> np.uint64(32)).astype(np.int64)
        # skip the own class
        places += np.where(places >= self.starts[own][:, None], self.sizes[own][:, None], 0)
        return self.by_class[places]
