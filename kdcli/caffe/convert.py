"""From Caffe's files to a `Classifier`: read, settle the input size and the preprocessing, join."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcli.base.config import ConvertConfig
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import OnEvent, ignore
from kdcli.base.files import git_blob_sha1_file, sha256_file
from kdcli.caffe import tensorflow
from kdcli.caffe.network import Built, LayerRow, assemble, declared_input, input_channels
from kdcli.caffe.preprocessing import Transform, needs_images, settle, transform_of
from kdcli.caffe.read import Weights, read_caffemodel, read_prototxt, weights_sha256
from kdcli.data import catalog
from kdcli.data.catalog import KnownNetwork
from kdcli.data.preprocess import Preprocess, UInt8Images
from kdcli.models import Classifier, from_checkpoint
from kdcli.models.checkpoint import Checkpoint

# The reference's weights were trained on RGB less the mean image of the train data
_REFERENCE = Transform(mean_file="the reference's mean image", channel_order="rgb")


@dataclass(frozen=True)
class Source:
    """What the files say.

    Attributes:
        path: the model's file.
        kind: `caffe` or `caffe-tensorflow`.
        weights: as in the file, Caffe's layout.
        known: what is on record of these very weights.
        input_size: (H, W, C) where the files or the record tell it.
        channels: of the images, as the first layer's weights tell.
        transform: what the data layers do to pixels.
        build: (H, W, C) → the network with its weights.
    """

    path: Path
    kind: str
    name: str
    sha256: str
    weights_sha256: str
    weights: Weights
    known: KnownNetwork | None
    input_size: tuple[int, int, int] | None
    transform: Transform
    build: Callable[[tuple[int, int, int], OnEvent], Built]
    channels: int = 3

    def needs_images(self, config: ConvertConfig) -> bool:
        """Whether train images are wanted: to fit the preprocessing, or to learn how large images are."""
        return self.input_size is None or needs_images(config.preprocess, self.known, self.transform)


@dataclass(frozen=True)
class Conversion:
    """The classifier, and what it was made of, layer by layer in Caffe's names."""

    classifier: Classifier
    rows: tuple[LayerRow, ...]
    known: KnownNetwork | None


def read(model: Path, config: ConvertConfig) -> Source:
    """Read a caffemodel (with or without prototxt) or a caffe-tensorflow `.npy`.

    Raises:
        KdError: the files are not what they should be, or hold what kd does not know.
    """
    if _is_npy(model):
        if config.prototxt is not None:
            raise UsageError("--prototxt goes with a caffemodel, not with a .npy", "Use --arch.")
        return _read_npy(model, config)
    if config.arch != "auto":
        raise UsageError(
            f"--arch {config.arch} goes with a caffe-tensorflow .npy", "A caffemodel names its layers."
        )
    stored = read_caffemodel(model)
    network = stored.network if config.prototxt is None else read_prototxt(config.prototxt)
    content = weights_sha256(stored.weights)
    known = catalog.KNOWN_NETWORKS.get(stored.sha256) or catalog.KNOWN_WEIGHTS.get(content)
    declared = declared_input(network, stored.weights)
    size = None
    if declared is not None:
        channels, height, width = declared
        size = (height, width, channels)
    elif known is not None:
        size = known.input_size
    elif config.image_size:
        size = (config.image_size, config.image_size, input_channels(network, stored.weights))
    folders = [path.parent for path in (config.prototxt, model) if path is not None]
    transform = transform_of(network, folders)
    if transform.is_identity():  # a deploy prototxt has no data layer; the snapshot recorded the trained one
        transform = transform_of(stored.network, folders)

    def build(input_size: tuple[int, int, int], on_event: OnEvent) -> Built:
        height, width, channels = input_size
        return assemble(network, stored.weights, (channels, height, width), on_event)

    return Source(
        path=model,
        kind="caffe",
        name=network.name or stored.network.name or model.stem,
        sha256=stored.sha256,
        weights_sha256=content,
        weights=stored.weights,
        known=known,
        input_size=size,
        transform=transform,
        channels=input_channels(network, stored.weights),
        build=build,
    )


def _is_npy(model: Path) -> bool:
    if not model.is_file():
        return False
    with model.open("rb") as handle:
        return handle.read(6) == b"\x93NUMPY" or model.suffix == ".npy"


