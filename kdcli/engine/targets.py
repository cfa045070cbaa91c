"""What the teacher says of each batch: kept from its views, or asked in each step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcli import models
from kdcli.config import TrainConfig
from kdcli.data import Splits
from kdcli.engine.feed import Inputs
from kdcli.engine.output import Output
from kdcli.engine.plan import cache_mode
from kdcli.errors import Interrupted, KdError, UsageError
from kdcli.events import OnEvent
from kdcli.methods import Method
from kdcli.runtime import StopFlag, World
from kdcli.teacher import Live, Outputs, Teacher

Int64 = npt.NDArray[np.int64]


class Targets:
    """The teacher's side of a run. A run that weighs no teacher's term has one that gives nothing.

    Attributes:
        teacher: None without one.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        data: Splits,
        pool: Int64,
        world: World,
        on_event: OnEvent,
        stop: StopFlag,
    ) -> None:
        """Find the teacher's file, without reading it; `pool` are the samples that are trained on.

        Raises:
            KdError: there is no such file, or settings do not go together.
        """
        self.config = config
        self.method = method
        self.data = data
        self.pool = pool
        self.world = world
        self.on_event = on_event
        self.stop = stop
        self.teacher = self._open() if "kd" in method.weights(config) else None
        self.live: Live | None = None
        self.views: list[Outputs] = []

    def _open(self) -> Teacher:
        config, classes = self.config, len(self.data.train.classes)
        if config.cache_top_k and self.method.regresses:
            raise UsageError(
                f"--cache-top-k: method {config.method} regresses all logits",
                "Use --method kd, or leave it out.",
            )
        if config.cache_top_k >= classes:
            raise UsageError(
                f"--cache-top-k {config.cache_top_k}: there are {classes} classes",
                "Leave it out to keep all of them.",
            )
        return Teacher.open(
            config.teacher,
            config.cache_dir,
            config.threads or torch.get_num_threads(),
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
            raise KdError(
                f"teacher {config.teacher} gives probabilities, and method {config.method} regresses logits",
                "Use --method kd, or a teacher that gives logits.",
            )
        if mode == "off":
            self.teacher.check(self.data.train)
            self.live = self.teacher.live(config.teacher_dropout, config.seed)
            return
        count = 1 if mode == "fixed" else config.views
        self.views = self.teacher.logits(
            self.data.train,
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

    def output_for(self, network: nn.Module) -> Output | None:
        """The scale a student regresses in; None where it needs none, or cannot be given one."""
        if not self.views or not self.method.regresses or models.head_of(network) is None:
            return None
        return Output.of(self.views[0], self.pool, self.world.device)

    def of(self, inputs: Inputs, epoch: int) -> Tensor | None:
        """Logits (B, C) for a batch; None without a teacher."""
        if self.views:
            logits = self.views[epoch % len(self.views)].logits(inputs.samples)
            return logits.to(self.world.device, non_blocking=True)
        if self.live is not None:
            return self.live(inputs.images, epoch, inputs.samples).to(self.world.device)
        return None

    def on_test(self, teacher: Teacher) -> Tensor | None:
        """The teacher's logits (N, C) for the test images; None if stopped before they were there."""
        kept = teacher.logits(
            self.data.test,
            exact=True,
            task="teacher on test images",
            on_event=self.on_event,
            stop=lambda: bool(self.stop),
        )
        return kept[0].logits() if kept else None
