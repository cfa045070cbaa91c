"""A model of a teacher, and its pass over a data set: the views that are not in its cache."""

import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import Timeout
from torch import Tensor, nn

from kdcli.base.config import NO_ASSUMPTIONS, InputSettings
from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent, Progress
from kdcli.base.runtime import World
from kdcli.data import ImageSet, incompatibility, other_classes
from kdcli.deploy.load import dependency_hashes, load_model, with_classes
from kdcli.models import Classifier
from kdcli.models.class_map import HINT
from kdcli.teacher import assumptions
from kdcli.teacher import cache as caches
from kdcli.teacher.cache import LogitCache
from kdcli.teacher.runner import Engine, Forward, choose_engine, forward_of

_POLL_S = 0.5  # between looks whether another run has finished a view


def freeze(model: Classifier, dropout: float = 0.0) -> Classifier:
    """Put a classifier into eval mode without gradients.

    With `dropout` above 0 the network's dropout layers stay on at this rate (Sau & Balasubramanian 2016); a KdError
    without such layers.
    """
    model.eval().requires_grad_(False)
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    if dropout > 0 and not layers:
        raise KdError(
            "--teacher-dropout: this teacher has no dropout layers", "Leave it out, or set it to 0."
        )
    for layer in layers if dropout > 0 else ():
        layer.p = dropout
        layer.train()
    return model


@dataclass
class Member:
    """A model of a teacher; its file is read when the model is first used, and must still have its SHA-256."""

    path: Path
    sha256: str  # of the file, which holds weights and preprocessing; outputs are cached under it
    weight: float  # of its logits in the teacher's mean; all weights sum to 1
    device: torch.device
    threads: int
    assumed: InputSettings = NO_ASSUMPTIONS  # class map, and what an ONNX file of another program leaves open
    data: ImageSet | None = None  # whose classes it gives, and whose sides it takes where its own are open
    views_computed: int = 0  # number of views of data sets that it was run over
    _model: Any = field(default=None, repr=False)
    _noted: bool = False

    @cached_property
    def dependencies(self) -> list[str]:
        """SHA-256 of the further files that its outputs depend on, as of the first use."""
        return dependency_hashes(self.path, self.assumed)

    @property
    def model(self) -> Any:
        """The frozen classifier on its device, or an ONNX model."""
        if self._model is None:
            self._model = self.load()
        return self._model

    def load(self, dropout: float = 0.0) -> Any:
        """Read the file, see `model` and `freeze`; a KdError if it is another one than before."""
        size = None if self.data is None else self.data.input_size
        loaded = load_model(self.path, self.threads, self.assumed, size)
        self.check_unchanged(loaded.file_sha256)
        if self.data is not None:
            loaded = with_classes(loaded, self.data.classes, self.assumed.class_map)
        if isinstance(loaded, Classifier):
            if loaded.any_size:
                loaded.input_size = size or loaded.input_size
            return freeze(loaded, dropout).to(self.device)
        if dropout > 0:
            raise KdError("--teacher-dropout needs a .pt teacher", "Other files have no dropout layers.")
        return loaded

    def check_unchanged(self, sha256: str) -> None:
        """Raise KdError unless the file, now with this SHA-256, and those of its classes are the same as before."""
        if (sha256, dependency_hashes(self.path, self.assumed)) != (self.sha256, self.dependencies):
            raise KdError(
                f"teacher {self.path} or its list of classes was replaced while it was in use",
                "Put the earlier file back to continue a run; a new run takes the file that is there.",
            )

    def check(self, data: ImageSet, on_event: OnEvent, *, measured: bool) -> None:
        """Raise KdError unless the model takes these images and knows these classes; another --resize is a note.

        With `measured` it is also run on a sample of the images, see `assumptions.check`.
        """
        self._model = model = with_classes(self.model, data.classes, self.assumed.class_map)
        problem = incompatibility(model, data)
        if problem is None:
            if model.resize != data.resize and not model.is_foreign:
                sides = (max(each.resize, each.input_size[0]) for each in (model, data))
                text = "teacher {} is recorded with --resize {}, these images with --resize {}: logits may be worse"
                on_event(Note(text.format(self.path, *sides)))
            if not self._noted:
                assumptions.note_order(f"teacher {self.path}", model, data, on_event)
            self._noted = True
            if measured:
                task = "teacher on a sample"
                assumptions.check(f"teacher {self.path}", model, data, on_event, task=task, strict=True)
            return
        flags, hint = [], "Teacher and data must belong together."
        if other_classes(model, data) is not None:
            hint = HINT
        else:  # only the images' shape is wrong
            height, width, channels = model.input_size
            flags += ["--grey"] if (channels, data.input_size[2]) == (1, 3) else []
            resizable = height == width and (height, width) != data.input_size[:2]
            same_channels = bool(flags) or channels == data.input_size[2]
            flags += [f"--image-size {height}"] if resizable and same_channels else []
        raise KdError(
            f"teacher {self.path} {problem}",
            f"Try {' '.join(flags)}." if flags else hint,
        )


