"""The teacher, run once a view and never again: its logits are kept in files named by all they depend on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import Timeout
from torch import Tensor, nn

from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Note, OnEvent, Progress, ignore
from kdcli.base.files import sha256_file
from kdcli.base.runtime import World
from kdcli.data import ImageSet, augment, incompatibility, rows
from kdcli.deploy.load import load_model
from kdcli.models import Classifier
from kdcli.models.feature_extractor import FeatureExtractor, find_stages
from kdcli.models.reproducible import DropoutKeys, use_sample_dropout
from kdcli.teacher.live import Live
from kdcli.teacher.runner import Plan, Run, choose, run_of
from kdcli.teacher.views import PART, Outputs, ViewStore

__all__ = ["Live", "Outputs", "Teacher", "freeze"]

CACHE_VERSION = 2
_POLL_S = 0.5  # how often it is looked whether another run has finished a view
_STREAM = 1  # of dropout's draws: the student's is 0


def freeze(model: Classifier, dropout: float = 0.0) -> Classifier:
    """Make a teacher: eval mode, no gradients; the one place where this happens.

    Args:
        dropout: above 0, the network's dropout layers stay on at this rate (the reference's teacher).

    Raises:
        KdError: dropout is asked of a network that has none.
    """
    model.eval().requires_grad_(False)
    if dropout > 0:
        layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
        if not layers:
            raise KdError(
                "--teacher-dropout: this teacher has no dropout layers", "Leave it out, or set it to 0."
            )
        for layer in layers:
            layer.p = dropout
            layer.train()
    return model


@dataclass
class Teacher:
    """A teacher's file and the cache of its logits. The model itself is read only when something is missing.

    Attributes:
        path: the checkpoint or ONNX file.
        sha256: of that file: weights and preprocessing.
        cache_dir: logits are kept below `teacher/` in it.
        threads: CPU threads of onnxruntime; 0: all available cores. A checkpoint uses torch's.
        world: the processes a pass is divided among.
        precision: of passes over training images: `auto`, `32` or `bf16`. Figures are always float32.
        top_k: keep only so many logits of each training image; 0: all.
        passes: how many times the model was run over a data set since this object was made.
    """

    path: Path
    sha256: str
    cache_dir: Path
    threads: int = 0
    world: World = field(default_factory=World.alone)
    precision: str = "auto"
    top_k: int = 0
    passes: int = 0
    _model: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, path: Path, cache_dir: Path, threads: int = 0, **settings: Any) -> Teacher:
        """Refer to a teacher without reading it into memory.

        Raises:
            KdError: there is no such file.
        """
        if not path.is_file():
            raise KdError(
                f"no teacher at {path}",
                "kd convert-caffe makes one from a Caffe network, kd train --method ce trains one; "
                "name it with --teacher.",
            )
        return cls(path, sha256_file(path), cache_dir, threads, **settings)

    @property
    def model(self) -> Any:
        """The model, frozen, on this process's device; read at first use."""
        if self._model is None:
            loaded = load_model(self.path, self.threads)
            self._model = freeze(loaded).to(self.world.device) if isinstance(loaded, Classifier) else loaded
        return self._model

    @property
    def gives_probabilities(self) -> bool:
        """Whether it is an ONNX file that ends in a softmax: its logits are known only up to a shift."""
        return self.path.suffix.lower() == ".onnx" and getattr(self.model, "gives", "") == "probabilities"

    def record(self) -> dict[str, Any]:
        """For a student's provenance."""
        return {"path": self.path.as_posix(), "sha256": self.sha256}

    def live(
        self,
        dropout: float = 0.0,
        seed: int = 0,
        precision: str = "32",
        stages: Sequence[str] = (),
        stream: int = _STREAM,
    ) -> Live:
        """The model for use in each step.

        Args:
            dropout: above 0, the network's dropout layers are on at this rate (the reference's teacher).
            precision: `bf16`, or float32.
            stages: names of the submodules whose maps are wanted; without, logits alone are given.
            stream: what tells the draws of its dropout from those of other networks of the run.

        Raises:
            KdError: dropout is asked of a file that has none.
        """
        model, draw = self.model, None
        if dropout > 0:
            model = load_model(self.path)
            if not isinstance(model, Classifier):
                raise KdError("--teacher-dropout needs a .pt teacher", "An ONNX file has no dropout.")
            draw = DropoutKeys(seed, stream)
            use_sample_dropout(freeze(model, dropout).to(self.world.device), draw)
        if not isinstance(model, Classifier):
            return Live(lambda images: model(images.cpu()))
        plain = precision != "bf16"
        run: Run = model if plain else run_of(model, Plan("torch", "bf16"))
        if not stages:
            return Live(run, draw)
        tap = FeatureExtractor(model.network, stages)

        def with_features(images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
            prepared = model.prepare(images)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=not plain):
                found: tuple[Tensor, list[Tensor], Tensor] = tap(prepared)
            return found

        return Live(run, draw, with_features)

    def stages(self, images: Tensor, wanted: str = "") -> tuple[str, ...]:
        """Names of the submodules whose maps methods of features read, see `models.feature_extractor.find_stages`.

        Args:
            images: some, uint8 (B, H, W, C).

        Raises:
            KdError: the teacher is an ONNX file, whose maps cannot be read.
            UsageError: there are none, or not those wanted.
        """
        if not isinstance(self.model, Classifier):
            raise KdError(
                f"teacher {self.path} is an ONNX file, which gives logits and no features",
                "Use a .pt teacher, or a method of logits.",
            )
        try:
            return find_stages(self.model.network, self.model.prepare(images.to(self.world.device)), wanted)
        except UsageError as error:
            raise UsageError(f"teacher {self.path}: {error.message}", error.hint) from error

    def check(self, data: ImageSet) -> None:
        """Raise KdError unless the teacher takes these images and knows these classes."""
        model = self.model
        reason = incompatibility(model.classes, model.input_size, data)
        if reason is None:
            return
        flags = []
        if incompatibility(model.classes, data.input_size, data) is None:  # only the images' shape is wrong
            height, width, channels = model.input_size
            flags += ["--grey"] if (channels, data.input_size[2]) == (1, 3) else []
            sized = height == width and (height, width) != data.input_size[:2]
            flags += [f"--image-size {height}"] if sized and (flags or channels == data.input_size[2]) else []
        raise KdError(
            f"teacher {self.path} {reason}",
            f"Try {' '.join(flags)}." if flags else "Teacher and data must belong together.",
        )

    def logits(
        self,
        data: ImageSet,
        *,
        augment_name: str = "none",
        seed: int = 0,
        views: int = 1,
        pool: npt.NDArray[np.int64] | None = None,
        exact: bool = False,
        task: str = "teacher",
        on_event: OnEvent = ignore,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Outputs]:
        """The teacher's logits for each view of a data set, from the cache where they are there.

        A cached file counts only if its SHA-256 is the one in the manifest. A pass is divided among the processes
        of this run, kept part by part, and shared with other runs that need the same views: each view is made by
        the run that holds its lock, and the lock of a run that was killed is free.

        Args:
            pool: samples that an augmentation may mix in; by default all.
            exact: keep float32 of all classes, for figures: float16 makes ties, which can change an image's first
                class.

        Returns:
            One for each view. Fewer than `views` only if `stop()` became true.
        """
        chosen = np.arange(len(data)) if pool is None else pool
        mixes = augment.mixing(augment_name, 0, 0, chosen[:1], chosen) is not None
        kept_as = "float32" if exact else f"top-{self.top_k}" if self.top_k else "float16"
        recipe = {
            "cache_version": CACHE_VERSION,
            "teacher": self.sha256,
            "data": data.fingerprint,
            "augment": augment_name,
            "seed": 0 if augment_name == "none" else seed,
            "mixed_in": hashlib.sha256(chosen.tobytes()).hexdigest() if mixes else "",
            "precision": "32" if exact else self.precision,
            "kept_as": kept_as,
        }
        fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        store = ViewStore(
            self.cache_dir / "teacher" / fingerprint[:32],
            recipe,
            count=len(data),
            classes=len(data.classes),
            exact=exact,
            top_k=0 if exact else self.top_k,
        )

        def picture(view: int, samples: npt.NDArray[np.int64]) -> Tensor:
            def take(numbers: npt.NDArray[np.int64]) -> Tensor:
                return torch.from_numpy(rows.take(data.images, numbers)).to(self.world.device)

            return augment.make_view(augment_name, take, seed, view, samples, chosen)

        work = _Pass(self, data, store, views, picture, exact, task, on_event, stop)
        found = work.run()
        if not work.made and len(found) == views:
            on_event(Note(f"{task}: outputs found in {store.folder.as_posix()}; the teacher is not run"))
        return found