def _read_npy(model: Path, config: ConvertConfig) -> Source:
    layers = tensorflow.known_names(tensorflow.read_layers(model))
    weights = tensorflow.caffe_layout(layers)
    content = weights_sha256(weights)
    known = catalog.KNOWN_WEIGHTS.get(content)
    seeds = {file.git_blob_sha1 for file in catalog.DOWNLOADS.get("seed-weights", ())}
    return Source(
        path=model,
        kind="caffe-tensorflow",
        name=model.stem,
        sha256=sha256_file(model),
        weights_sha256=content,
        weights=weights,
        known=known,
        input_size=known.input_size if known else tensorflow.input_size(layers),
        transform=_REFERENCE if git_blob_sha1_file(model) in seeds else Transform(),
        build=lambda input_size, on_event: tensorflow.build(layers, config.arch, input_size),
    )


def to_classifier(
    source: Source,
    config: ConvertConfig,
    *,
    train_images: UInt8Images | None = None,
    classes: tuple[str, ...] | None = None,
    data_label: str | None = None,
    on_event: OnEvent = ignore,
) -> Conversion:
    """Join network, weights and preprocessing.

    Args:
        train_images: uint8 (N, H, W, C), to fit the preprocessing on, and for the size of images where the
            files do not tell it.
        classes: class names of that data, taken if their number is right.
        data_label: what tables call that data.

    Raises:
        KdError: layers, weights, images and preprocessing do not go together.
    """
    size = source.input_size
    if size is None:
        if train_images is None:
            raise KdError(
                f"{source.path} does not say how large its images are",
                "Name their side with --image-size, data of that size with --data, or a deploy prototxt.",
            )
        _, height, width, channels = train_images.shape
        size = (height, width, channels)
    built = source.build(size, on_event)
    if built.classes < 2:
        raise KdError(
            f"{source.path} gives one number for an image: nothing to tell classes apart by",
            "kd distils classifiers with an output for each of two classes or more.",
        )
    preprocess, data_used = settle(
        config, source.known, source.transform, size=size, images=train_images, on_event=on_event
    )
    names = _class_names(built.classes, classes, source.known)
    provenance: dict[str, Any] = {
        "kind": source.kind,
        "name": source.known.name if source.known else source.name,
        "source": source.path.name,
        "source_sha256": source.sha256,
        "weights_sha256": source.weights_sha256,
        "published": source.known.published if source.known else "",
        "measured": dict(source.known.measured) if source.known else {},
        "preprocess_data": data_label if data_used else None,
    }
    classifier = _join(built, preprocess, names, provenance, source.path)
    return Conversion(classifier, built.rows, source.known)


def convert(
    model: Path,
    config: ConvertConfig,
    *,
    train_images: UInt8Images | None = None,
    classes: tuple[str, ...] | None = None,
    data_label: str | None = None,
    on_event: OnEvent = ignore,
) -> Conversion:
    """`read` and `to_classifier` in one step."""
    return to_classifier(
        read(model, config),
        config,
        train_images=train_images,
        classes=classes,
        data_label=data_label,
        on_event=on_event,
    )


def _join(
    built: Built, preprocess: Preprocess, names: tuple[str, ...], provenance: dict[str, Any], path: Path
) -> Classifier:
    stored = Checkpoint(
        arch=built.arch,
        arch_args=built.arch_args,
        state_dict=built.state,
        preprocess=preprocess.spec(),
        classes=names,
        input_size=built.input_size,
        provenance=provenance,
    )
    classifier = from_checkpoint(stored, str(path))
    _check_preprocess(classifier)
    return classifier


def _check_preprocess(classifier: Classifier) -> None:
    blank = torch.zeros((1, *classifier.input_size), dtype=torch.uint8)
    try:
        with torch.inference_mode():
            prepared = classifier.prepare(blank)
    except RuntimeError as error:
        raise KdError(f"the preprocessing does not fit images of {classifier.input_size}: {error}") from error
    height, width, channels = classifier.input_size
    if tuple(prepared.shape) != (1, channels, height, width):
        raise KdError(f"the preprocessing makes {tuple(prepared.shape)} of images of {classifier.input_size}")


def _class_names(count: int, given: tuple[str, ...] | None, known: KnownNetwork | None) -> tuple[str, ...]:
    if known is not None and len(known.classes) == count:
        return known.classes
    if given is not None and len(given) == count:
        return given
    return tuple(str(number) for number in range(count))