@dataclass
class TeacherPass:
    """Computes the missing views of a cache, together with the other processes of this run and with other runs.

    `make_view` makes images uint8 (B, H, W, C) from the number of a view and samples.
    """

    member: Member
    world: World  # the processes of this run, which share the parts of a view
    precision: str  # `auto`, `32` or `bf16`
    cache: LogitCache
    data: ImageSet
    views: int  # number of views wanted
    make_view: Callable[[int, npt.NDArray[np.int64]], Tensor]
    task: str  # name of the pass in messages
    on_event: OnEvent
    stop: Callable[[], bool]  # whether to stop between batches; complete parts are kept
    measured: bool = False  # whether the model is measured on a sample before, see `Member.check`

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
                    text = "another run is computing what is missing; waiting for it"
                    self.on_event(Note(f"{self.task}: {text}"))
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
        engine = self._engine
        missing = self.world.broadcast(self.cache.missing_parts(view))
        mine = missing[self.world.rank :: self.world.size]
        done = len(self.data) - sum(len(self._samples(part)) for part in missing)
        stopped = False
        for part in mine:
            logits = self._part_logits(view, part, done, len(missing) / len(mine))
            if logits is None:
                stopped = True
                break
            self.cache.write_part(view, part, logits)
            done += round(len(logits) * len(missing) / len(mine))
        if any(self.world.all_max(int(stopped))):
            return False
        if self.world.first:
            self.cache.finish(view, asdict(engine))
        self.world.barrier()
        self.member.views_computed += 1
        return True

    def _samples(self, part: int) -> range:
        return range(part * caches.PART, min((part + 1) * caches.PART, len(self.data)))

    @cached_property
    def _engine(self) -> Engine:
        """The engine, chosen for the checked model by the first process."""
        self.member.check(self.data, self.on_event, measured=self.measured and self.world.first)
        return self.world.from_first(
            lambda: choose_engine(
                self.member.model,
                lambda count: self.make_view(0, np.arange(min(count, len(self.data)))),
                count=len(self.data) * self.views // self.world.size,
                precision=self.precision,
                threads=self.member.threads,
                on_event=self.on_event,
            )
        )

    @cached_property
    def _forward(self) -> Forward:
        return forward_of(self.member.model, self._engine, self.member.threads)

    def _part_logits(
        self, view: int, part: int, done: int, processes: float
    ) -> npt.NDArray[np.float32] | None:
        """Logits of one part; None if stopped."""
        name = f"{self.task}, view {view + 1} of {self.views}" if self.views > 1 else self.task
        part_samples, size = np.array(self._samples(part)), self._engine.batch_size
        outputs: list[Tensor] = []
        with torch.inference_mode():
            for start in range(0, len(part_samples), size):
                if self.stop():
                    return None
                samples = part_samples[start : start + size]
                outputs.append(self._forward(self.make_view(view, samples)).cpu())
                seen = done + round((start + len(samples)) * processes)
                self.on_event(Progress(name, min(len(self.data), seen), len(self.data)))
        logits = torch.cat(outputs)
        if not bool(torch.isfinite(logits).all()):
            raise KdError(
                f"teacher {self.member.path} gives logits that are not finite",
                f"Examine it: kd validate --teacher {shlex.quote(self.member.path.as_posix())}",
            )
        return logits.numpy()
