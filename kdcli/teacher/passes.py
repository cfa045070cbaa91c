"""A pass of one model over a data set: the views that are not in its cache."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import Timeout
from torch import Tensor

from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent, Progress
from kdcli.base.runtime import World
from kdcli.data import ImageSet
from kdcli.teacher import cache as caches
from kdcli.teacher.cache import LogitCache
from kdcli.teacher.member import Member
from kdcli.teacher.runner import Engine, Forward, choose_engine, forward_of

_POLL_S = 0.5  # between looks whether another run has finished a view


@dataclass
class TeacherPass:
    """Computes the missing views of a cache, together with the other processes of this run and with other runs.

    Attributes:
        member: the model; its `passes` count the views that were computed.
        world: the processes of this run, which share the parts of a view.
        precision: `auto`, `32` or `bf16`.
        views: how many views are wanted, from 0.
        make_view: number of a view and samples → images uint8 (B, H, W, C).
        task: name of the pass in messages.
        stop: whether to stop between batches; complete parts are kept.
        computed: number of views that this run computed.
    """

    member: Member
    world: World
    precision: str
    cache: LogitCache
    data: ImageSet
    views: int
    make_view: Callable[[int, npt.NDArray[np.int64]], Tensor]
    task: str
    on_event: OnEvent
    stop: Callable[[], bool]
    computed: int = 0
    _engine: Engine | None = None
    _forward: Forward | None = None

    def run(self) -> list[npt.NDArray[Any]]:
        """All views in order; fewer if stopped."""
        found: dict[int, npt.NDArray[Any]] = {}
        self._find(found)
        missing = self.world.broadcast([view for view in range(self.views) if view not in found])
        waiting = False
        while missing and not any(self.world.all_max(int(self.stop()))):
            finished = []
            for view in missing:
                with ExitStack() as stack:
                    if not self.world.broadcast(self._locked(view, stack)):
                        continue
                    if self.world.broadcast(self.cache.find(view) is None) and not self._compute(view):
                        break  # stopped
                finished.append(view)
            missing = [view for view in missing if view not in finished]
            if missing and not finished and not any(self.world.all_max(int(self.stop()))):
                if not waiting:
                    self.on_event(
                        Note(f"{self.task}: another run is computing what is missing; waiting for it")
                    )
                waiting = True
                time.sleep(_POLL_S)
        self._find(found)
        return [found[view] for view in range(self.views) if view in found]

    def _find(self, found: dict[int, npt.NDArray[Any]]) -> None:
        """Add the views that are in the cache."""
        for view in range(self.views):
            if view not in found and (stored := self.cache.find(view)) is not None:
                found[view] = stored

    def _locked(self, view: int, stack: ExitStack) -> bool:
        """Whether this run may compute the view now; only the first process holds the lock."""
        if not self.world.first:
            return False
        try:
            stack.enter_context(self.cache.lock(view))
        except Timeout:
            return False
        return True

    def _compute(self, view: int) -> bool:
        """Compute and store one view; False if stopped before it was complete."""
        world, cache = self.world, self.cache
        engine = self._prepare()
        ran = False
        while True:  # again if a part was damaged meanwhile
            missing = world.broadcast(cache.missing_parts(view))
            ran = ran or bool(missing)
            mine = missing[world.rank :: world.size]
            done = len(self.data) - sum(self._part_size(part) for part in missing)
            stopped = False
            for part in mine:
                logits = self._part_logits(view, part, done, len(missing) / len(mine))
                if logits is None:
                    stopped = True
                    break
                cache.write_part(view, part, logits)
                done += round(self._part_size(part) * len(missing) / len(mine))
            if any(world.all_max(int(stopped))):
                return False
            if world.broadcast(world.first and cache.finish(view, asdict(engine))):
                self.computed += 1
                self.member.passes += int(ran)
                return True

    def _part_size(self, part: int) -> int:
        return min(caches.PART, len(self.data) - part * caches.PART)

    def _prepare(self) -> Engine:
        """Check the model and choose its engine, once."""
        if self._engine is None:
            self.member.check(self.data)
            chosen = None
            if self.world.first:
                chosen = choose_engine(
                    self.member.model,
                    lambda count: self.make_view(0, np.arange(min(count, len(self.data)))),
                    count=len(self.data) * self.views // self.world.size,
                    precision=self.precision,
                    threads=self.member.threads,
                    on_event=self.on_event,
                )
            self._engine = self.world.broadcast(chosen)
            assert self._engine is not None
            self._forward = forward_of(self.member.model, self._engine, self.member.threads)
        return self._engine

    def _part_logits(
        self, view: int, part: int, done: int, processes: float
    ) -> npt.NDArray[np.float32] | None:
        """Logits of one part; None if stopped."""
        assert self._engine is not None
        assert self._forward is not None
        name = f"{self.task}, view {view + 1} of {self.views}" if self.views > 1 else self.task
        first, size = part * caches.PART, self._part_size(part)
        outputs: list[Tensor] = []
        with torch.inference_mode():
            for start in range(first, first + size, self._engine.batch_size):
                if self.stop():
                    return None
                samples = np.arange(start, min(start + self._engine.batch_size, first + size))
                images = self.make_view(view, samples)
                if self._engine.name != "torch":
                    images = images.cpu()
                outputs.append(self._forward(images).cpu())
                seen = min(len(self.data), done + round((int(samples[-1]) + 1 - first) * processes))
                self.on_event(Progress(name, seen, len(self.data)))
        logits = torch.cat(outputs)
        if not bool(torch.isfinite(logits).all()):
            raise KdError(
                f"teacher {self.member.path} gives logits that are not finite", "kd validate tells more."
            )
        values: npt.NDArray[np.float32] = logits.numpy()
        return values
