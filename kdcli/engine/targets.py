"""Teacher logits for each batch: cached per view, or computed live."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdcli import models
from kdcli.base.errors import Interrupted, KdError
from kdcli.base.events import Note, OnEvent
from kdcli.base.runtime import StopFlag
from kdcli.data import rows
from kdcli.engine.feed import Minibatch
from kdcli.engine.output_scale import OutputScale
from kdcli.engine.plan import RunPlan
from kdcli.methods import Features, Shapes
from kdcli.models import checkpoint
from kdcli.teacher import CachedLogits, LiveTeacher


@dataclass(frozen=True)
class Targets:
    """Source of the teacher's logits and features; empty without a teacher.

    Attributes:
        views: cached logits, cycled over the epochs.
        live: the teacher that runs on each batch.
        stages: names of the teacher's submodules whose maps are read; empty for methods of logits.
    """

    plan: RunPlan
    views: Sequence[CachedLogits] = ()
    live: LiveTeacher | None = None
    stages: tuple[str, ...] = ()

    def teacher_targets(self, batch: Minibatch, epoch: int) -> tuple[Tensor | None, Features | None]:
        """Logits (B, C) for a batch, and features where they are read; None without a teacher."""
        device = self.plan.world.device
        if self.views:
            logits = self.views[epoch % len(self.views)].logits(batch.samples)
            return logits.to(device, non_blocking=True), None
        if self.live is None:
            return None, None
        if self.stages:
            logits, maps, embedding = self.live.features(batch.images, epoch, batch.samples)
            return logits, Features(maps, embedding)
        return self.live(batch.images, epoch, batch.samples).to(device), None

    def feature_shapes(self) -> Shapes:
        """Shapes of the teacher's features."""
        assert self.live is not None
        images = example_images(self.plan).to(self.plan.world.device)
        return shapes_of(self.live.features(images, 0, self.plan.train_samples[:1].repeat(2)))

    def output_scale(self, network: nn.Module) -> OutputScale | None:
        """The scale a student regresses in; None where it needs none, or its last layer is not linear."""
        regresses = self.plan.objective.regresses
        if not self.views or not regresses or models.final_linear(network) is None:
            return None
        return OutputScale.of(self.views[0], self.plan.train_samples, self.plan.world.device)


def make_targets(plan: RunPlan, on_event: OnEvent, stop: StopFlag) -> Targets:
    """Compute the views that are not cached yet, or load the teacher that runs live.

    Raises:
        KdError: the teacher does not fit the data or the method.
        Interrupted: stopped; complete views are kept.
    """
    config, teacher = plan.config, plan.teacher
    if teacher is None:
        return Targets(plan)
    if plan.objective.regresses and teacher.gives_probabilities:
        named = " and ".join(str(path) for path in config.teacher)
        raise KdError(
            f"teacher {named} gives probabilities, and method {config.method} regresses logits",
            "Use --method kd, or a teacher that gives logits.",
        )
    if plan.cache_mode == "off":
        teacher.check(plan.train)
        stages: tuple[str, ...] = ()
        if plan.objective.needs_features:
            stages = teacher.stages(example_images(plan), config.teacher_stages)
        live = teacher.live(
            dropout=config.teacher_dropout,
            seed=config.seed,
            precision=config.teacher_precision,
            stages=stages,
        )
        return Targets(plan, live=live, stages=stages)
    count = 1 if plan.cache_mode == "fixed" else config.views
    views = teacher.logits(
        plan.train,
        augment_name="none" if plan.cache_mode == "fixed" else config.augment,
        seed=config.augment_seed,
        views=count,
        pool=plan.train_samples,
        task="teacher on train images",
        on_event=on_event,
        stop=lambda: bool(stop),
    )
    if len(views) < count:
        raise Interrupted(
            f"stopped after {len(views)} of {count} views of the teacher; they are kept",
            "Type the same command again.",
            exit_code=stop.exit_code,
        )
    return Targets(plan, views)


def warn_of_other_networks(plan: RunPlan, arch: str, on_event: OnEvent) -> None:
    """Note each teacher of another network than the student's `arch`, where the method is meant for one network."""
    if plan.teacher is None or not plan.objective.same_network or not plan.world.first:
        return
    for path in plan.config.teacher:
        found = checkpoint.load(path).arch if path.suffix.lower() == ".pt" else arch
        if found != arch:
            networks = f"teacher {path.as_posix()} is {found}, the student {arch}"
            method = plan.config.method
            on_event(Note(f"{networks}: {method} is meant for one network, and is plain distillation here"))


def test_logits(plan: RunPlan, on_event: OnEvent, stop: StopFlag) -> Tensor | None:
    """The teacher's logits (N, C) for the test images; None without a teacher, or if stopped."""
    if plan.teacher is None:
        return None
    cached = plan.teacher.logits(
        plan.data.test,
        exact=True,
        task="teacher on test images",
        on_event=on_event,
        stop=lambda: bool(stop),
    )
    return cached[0].logits() if cached else None


def example_images(plan: RunPlan) -> Tensor:
    """Two raw images, uint8 (2, H, W, C), to try a network with."""
    return torch.from_numpy(rows.take(plan.train.images, plan.train_samples[:1].repeat(2)))


def shapes_of(outputs: tuple[Tensor, Sequence[Tensor], Tensor]) -> Shapes:
    """Shapes of the outputs of a network with features: logits, maps, embedding."""
    _, maps, embedding = outputs
    sizes = [stage.shape[1:] for stage in maps]
    return Shapes(tuple((channels, height, width) for channels, height, width in sizes), embedding.shape[1])
