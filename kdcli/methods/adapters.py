"""What learns along with the student and is never exported: each makes a loss of two networks' features.

Shapes are without the batch: maps (C, H, W), an embedding (D,). No gradient reaches the teacher's side. All that
changes is a parameter or a buffer, so a state holds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli.methods import losses
from kdcli.methods.losses.numerics import pair, unit


class Hint(nn.Module):
    """FitNets' regressor (Romero et al., ICLR 2015) before `losses.hint`: 1×1 convolution to the teacher's channels.

    The paper's convolution is as large as the maps' sizes differ; here the larger map is pooled first.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        super().__init__()
        self.regressor = nn.Conv2d(student_shape[0], teacher_shape[0], 1)

    def forward(self, student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
        """(B, C, H, W) each → ()."""
        student, teacher = losses.same_size(student_maps, teacher_maps)
        return losses.hint(self.regressor(student), teacher)


class Variational(nn.Module):
    """VID's regressor and variances (Ahn et al., CVPR 2019) before `losses.variational`, as in the authors' code.

    Three 1×1 convolutions without bias, ReLU between, as wide as the teacher's maps; a variance for each of the
    teacher's channels, softplus(·) + 1e-5, that starts at 5.
    """

    LEAST = 1e-5

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        super().__init__()
        channels = teacher_shape[0]
        self.regressor = nn.Sequential(
            nn.Conv2d(student_shape[0], channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
        )
        self.spread = nn.Parameter(torch.full((channels,), math.log(math.expm1(5.0 - self.LEAST))))

    def forward(self, student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
        """(B, C, H, W) each → ()."""
        student, teacher = losses.same_size(student_maps, teacher_maps)
        return losses.variational(self.regressor(student), F.softplus(self.spread) + self.LEAST, teacher)


class Contrast(nn.Module):
    """CRD (Tian et al., ICLR 2020): each network's embedding against the other's of the same image and of K others.

    Both embeddings go through a linear layer to `dim` and are brought to length 1. Those of all the training images
    are remembered, and a batch's own are mixed into them after its loss: m·old + (1 − m)·new, at length 1 again. A
    score is exp(cos/T)/Z; Z is such that the first batch's mean is 1/`samples`, and then stays. In eval mode nothing
    is remembered.

    Where several processes share a batch, each must be given the whole of it: then all remember the same.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_scale: Tensor
    scaled: Tensor

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        samples: int,
        dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        """An empty memory, uniform in ±√(3/dim) as in the authors' code.

        Args:
            student_width, teacher_width: D of the two embeddings.
            samples: how many training images there are; their numbers are below it.
            dim: width of what is compared.
            temperature: T.
            momentum: m, in [0, 1].
        """
        super().__init__()
        self.samples = samples
        self.temperature, self.momentum = temperature, momentum
        self.student = nn.Linear(student_width, dim)
        self.teacher = nn.Linear(teacher_width, dim)
        bound = math.sqrt(3 / dim)
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, torch.empty(samples, dim).uniform_(-bound, bound))
        self.register_buffer(
            "log_scale", torch.zeros(2)
        )  # log Z with the student, with the teacher as anchor
        self.register_buffer("scaled", torch.tensor(False))

    def forward(
        self, student_embedding: Tensor, teacher_embedding: Tensor, samples: Tensor, negatives: Tensor
    ) -> Tensor:
        """The sum of both anchors' losses, mean over the batch; → ().

        Args:
            student_embedding, teacher_embedding: (B, D), or what flattens to it.
            samples: the images' numbers, int64 (B,), each once.
            negatives: numbers of other images, int64 (B, K).
        """
        student, teacher = pair(student_embedding.flatten(1), teacher_embedding.flatten(1))
        student, teacher = unit(self.student(student)), unit(self.teacher(teacher))
        numbers = torch.cat([samples[:, None], negatives], dim=1)  # (B, 1 + K)
        cosines = (
            _products(student, self.teacher_bank, numbers),
            _products(teacher, self.student_bank, numbers),
        )
        scores = torch.stack(cosines) / self.temperature  # (2, B, 1 + K)
        with torch.no_grad():
            mean = scores.flatten(1).logsumexp(dim=1) - math.log(numbers.numel())
            log_scale = torch.where(self.scaled, self.log_scale, mean + math.log(self.samples))
            if self.training:
                self.log_scale.copy_(log_scale)
                self.scaled.fill_(True)
                self._remember(self.student_bank, samples, student)
                self._remember(self.teacher_bank, samples, teacher)
        scores = scores - log_scale[:, None, None]
        return losses.contrastive(scores[0], self.samples) + losses.contrastive(scores[1], self.samples)

    def _remember(self, bank: Tensor, samples: Tensor, vectors: Tensor) -> None:
        mixed = self.momentum * bank[samples] + (1 - self.momentum) * vectors
        bank.index_copy_(0, samples, unit(mixed))


def _products(vectors: Tensor, bank: Tensor, numbers: Tensor) -> Tensor:
    """Of each vector with the rows of those numbers: (B, D), (N, D), (B, K) → (B, K).

    Where the rows asked for are a good part of all, products with all are several times faster than gathering rows.
    """
    if len(bank) <= 16 * numbers.shape[1]:
        return (vectors @ bank.clone().T).gather(
            1, numbers
        )  # a clone: the bank changes before the backward pass
    return torch.bmm(bank[numbers], vectors[:, :, None]).squeeze(2)


class _BatchNorm(nn.BatchNorm2d):
    """One value a channel, a single image's 1×1 maps, has no spread: the running statistics are taken instead."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        if maps.numel() > maps.shape[1]:
            return super().forward(maps)
        return F.batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class _Fusion(nn.Module):
    """ReviewKD's attention-based fusion of one stage: its maps with what came from the deeper stages."""

    def __init__(self, channels: int, mid: int, out: int, fuses: bool) -> None:
        super().__init__()
        enter, leave = nn.Conv2d(channels, mid, 1, bias=False), nn.Conv2d(mid, out, 3, padding=1, bias=False)
        for convolution in (enter, leave):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.enter = nn.Sequential(enter, _BatchNorm(mid))
        self.leave = nn.Sequential(leave, _BatchNorm(out))
        self.attention = nn.Conv2d(2 * mid, 2, 1) if fuses else None

    def forward(self, maps: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What is compared, with the teacher's channels, and what the next stage gets; both of the teacher's size."""
        maps = self.enter(maps)
        if self.attention is not None and deeper is not None:
            deeper = _resize(deeper, maps.shape[2:])
            shares = self.attention(torch.cat([maps, deeper], dim=1)).sigmoid()  # (B, 2, H, W)
            maps = maps * shares[:, :1] + deeper * shares[:, 1:]
        maps = _resize(maps, size)
        return self.leave(maps), maps


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="nearest")


class Review(nn.Module):
    """ReviewKD (Chen et al., CVPR 2021): from the deepest stage on, each is fused with those after it and compared.

    The fused maps are brought to the teacher's size (nearest) and channels, then `losses.review`, summed over stages.
    In the authors' code the teacher's maps are taken before the ReLU and the pooled embedding is one more stage; both
    are the caller's choice, an embedding as maps of 1×1.
    """

    def __init__(
        self,
        student_shapes: Sequence[Sequence[int]],
        teacher_shapes: Sequence[Sequence[int]],
        mid: int | None = None,
    ) -> None:
        """Stages from the first to the deepest, equally many, in pairs.

        Args:
            student_shapes, teacher_shapes: (C, H, W) of each stage.
            mid: width in which stages are fused; without, the student's deepest maps', at most 512.
        """
        super().__init__()
        mid = min(512, student_shapes[-1][0]) if mid is None else mid
        last = len(student_shapes) - 1
        self.stages = nn.ModuleList(
            _Fusion(student[0], mid, teacher[0], stage < last)
            for stage, (student, teacher) in enumerate(zip(student_shapes, teacher_shapes, strict=True))
        )

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """Lists of (B, C, H, W), one a stage → ()."""
        deeper: Tensor | None = None
        found = []
        for stage in reversed(range(len(self.stages))):
            student, teacher = pair(student_maps[stage], teacher_maps[stage])
            fused, deeper = self.stages[stage](student, deeper, teacher.shape[2:])
            found.append(losses.review(fused, teacher))
        return torch.stack(found).sum()
