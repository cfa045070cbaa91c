"""Classification of image files."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kdcli.base.config import PredictConfig
from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent, Progress, ignore
from kdcli.data import decode
from kdcli.data.sources import MAX_MEMBER_BYTES, open_source
from kdcli.data.tree import is_ignored
from kdcli.deploy.onnx_model import OnnxClassifier
from kdcli.models import Classifier

_Named = tuple[str, npt.NDArray[np.uint8]]
_BATCH = 64
_HINT = "PNG, JPEG, WebP and BMP files are read."


@dataclass(frozen=True)
class Prediction:
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

    Images are fitted to the model as in training: grey or colour, the middle square, its size.

    Raises:
        KdError: no such file, not an image (with `skip_broken` a note), no images, or a model of unknown
            preprocessing.
    """
    for path in paths:
        if not path.exists():
            raise KdError(f"no such file: {path}", "Pass image files, folders or archives of them.")
    images = _images(paths, model.input_size, config.skip_broken, on_event)
    done = 0
    while batch := list(islice(images, _BATCH)):
        with torch.inference_mode():
            logits = model(torch.from_numpy(np.stack([pixels for _, pixels in batch]))).double()
            best = logits.softmax(dim=1).topk(min(config.top_k, logits.shape[1]), dim=1)
        for (name, _), shares, indices in zip(
            batch, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            yield Prediction(name, tuple(model.classes[index] for index in indices), tuple(shares))
        done += len(batch)
        on_event(Progress("classifying", done, 0))
    if not done:
        raise KdError(f"no images in {', '.join(map(str, paths))}", _HINT)


def _images(
    paths: Sequence[Path], size: tuple[int, int, int], skip_broken: bool, on_event: OnEvent
) -> Iterator[_Named]:
    for path in paths:
        for name, content in _files(path):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow's, on unusual files; errors are reported
                    pixels = decode.decode(content, name)
            except KdError as error:
                if not skip_broken:
                    raise
                on_event(Note(f"left out: {error.message}"))
                continue
            yield name, decode.fit_to(pixels, name, size, "the model takes")


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of an image file, or of all images in a folder or archive."""
    if path.is_file() and path.stat().st_size <= MAX_MEMBER_BYTES:
        with path.open("rb") as handle:
            start = handle.read(16)
        if _is_image(start, path.name):
            yield str(path), path.read_bytes()
            return
    try:
        source = open_source(path)
    except KdError as error:
        raise KdError(f"{path} is neither an image nor an archive of images", _HINT) from error
    suffixes = ("", *decode.SUFFIXES)
    for name, content in source.read(
        lambda name: not is_ignored(name) and Path(name).suffix.lower() in suffixes
    ):
        if _is_image(content[:16], name):
            yield (path / name).as_posix(), content


def _is_image(start: bytes, name: str) -> bool:
    return decode.is_image(start) or Path(name).suffix.lower() in decode.SUFFIXES
