"""Classification of image files."""

import mimetypes
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from kdcli import models
from kdcli.base.config import PredictConfig
from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent, Progress, ignore
from kdcli.base.results import Result
from kdcli.data import decode
from kdcli.data.sources import MAX_MEMBER_BYTES, open_source
from kdcli.data.tree import is_ignored
from kdcli.deploy.onnx_model import OnnxClassifier
from kdcli.models import Classifier

_BATCH = 64


@dataclass(frozen=True)
class Prediction(Result):
    """Most probable classes of one image."""

    image: str  # its path; within an archive, archive and member
    classes: tuple[str, ...]  # names, most probable first
    probabilities: tuple[float, ...]  # of these, in 0–1


def predict(
    model: Classifier | OnnxClassifier,
    paths: Sequence[Path],
    config: PredictConfig,
    *,
    on_event: OnEvent = ignore,
) -> Iterator[Prediction]:
    """Classify image files in the order of `paths`, those of a folder or archive by name.

    Images are fitted to the model as in training: grey or colour, resized and cropped at the centre.
    A KdError if there are no images, one is broken (with `skip_broken` a note), or the preprocessing is unknown.
    """
    for path in paths:
        if not path.exists():
            raise KdError(f"no such file: {path}", "Pass image files, folders or archives of them.")
    images = _images(paths, model, config.skip_broken, on_event)
    done = 0
    while batch := list(islice(images, _BATCH)):
        logits = models.predict_logits(model, np.stack([pixels for _, pixels in batch])).double()
        best = logits.softmax(dim=1).topk(min(config.top_k, logits.shape[1]), dim=1)
        for (name, _), shares, indices in zip(batch, best.values, best.indices, strict=True):
            yield Prediction(name, tuple(model.classes[index] for index in indices), tuple(shares.tolist()))
        done += len(batch)
        on_event(Progress("classifying", done, 0))
    if not done:
        raise KdError(f"no images in {', '.join(map(str, paths))}", decode.FORMATS_READ)


def _images(
    paths: Sequence[Path], model: Classifier | OnnxClassifier, skip_broken: bool, on_event: OnEvent
) -> Iterator[tuple[str, decode.Pixels]]:
    for path in paths:
        for name, content in _files(path):
            try:
                with warnings.catch_warnings(action="ignore"):  # Pillow's, on unusual files
                    pixels = decode.decode(content, name)
            except KdError as error:
                if not skip_broken:
                    raise
                on_event(Note(f"left out: {error.message}"))
                continue
            yield name, decode.fit_to(pixels, name, model.input_size, "the model takes", model.resize)


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of an image file, or of all images in a folder or archive."""
    if path.is_file():
        with path.open("rb") as handle:
            if decode.is_image(handle.read(16), path.name):
                handle.seek(0)
                yield str(path), handle.read(MAX_MEMBER_BYTES)
                return
    try:
        source = open_source(path)
    except KdError as error:
        raise KdError(f"{path} is neither an image nor an archive of images", decode.FORMATS_READ) from error

    def wanted(name: str) -> bool:  # films are larger than any image may be
        kind = mimetypes.guess_type(name)[0] or ""
        return not is_ignored(name) and not kind.startswith(("audio/", "video/"))

    for name, content in source.read(wanted):
        if decode.is_image(content[:16], name):
            yield (path / name).as_posix(), content
