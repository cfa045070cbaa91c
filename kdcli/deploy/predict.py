"""What a model sees in image files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

Pixels = npt.NDArray[np.uint8]
_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image.

    Attributes:
        image: its path; within an archive, archive and member.
        classes: names, most probable first.
        probabilities: of these, in 0–1.
    """

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    model: Classifier | OnnxClassifier,
    paths: Sequence[Path],
    config: PredictConfig,
    *,
    on_event: OnEvent = ignore,
) -> Iterator[Prediction]:
    """Classify image files, in the order of `paths`, those of a folder or archive by name.

    Images become what the model takes as in training: grey or colour, the middle square, its size.

    Raises:
        KdError: no such file, not an image (with `skip_broken` a note), none at all, or a model that cannot be
            given images.
    """
    for path in paths:
        if not path.exists():
            raise KdError(f"no such file: {path}", "Name image files, folders or archives of them.")
    done = 0
    names: list[str] = []
    pixels: list[Pixels] = []
    for name, image in _images(paths, model.input_size, config.skip_broken, on_event):
        names.append(name)
        pixels.append(image)
        if len(pixels) == _BATCH:
            yield from _classified(model, names, pixels, config.top_k)
            done += len(pixels)
            on_event(Progress("classifying", done, 0))
            names, pixels = [], []
    if pixels:
        yield from _classified(model, names, pixels, config.top_k)
    if done + len(pixels) == 0:
        raise KdError(f"no images in {', '.join(map(str, paths))}", "PNG, JPEG, WebP and BMP files are read.")


def _classified(
    model: Classifier | OnnxClassifier, names: Sequence[str], pixels: Sequence[Pixels], top_k: int
) -> Iterator[Prediction]:
    with torch.inference_mode():
        logits = model(torch.from_numpy(np.stack(pixels))).double()
        best = logits.softmax(dim=1).topk(min(top_k, logits.shape[1]), dim=1)
    for name, shares, numbers in zip(names, best.values.tolist(), best.indices.tolist(), strict=True):
        yield Prediction(name, tuple(model.classes[number] for number in numbers), tuple(shares))


def _images(
    paths: Sequence[Path], size: tuple[int, int, int], skip_broken: bool, on_event: OnEvent
) -> Iterator[tuple[str, Pixels]]:
    for path in paths:
        for name, data, named in _files(path):
            if (
                not named
                and not decode.is_image(data[:16])
                and Path(name).suffix.lower() not in decode.SUFFIXES
            ):
                continue  # what else lies in a folder
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of Pillow, on odd files: what matters is an error
                    pixels = decode.decode(data, name)
            except KdError as error:
                if not skip_broken:
                    raise
                on_event(Note(f"left out: {error.message}"))
                continue
            yield name, decode.fit_to(pixels, name, size, "the model takes")


def _files(path: Path) -> Iterator[tuple[str, bytes, bool]]:
    """Name, content, and whether the user named this very file."""
    if path.is_file() and _is_image_file(path):
        yield str(path), path.read_bytes(), True
        return
    try:
        source = open_source(path)
    except KdError as error:
        raise KdError(
            f"{path} is neither an image nor an archive of images", "PNG, JPEG, WebP and BMP files are read."
        ) from error
    for name, data in source.read(_may_be_image):
        yield (path / name).as_posix(), data, False


def _may_be_image(name: str) -> bool:
    return not is_ignored(name) and Path(name).suffix.lower() in ("", *decode.SUFFIXES)


def _is_image_file(path: Path) -> bool:
    if path.stat().st_size > MAX_MEMBER_BYTES:
        return False
    with path.open("rb") as handle:
        return decode.is_image(handle.read(16)) or path.suffix.lower() in decode.SUFFIXES
