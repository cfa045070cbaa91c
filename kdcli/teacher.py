"""The teacher, run once a view and never again: its logits are kept in files named by all they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcli import augment, models
from kdcli.data import ImageSet, misfit
from kdcli.errors import KdError
from kdcli.events import Note, OnEvent, ignore
from kdcli.files import atomic_path, sha256_file, write_json
from kdcli.models import Classifier
from kdcli.onnx_model import OnnxClassifier

CACHE_VERSION = 1
Anything = Classifier | OnnxClassifier


def load_model(path: Path, threads: int = 0) -> Anything:
    """Any model that gives logits for images: a checkpoint (.pt) or an ONNX file.

    Raises:
        KdError: missing, unreadable, or neither.
    """
    if path.suffix.lower() == ".onnx":
        return OnnxClassifier.load(path, threads)
    return models.load(path)


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
        threads: CPU threads of an ONNX file; 0: all available cores. A checkpoint uses torch's.
        passes: how many times the model was run over a data set since this object was made.
    """

    path: Path
    sha256: str
    cache_dir: Path
    threads: int = 0
    passes: int = 0
    _model: Anything | None = field(default=None, repr=False)

    @classmethod
    def open(cls, path: Path, cache_dir: Path, threads: int = 0) -> Teacher:
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
        return cls(path, sha256_file(path), cache_dir, threads)

    @property
    def model(self) -> Anything:
        """The model, frozen; read at first use."""
        if self._model is None:
            loaded = load_model(self.path, self.threads)
            self._model = freeze(loaded) if isinstance(loaded, Classifier) else loaded
        return self._model

    @property
    def gives_probabilities(self) -> bool:
        """Whether it is an ONNX file that ends in a softmax: its logits are known only up to a shift."""
        return self.path.suffix.lower() == ".onnx" and getattr(self.model, "gives", "") == "probabilities"

    def live(self, dropout: float) -> Classifier:
        """The model for use in each step, with its dropout left on."""
        model = load_model(self.path)
        if not isinstance(model, Classifier):
            raise KdError("--teacher-dropout needs a .pt teacher", "An ONNX file has no dropout.")
        return freeze(model, dropout)

    def check(self, data: ImageSet) -> None:
        """Raise KdError unless the teacher takes these images and knows these classes."""
        model = self.model
        reason = misfit(model.classes, model.input_size, data)
        if reason is None:
            return
        flags = []
        if misfit(model.classes, data.input_size, data) is None:  # only the images' shape is wrong
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
        exact: bool = False,
        task: str = "teacher",
        on_event: OnEvent = ignore,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[npt.NDArray[np.floating[Any]]]:
        """The teacher's logits (N, classes) for each view of a data set, from the cache where they are there.

        A cached file counts only if its SHA-256 is the one in the manifest.

        Args:
            exact: keep float32, for figures: float16 makes ties, which can change an image's first class.

        Returns:
            One array a view, float16 (float32 if `exact`, or where float16 cannot hold the values). Fewer
            than `views` only if `stop()` became true.
        """
        recipe = {
            "cache_version": CACHE_VERSION,
            "teacher": self.sha256,
            "data": data.fingerprint,
            "augment": augment_name,
            "seed": 0 if augment_name == "none" else seed,
            "precision": "32",
            "kept_as": "float32" if exact else "float16",
        }
        fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        folder = self.cache_dir / "teacher" / fingerprint[:32]
        manifest = _read_manifest(folder, recipe)
        found: list[npt.NDArray[np.floating[Any]]] = []
        missing = 0
        for view in range(views):
            kept = _read_view(folder, manifest, view, len(data))
            if kept is None:
                missing += 1
                outputs = self._run_view(data, augment_name, seed, view, views, task, on_event, stop)
                if outputs is None:
                    return found
                kept = outputs if exact else _halved(outputs)
                _write_view(folder, manifest, view, kept)
            found.append(kept)
        if missing == 0:
            on_event(Note(f"{task}: outputs found in {folder.as_posix()}; the teacher is not run"))
        return found

    def _run_view(
        self,
        data: ImageSet,
        augment_name: str,
        seed: int,
        view: int,
        views: int,
        task: str,
        on_event: OnEvent,
        stop: Callable[[], bool],
    ) -> npt.NDArray[np.float32] | None:
        """One pass; None if it was stopped."""
        self.check(data)
        name = f"{task}, view {view + 1} of {views}" if views > 1 else task
        outputs = models.predict(
            self.model,
            data.images,
            task=name,
            on_event=on_event,
            view=lambda images, samples: augment.apply(augment_name, images, seed, view, samples),
            stop=stop,
        )
        if len(outputs) < len(data):
            return None
        self.passes += 1
        if not bool(torch.isfinite(outputs).all()):
            raise KdError(f"teacher {self.path} gives logits that are not finite", "kd validate tells more.")
        values: npt.NDArray[np.float32] = outputs.numpy()
        return values


def _halved(values: npt.NDArray[np.float32]) -> npt.NDArray[np.floating[Any]]:
    """As float16, unless that overflows."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.isfinite(half).all() else values


def teacher_tensor(view: npt.NDArray[np.floating[Any]]) -> Tensor:
    """Cached logits as float32 (N, classes)."""
    return torch.from_numpy(view.astype(np.float32))


def _read_manifest(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["recipe"] == recipe and isinstance(manifest["views"], dict):
            return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"recipe": recipe, "views": {}}


def _view_name(view: int) -> str:
    return f"view-{view:04d}.npy"


def _read_view(
    folder: Path, manifest: dict[str, Any], view: int, count: int
) -> npt.NDArray[np.floating[Any]] | None:
    name = _view_name(view)
    path = folder / name
    try:
        if sha256_file(path) != manifest["views"][name]:
            return None
        values: npt.NDArray[np.floating[Any]] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, KeyError):
        return None
    return values if values.ndim == 2 and len(values) == count else None


def _write_view(
    folder: Path, manifest: dict[str, Any], view: int, values: npt.NDArray[np.floating[Any]]
) -> None:
    name = _view_name(view)
    try:
        with atomic_path(folder / name) as temporary, temporary.open("wb") as handle:
            np.save(handle, values, allow_pickle=False)
        # another run may have added views since this one read the manifest
        manifest["views"] = {**_read_manifest(folder, manifest["recipe"])["views"], **manifest["views"]}
        manifest["views"][name] = sha256_file(folder / name)
        write_json(folder / "manifest.json", manifest)
    except OSError as error:
        raise KdError(
            f"cannot keep the teacher's outputs in {folder}: {error.strerror or error}",
            "Free some space, or choose another --cache-dir.",
        ) from error
