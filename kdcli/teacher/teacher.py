"""A teacher: one model, or several whose logits are averaged. Its logits are cached by all they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcli.base.config import NO_ASSUMPTIONS, InputSettings
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Note, OnEvent, ignore
from kdcli.base.files import cache_folder, sha256_file
from kdcli.base.runtime import World
from kdcli.data import ImageSet, augment, rows
from kdcli.deploy.load import kind_of
from kdcli.methods import Features
from kdcli.models import Classifier
from kdcli.models.feature_extractor import FeatureExtractor, find_stages
from kdcli.models.foreign import explain
from kdcli.models.reproducible import DropoutKeys, use_sample_dropout
from kdcli.teacher.cache import CachedLogits, LogitCache, weighted_mean
from kdcli.teacher.member import Member, TeacherPass
from kdcli.teacher.runner import Engine, forward_of, run_in_torch
from kdcli.teacher.stored import only_probabilities, stored_views

_CACHE_VERSION = 4
_ONNX = {"version": 3, "class_names": ""}  # of the reading of ONNX files; class names count by their content


# images uint8 (B, H, W, C), epoch, samples (B,) → the weighted mean of the models' logits, float32 (B, classes), and,
# of one model with named stages, features; without gradient
LiveTeacher = Callable[[Tensor, int, npt.NDArray[np.int64]], tuple[Tensor, Features | None]]


@dataclass
class Teacher:
    """One or several models; a teacher of several gives the weighted mean of their logits."""

    members: tuple[Member, ...]
    cache_dir: Path  # logits are cached in `teacher/` below it, for each model apart
    world: World  # the processes that share a pass
    precision: str  # of passes over training images: `auto`, `32` or `bf16`. Figures are always float32
    top_k: int  # number of logits cached for each training image; 0: all

    @classmethod
    def open(
        cls,
        paths: Path | Sequence[Path],
        cache_dir: Path,
        *,
        weights: Sequence[float] = (),
        threads: int = 0,
        world: World | None = None,
        assumed: InputSettings = NO_ASSUMPTIONS,
        data: ImageSet | None = None,
        precision: str = "auto",
        top_k: int = 0,
    ) -> Teacher:
        """Refer to checkpoints or ONNX files without reading models; a KdError if one is missing.

        Args:
            weights: of each file's logits, in any scale; by default equal.
            assumed: a class map; and what ONNX files of other programs leave open, and checkpoints record.
            data: images that the models are for: their classes, and the sides that such a file leaves open.
        """
        world = world or World.alone()
        files = [paths] if isinstance(paths, Path) else list(paths)
        for path in files:
            if not path.is_file():
                raise explain(path) or KdError(
                    f"no teacher at {path}",
                    "Put it there, or pass another with --teacher.",
                )
        kinds = list(map(kind_of, files))
        if "outputs" in kinds and len(set(kinds)) > 1:
            raise UsageError(
                "--teacher mixes stored logits and models",
                "Store those of each model: kd teacher-logits --teacher FILE",
            )
        hashes = world.from_first(lambda: [sha256_file(path) for path in files])
        given = tuple(weights) or (1.0,) * len(files)
        if assumed.described and "onnx" not in kinds:
            flags = ", ".join(assumed.described)
            raise UsageError(f"{files[0]} records its own input and classes", f"Leave out {flags}.")
        members = tuple(
            Member(
                path,
                sha256,
                weight / sum(given),
                world.device,
                threads,
                assumed if kind == "onnx" else type(assumed)(class_map=assumed.class_map),
                data,
            )
            for path, kind, sha256, weight in zip(files, kinds, hashes, given, strict=True)
        )
        return cls(members, cache_dir, world, precision, top_k)

    @property
    def views_computed(self) -> int:
        """Number of views of data sets that a model was run over."""
        return sum(member.views_computed for member in self.members)

    @property
    def hashes(self) -> dict[Path, str]:
        """SHA-256 of each file."""
        return {member.path: member.sha256 for member in self.members}

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(member.weight for member in self.members)

    @property
    def gives_probabilities(self) -> bool:
        """Whether a member is an ONNX file with a softmax, whose logits are known only up to a shift, or sigmoids.

        Also for stored outputs of such a file, and for the largest logits alone.
        """
        if self.has_stored:
            return any(only_probabilities(each.path) for each in self.members)
        return any(kind_of(each.path) == "onnx" and each.model.gives != "logits" for each in self.members)

    @property
    def has_stored(self) -> bool:
        """Whether the members are stored outputs, which are not there for other images."""
        return kind_of(self.members[0].path) == "outputs"

    def reason_unavailable(self, images: ImageSet) -> str:
        """Reason why stored outputs do not cover these images; empty if the teacher can be evaluated on them."""
        try:
            if self.has_stored:
                self.logits(images)
        except KdError as error:
            return error.message
        return ""

    def record(self) -> dict[str, Any]:
        """Entry in a student's provenance, see `deploy.load.teachers_of`."""
        entries: list[dict[str, Any]] = []
        for member in self.members:
            entry: dict[str, Any] = {"path": member.path.as_posix(), "sha256": member.sha256}
            if member.assumed.given:
                entry["inputs"] = member.assumed.given
            entries.append(entry)
        if len(entries) == 1:
            return entries[0]
        weighted = zip(entries, self.weights, strict=True)
        return {"teachers": [{**entry, "weight": weight} for entry, weight in weighted]}

    def stages(self, images: Tensor, wanted: str = "") -> tuple[str, ...]:
        """Names of the submodules whose maps methods of features read, see `feature_extractor.find_stages`.

        `images` are examples, uint8 (B, H, W, C). A KdError if the teacher is no checkpoint.
        """
        [member] = self.members
        if not isinstance(member.model, Classifier):
            raise KdError(
                f"teacher {member.path} gives logits, but no features",
                "Use a .pt teacher, or a method of logits.",
            )
        prepared = member.model.prepare(images.to(self.world.device))
        return find_stages(member.model.network, prepared, wanted, f"teacher {member.path}")

    def live(
        self, *, dropout: float = 0.0, seed: int = 0, precision: str = "32", stages: Sequence[str] = ()
    ) -> LiveTeacher:
        """The models, to be run on each batch; a KdError if dropout is asked of one without dropout layers.

        `dropout`: rate of the networks' dropout layers; `precision`: `bf16`, else float32; `stages`: maps to be read.
        """
        forwards, dropout_keys = [], []
        for number, member in enumerate(self.members, 1):
            model = member.model
            if dropout > 0:
                model = member.load(dropout)
                dropout_keys.append(DropoutKeys(seed, number))  # the draws of each differ; 0 is the student
                use_sample_dropout(model, dropout_keys[-1])
            engine = Engine("torch", precision) if isinstance(model, Classifier) else Engine("file")
            forwards.append(forward_of(model, engine))
        if stages:  # a teacher of one model, see `stages`
            extract = run_in_torch(model, FeatureExtractor(model.network, stages), precision)

        def run(images: Tensor, epoch: int, samples: npt.NDArray[np.int64]) -> tuple[Tensor, Features | None]:
            for keys in dropout_keys:
                keys.step(epoch, samples, images.device)
            if stages:
                with torch.no_grad():
                    logits, maps, embedding = extract(images)
                    found = Features(tuple(stage.float() for stage in maps), embedding.float())
                    return model.to_classes(logits).float(), found
            with torch.inference_mode():
                parts = [forward(images) for forward in forwards]
            # a copy: inference tensors allow no backward
            return weighted_mean([part.clone() for part in parts], self.weights), None

        return run

    def logits(
        self,
        data: ImageSet,
        *,
        augment_name: str = "none",
        seed: int = 0,
        views: int = 1,
        pool: npt.NDArray[np.int64] | None = None,
        exact: bool = False,
        on_event: OnEvent = ignore,
        stop: Callable[[], bool] = lambda: False,
        measured: bool = False,
    ) -> list[CachedLogits]:
        """Logits for each view of a data set, from the cache, or computed and cached; fewer views only if `stop()`.

        A cached file counts only if its SHA-256 is the one in the manifest. A pass is divided among the processes
        of this run, cached part by part, and shared with other runs that need the same views: each view is made by
        the run that holds its lock, and the kernel frees the lock of a run that was killed.

        Args:
            pool: samples that an augmentation may mix in; by default all.
            measured: before it is run, measure each model on a sample, see `Member.check`.
            exact: these are test images: cache float32 of all classes, as float16 makes ties, which can change a
                top-1 class.
        """
        chosen = np.arange(len(data)) if pool is None else pool

        def make_view(view: int, samples: npt.NDArray[np.int64]) -> Tensor:
            def take(numbers: npt.NDArray[np.int64]) -> Tensor:
                return torch.from_numpy(rows.take(data.images, numbers)).to(self.world.device)

            return augment.make_view(augment_name, take, seed, view, samples, chosen)

        found = []
        for number, member in enumerate(self.members, 1):
            task = f"teacher on {'test' if exact else 'train'} images"
            task += f" ({number} of {len(self.members)})" if len(self.members) > 1 else ""
            precision = "32" if exact else self.precision
            cache = self.cache(member, data, augment_name, seed, chosen, exact=exact)
            if self.has_stored:
                found.append(stored_views(member, cache, data, views, measured=measured))
                continue
            common = (task, on_event, stop, measured)
            before = member.views_computed
            found.append(
                TeacherPass(member, self.world, precision, cache, data, views, make_view, *common).run()
            )
            if len(found[-1]) < views:
                break
            if member.views_computed == before:
                where = cache.folder.as_posix()
                on_event(Note(f"{task}: outputs found in {where}; the teacher is not run"))
        if len(found) < len(self.members):
            return []
        return [CachedLogits(stored, self.weights, cache.classes) for stored in zip(*found, strict=False)]

    def test_logits(
        self, data: ImageSet, on_event: OnEvent = ignore, stop: Callable[[], bool] = lambda: False
    ) -> Tensor | None:
        """Logits float32 (N, classes) of test images; None only if `stop()`."""
        found = self.logits(data, exact=True, on_event=on_event, stop=stop)
        return found[0].logits() if found else None

    def cache(
        self,
        member: Member,
        data: ImageSet,
        augment_name: str,
        seed: int,
        pool: npt.NDArray[np.int64],
        exact: bool,
    ) -> LogitCache:
        """The place of a member's logits for views of a data set."""
        mixes = augment.mixes(augment_name)
        key = {
            "cache_version": _CACHE_VERSION,
            "teacher": member.sha256,
            **({"onnx": {**member.assumed.given, **_ONNX}} if kind_of(member.path) == "onnx" else {}),
            **({"beside": member.dependencies} if member.dependencies else {}),
            **({"torchvision": version("torchvision")} if augment.is_of_torchvision(augment_name) else {}),
            "data": data.fingerprint,
            "augment": augment_name,
            "seed": 0 if augment_name == "none" else seed,
            "mixed_in": hashlib.sha256(pool.tobytes()).hexdigest() if mixes else "",
            "precision": "32" if exact else self.precision,
            "stored_as": "float32" if exact else f"top-{self.top_k}" if self.top_k else "float16",
        }
        return LogitCache(
            cache_folder(self.cache_dir, "teacher", key),
            key,
            count=len(data),
            classes=len(data.classes),
            exact=exact,
            top_k=0 if exact else self.top_k,
        )