@dataclass
class _Pass:
    """The making of those views that are not there."""

    teacher: Teacher
    data: ImageSet
    store: ViewStore
    views: int
    picture: Callable[[int, npt.NDArray[np.int64]], Tensor]
    exact: bool
    task: str
    on_event: OnEvent
    stop: Callable[[], bool]
    made: int = 0
    plan: Plan | None = None
    runs: Run | None = None

    def run(self) -> list[Outputs]:
        """All views in order; fewer if stopped."""
        world = self.teacher.world
        found = self._look(range(self.views))
        missing = [view for view in range(self.views) if view not in found]
        missing = world.broadcast(missing)
        waiting = False
        while missing:
            if any(world.all_max(int(self.stop()))):
                break
            progressed = False
            for view in list(missing):
                with ExitStack() as stack:
                    if not world.broadcast(self._locked(view, stack)):
                        continue
                    if world.broadcast(self.store.find(view) is None) and not self._make(view):
                        missing = []  # stopped
                        break
                missing.remove(view)
                progressed = True
            if missing and not progressed:
                if not waiting:
                    self.on_event(
                        Note(f"{self.task}: another run is computing what is missing; waiting for it")
                    )
                waiting = True
                time.sleep(_POLL_S)
        found = self._look(range(self.views), found)
        return [found[view] for view in range(self.views) if view in found]

    def _look(self, views: range, known: dict[int, Outputs] | None = None) -> dict[int, Outputs]:
        found = dict(known or {})
        for view in views:
            if view not in found and (kept := self.store.find(view)) is not None:
                found[view] = kept
        return found

    def _locked(self, view: int, stack: ExitStack) -> bool:
        """Whether this run may make the view now; only the first process holds the lock."""
        if not self.teacher.world.first:
            return False
        try:
            stack.enter_context(self.store.lock(view))
        except Timeout:
            return False
        return True

    def _make(self, view: int) -> bool:
        """Compute and keep one view; False if stopped before it was whole."""
        teacher, world, store = self.teacher, self.teacher.world, self.store
        self._prepare()
        assert self.plan is not None
        ran = False
        while True:
            missing = world.broadcast(store.missing_parts(view))
            ran = ran or bool(missing)
            mine = missing[world.rank :: world.size]
            done = len(self.data) - sum(self._part_size(part) for part in missing)
            stopped = False
            for part in mine:
                logits = self._run_part(view, part, done, len(missing) / len(mine))
                if logits is None:
                    stopped = True
                    break
                store.write_part(view, part, logits)
                done += round(self._part_size(part) * len(missing) / len(mine))
            if any(world.all_max(int(stopped))):
                return False
            whole = world.broadcast(
                store.finish(view, self.plan.to_json()) is not None if world.first else None
            )
            if whole:
                self.made += 1
                teacher.passes += int(ran)
                return True

    def _part_size(self, part: int) -> int:
        return min(PART, len(self.data) - part * PART)

    def _prepare(self) -> None:
        if self.runs is not None:
            return
        teacher, world = self.teacher, self.teacher.world
        teacher.check(self.data)
        plan = None
        if world.first:
            plan = choose(
                teacher.model,
                lambda count: self.picture(0, np.arange(min(count, len(self.data)))),
                count=len(self.data) * self.views // world.size,
                wanted="32" if self.exact else teacher.precision,
                threads=teacher.threads,
                on_event=self.on_event,
            )
        self.plan = world.broadcast(plan)
        assert self.plan is not None
        self.runs = run_of(teacher.model, self.plan, teacher.threads)

    def _run_part(self, view: int, part: int, done: int, processes: float) -> npt.NDArray[np.float32] | None:
        """Logits of one part; None if stopped."""
        assert self.plan is not None
        assert self.runs is not None
        name = f"{self.task}, view {view + 1} of {self.views}" if self.views > 1 else self.task
        first, size = part * PART, self._part_size(part)
        outputs: list[Tensor] = []
        with torch.inference_mode():
            for start in range(first, first + size, self.plan.batch_size):
                if self.stop():
                    return None
                samples = np.arange(start, min(start + self.plan.batch_size, first + size))
                images = self.picture(view, samples)
                on_cpu = images.cpu() if self.plan.engine != "torch" else images
                outputs.append(self.runs(on_cpu).cpu())
                shown = min(len(self.data), done + round((int(samples[-1]) + 1 - first) * processes))
                self.on_event(Progress(name, shown, len(self.data)))
        logits = torch.cat(outputs)
        if not bool(torch.isfinite(logits).all()):
            raise KdError(
                f"teacher {self.teacher.path} gives logits that are not finite", "kd validate tells more."
            )
        values: npt.NDArray[np.float32] = logits.numpy()
        return values
