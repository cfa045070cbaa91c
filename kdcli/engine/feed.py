"""Inputs of a step: batches on the training device, and the teacher's outputs for them, cached or live."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcli.base.errors import Interrupted, KdError
from kdcli.base.events import Note, OnEvent
from kdcli.base.runtime import StopFlag
from kdcli.data import ImageSet, augment, rows
from kdcli.engine.plan import RunPlan
from kdcli.methods import Features
from kdcli.models import checkpoint
from kdcli.teacher import CachedLogits, LiveTeacher

Int64 = npt.NDArray[np.int64]
_RESIDENT_SHARE = 0.25  # of a GPU's free memory that images may take for good


@dataclass(frozen=True)
class Minibatch:
    """A process's part of a batch; of mixed images with the partners' labels and the own labels' shares (B,)."""

    samples: Int64  # indices of the images, (B,)
    weight: float  # of its mean loss, see `runtime.World.share`
    count: int  # images in the whole batch, over all processes
    images: Tensor  # uint8 (B, H, W, C)
    labels: Tensor  # int64 (B,)
    other_labels: Tensor | None = None
    shares: Tensor | None = None


@dataclass
class Feed:
    """Batches of an image set; on a GPU prefetched by one batch in a background thread."""

    data: ImageSet
    augment_name: str
    seed: int
    pool: Int64  # samples that an augmentation may mix in
    device: torch.device

    def __post_init__(self) -> None:
        images, device = self.data.images, self.device
        self.labels = torch.tensor(self.data.labels).to(device)
        self.resident: Tensor | None = None
        if device.type == "cuda" and images.nbytes < _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
            self.resident = torch.from_numpy(rows.take(images, slice(None))).to(device)

    def batches(self, view: int, parts: Sequence[tuple[Int64, float, int]]) -> Iterator[Minibatch]:
        """The batches of one epoch in order; each part is samples, weight and count of `Minibatch`."""
        if self.device.type == "cpu":  # all cores work in the step: no work could overlap
            yield from (self.make(view, *part) for part in parts)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
            waiting = [thread.submit(self.make, view, *part) for part in parts[:1]]
            for number in range(len(parts)):
                ready = waiting.pop().result()
                if number + 1 < len(parts):
                    waiting.append(thread.submit(self.make, view, *parts[number + 1]))
                yield ready

    def make(self, view: int, samples: Int64, weight: float, count: int) -> Minibatch:
        """One batch."""
        images = augment.make_view(self.augment_name, self._take, self.seed, view, samples, self.pool)
        return Minibatch(samples, weight, count, images, *self.targets(view, samples))

    def targets(self, view: int, samples: Int64) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Labels, and of mixed images the partners' labels and the own labels' shares; (B,) each."""
        labels = self.labels[torch.from_numpy(samples).to(self.device)]
        size = self.data.input_size[:2]
        mixed = augment.mixing(self.augment_name, self.seed, view, samples, self.pool, size)
        if mixed is None:
            return labels, None, None
        others = self.labels[torch.from_numpy(mixed.partners).to(self.device)]
        return labels, others, torch.from_numpy(mixed.shares).to(self.device)

    def _take(self, samples: Int64) -> Tensor:
        """Raw images uint8 (B, H, W, C), copied from the set, which may be a memory map."""
        if self.resident is not None:
            return self.resident[torch.from_numpy(samples).to(self.device)]
        images = torch.from_numpy(rows.take(self.data.images, samples))
        if self.device.type != "cuda":
            return images.to(self.device)
        return images.pin_memory().to(self.device, non_blocking=True)


@dataclass(frozen=True)
class TeacherOutputs:
    """Source of the teacher's logits and, where `stages` names submodules, features; empty without a teacher."""

    device: torch.device  # of the logits
    views: Sequence[CachedLogits] = ()  # cached logits, cycled over the epochs
    live: LiveTeacher | None = None  # the teacher that runs on each batch
    stages: tuple[str, ...] = ()

    def __call__(self, batch: Minibatch, epoch: int) -> tuple[Tensor | None, Features | None]:
        """Logits (B, C) for a batch, and features where they are read; None without a teacher."""
        if self.views:
            logits = self.views[epoch % len(self.views)].logits(batch.samples)
            return logits.to(self.device, non_blocking=True), None
        if self.live is None:
            return None, None
        found, features = self.live(batch.images, epoch, batch.samples)
        return found.to(self.device), features


def make_teacher_outputs(plan: RunPlan, on_event: OnEvent, stop: StopFlag) -> TeacherOutputs:
    """Compute the views that are not cached yet, or load the teacher that runs live; Interrupted if stopped."""
    config, teacher, device = plan.config, plan.teacher, plan.world.device
    if teacher is None:
        return TeacherOutputs(device)
    if plan.objective.regresses and teacher.gives_probabilities:
        named = " and ".join(str(path) for path in config.teacher)
        raise KdError(
            f"teacher {named} gives probabilities, and method {config.method} regresses logits",
            "Use --method kd, or a teacher that gives logits.",
        )
    if plan.test and (reason := teacher.reason_unavailable(plan.data.test)):
        on_event(Note(f"agreement with the teacher is not measured: {reason}"))
    if plan.cache_mode == "off":
        for member in teacher.members:
            member.check(plan.train, on_event, measured=plan.world.first)
        stages: tuple[str, ...] = ()
        if plan.objective.needs_features:
            stages = teacher.stages(example_images(plan), config.teacher_stages)
        live = teacher.live(
            dropout=config.teacher_dropout,
            seed=config.seed,
            precision=config.teacher_precision,
            stages=stages,
        )
        return TeacherOutputs(device, live=live, stages=stages)
    fixed = plan.cache_mode == "fixed"
    count = 1 if fixed else config.views
    views = teacher.logits(
        plan.train,
        augment_name="none" if fixed else config.augment,
        seed=config.augment_seed,
        views=count,
        pool=plan.train_samples,
        on_event=on_event,
        stop=lambda: bool(stop),
        measured=True,
    )
    if len(views) < count:
        raise Interrupted(
            f"stopped after {len(views)} of {count} views of the teacher; they are kept",
            "Rerun the same command.",
            exit_code=stop.exit_code,
        )
    return TeacherOutputs(device, views)


def note_other_networks(plan: RunPlan, arch: str, on_event: OnEvent) -> None:
    """Note each teacher of another network than the student's `arch`, where the method is meant for one network."""
    if plan.teacher is None or not plan.objective.same_network:
        return
    for path in plan.config.teacher:
        found = checkpoint.load(path).arch if path.suffix.lower() == ".pt" else arch
        if found != arch:
            networks = f"teacher {path.as_posix()} is {found}, the student {arch}"
            method = plan.config.method
            on_event(
                Note(f"{networks}: {method} expects the student's own network; here it is plain distillation")
            )


def example_images(plan: RunPlan) -> Tensor:
    """Two raw images, uint8 (2, H, W, C), to try a network with."""
    return torch.from_numpy(rows.take(plan.train.images, plan.train_samples[:1].repeat(2)))
