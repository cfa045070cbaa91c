"""What the teacher says of each batch: kept from its views, or asked in each step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcli import models
from kdcli.base.errors import Interrupted, KdError
from kdcli.base.events import Note, OnEvent
from kdcli.base.runtime import StopFlag, World
from kdcli.data import ImageSet, rows
from kdcli.engine.feed import Inputs
from kdcli.engine.output import Output
from kdcli.engine.plan import cache_mode
from kdcli.methods import Features, Objective, Shapes, TrainConfig
from kdcli.models import checkpoint
from kdcli.teacher import CachedLogits, LiveTeacher, Teacher

Int64 = npt.NDArray[np.int64]


class Targets:
    """The teacher's side of a run. A run that weighs no teacher's term has one that gives nothing.

    Attributes:
        teacher: None without one; several are one, too.
        stages: names of the teacher's submodules whose maps are read; empty where the method reads logits alone.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: Objective,
        train: ImageSet,
        test: ImageSet,
        pool: Int64,
        world: World,
        on_event: OnEvent,
        stop: StopFlag,
    ) -> None:
        """Find the teacher's file, without reading it; `pool` are the samples of `train` that are trained on.

        Raises:
            KdError: there is no such file.
        """
        self.config = config
        self.method = method
        self.train = train
        self.test = test
        self.pool = pool
        self.world = world
        self.on_event = on_event
        self.stop = stop
        self.teacher = self._open() if method.needs_teacher else None
        self.live: LiveTeacher | None = None
        self.views: Sequence[CachedLogits] = ()
        self.stages: tuple[str, ...] = ()

    def _open(self) -> Teacher:
        config = self.config
        return Teacher.open(
            config.teacher,
            config.cache_dir,
            weights=config.teacher_weight,
            threads=config.threads or torch.get_num_threads(),
            world=self.world,
            precision=config.teacher_precision,
            top_k=config.cache_top_k,
        )

    def prepare(self) -> None:
        """Make what training needs: the views that are not there yet, or the teacher itself.

        Raises:
            KdError: the teacher does not fit the data or the method.
            Interrupted: stopped; the views that are whole are kept.
        """
        if self.teacher is None:
            return
        config, mode = self.config, cache_mode(self.config)
        if self.method.regresses and self.teacher.gives_probabilities:
            named = " and ".join(str(path) for path in config.teacher)
            raise KdError(
                f"teacher {named} gives probabilities, and method {config.method} regresses logits",
                "Use --method kd, or a teacher that gives logits.",
            )
        if mode == "off":
            self.teacher.check(self.train)
            if self.method.needs_features:
                self.stages = self.teacher.stages(self._example(), config.teacher_stages)
            self.live = self.teacher.live(
                dropout=config.teacher_dropout,
                seed=config.seed,
                precision=config.teacher_precision,
                stages=self.stages,
            )
            return
        count = 1 if mode == "fixed" else config.views
        self.views = self.teacher.logits(
            self.train,
            augment_name="none" if mode == "fixed" else config.augment,
            seed=config.augment_seed,
            views=count,
            pool=self.pool,
            task="teacher on train images",
            on_event=self.on_event,
            stop=lambda: bool(self.stop),
        )
        if len(self.views) < count:
            raise Interrupted(
                f"stopped after {len(self.views)} of {count} views of the teacher; they are kept",
                "Type the same command again.",
                exit_code=self.stop.exit_code,
            )

    def note_other_networks(self, arch: str) -> None:
        """Say so where the method wants a teacher of the student's own network, and one is of another."""
        if self.teacher is None or not self.method.same_network or not self.world.first:
            return
        for path in self.config.teacher:
            found = checkpoint.load(path).arch if path.suffix.lower() == ".pt" else arch
            if found != arch:
                networks = f"teacher {path.as_posix()} is {found}, the student {arch}"
                text = f"{networks}: {self.config.method} is meant for one network, and is plain distillation here"
                self.on_event(Note(text))

    def _example(self) -> Tensor:
        """Two raw images, uint8 (2, H, W, C), to try a network with."""
        return torch.from_numpy(rows.take(self.train.images, self.pool[:1].repeat(2)))

    def shapes(self) -> Shapes:
        """Of the teacher's features."""
        assert self.live is not None
        images = self._example().to(self.world.device)
        return shapes_of(self.live.features(images, 0, self.pool[:1].repeat(2)))

    def output_for(self, network: nn.Module) -> Output | None:
        """The scale a student regresses in; None where it needs none, or cannot be given one."""
        if not self.views or not self.method.regresses or models.final_linear(network) is None:
            return None
        return Output.of(self.views[0], self.pool, self.world.device)

    def of(self, inputs: Inputs, epoch: int) -> tuple[Tensor | None, Features | None]:
        """Logits (B, C) for a batch, and features where they are read; None without a teacher."""
        if self.views:
            logits = self.views[epoch % len(self.views)].logits(inputs.samples)
            return logits.to(self.world.device, non_blocking=True), None
        if self.live is None:
            return None, None
        if self.stages:
            logits, maps, embedding = self.live.features(inputs.images, epoch, inputs.samples)
            return logits, Features(maps, embedding)
        return self.live(inputs.images, epoch, inputs.samples).to(self.world.device), None

    def on_test(self, teacher: Teacher) -> Tensor | None:
        """The teacher's logits (N, C) for the test images; None if stopped before they were there."""
        kept = teacher.logits(
            self.test,
            exact=True,
            task="teacher on test images",
            on_event=self.on_event,
            stop=lambda: bool(self.stop),
        )
        return kept[0].logits() if kept else None


def shapes_of(found: tuple[Tensor, Sequence[Tensor], Tensor]) -> Shapes:
    """Of what a network with features gave: logits, maps, embedding."""
    _, maps, embedding = found
    sizes = [stage.shape[1:] for stage in maps]
    return Shapes(tuple((channels, height, width) for channels, height, width in sizes), embedding.shape[1])
