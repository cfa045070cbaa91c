"""From Caffe's files to a `Classifier`: read them, decide input size and preprocessing, build."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcli.base.config import ConvertConfig
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import OnEvent, ignore
from kdcli.base.files import git_blob_sha1_file, sha256_file
from kdcli.caffe import tensorflow
from kdcli.caffe.blobs import weights_sha256
from kdcli.caffe.network import ConvertedLayer, ConvertedNetwork, assemble, declared_size, input_channels
from kdcli.caffe.preprocessing import FITTED, Transform, choose_kind, make_preprocess, transform_of
from kdcli.caffe.read import read_caffemodel, read_prototxt
from kdcli.data import catalog
from kdcli.data.catalog import KnownNetwork
from kdcli.data.rows import Images
from kdcli.models import Classifier, from_checkpoint
from kdcli.models.checkpoint import Checkpoint

# The reference's weights were trained on RGB less the mean image of the train data
_REFERENCE = Transform(mean_file="the reference's mean image", channel_order="rgb")


@dataclass(frozen=True)
class CaffeFiles:
    """The content of the files, before input size and preprocessing are decided.

    Attributes:
        path: the model's file.
        kind: `caffe` or `caffe-tensorflow`.
        known: the catalogue's entry for these weights.
        input_size: (H, W, C), or None where neither the files nor the catalogue gives it.
        channels: of the images, from the first layer's weights.
        transform: what the data layers do to pixels.
        build: (H, W, C), on_event → the network with its weights.
    """

    path: Path
    kind: str
    name: str
    sha256: str
    weights_sha256: str
    known: KnownNetwork | None
    input_size: tuple[int, int, int] | None
    channels: int
    transform: Transform
    build: Callable[[tuple[int, int, int], OnEvent], ConvertedNetwork]

    def fits_preprocessing(self, config: ConvertConfig) -> bool:
        """Whether the preprocessing is fitted on train images."""
        return choose_kind(config.preprocess, self.known, self.transform) in FITTED

    def needs_images(self, config: ConvertConfig) -> bool:
        """Whether train images are required: to fit the preprocessing, or for the input size."""
        return self.input_size is None or self.fits_preprocessing(config)


@dataclass(frozen=True)
class Conversion:
    """The classifier and its layers under Caffe's names."""

    classifier: Classifier
    layers: tuple[ConvertedLayer, ...]
    known: KnownNetwork | None


def read(model: Path, config: ConvertConfig) -> CaffeFiles:
    """Read a caffemodel (with or without prototxt) or a caffe-tensorflow `.npy`.

    Raises:
        KdError: a damaged file, or content that kd does not support.
    """
    if model.suffix == ".npy":
        if config.prototxt is not None:
            raise UsageError("--prototxt goes with a caffemodel, not with a .npy", "Use --arch.")
        return _read_npy(model, config)
    if config.arch != "auto":
        raise UsageError(
            f"--arch {config.arch} goes with a caffe-tensorflow .npy", "A caffemodel names its layers."
        )
    stored = read_caffemodel(model)
    network = stored.network if config.prototxt is None else read_prototxt(config.prototxt)
    digest = weights_sha256(stored.weights)
    known = catalog.KNOWN_WEIGHTS.get(digest)
    channels = input_channels(network, stored.weights)
    size = declared_size(network, channels)
    if size is None and known is not None:
        size = known.input_size
    elif size is None and config.image_size:
        size = (config.image_size, config.image_size, channels)
    folders = [path.parent for path in (config.prototxt, model) if path is not None]
    transform = transform_of(network, folders)
    if transform.is_identity():  # a deploy prototxt has no data layer; the caffemodel records the trained one
        transform = transform_of(stored.network, folders)
    return CaffeFiles(
        path=model,
        kind="caffe",
        name=network.name or stored.network.name or model.stem,
        sha256=stored.sha256,
        weights_sha256=digest,
        known=known,
        input_size=size,
        channels=channels,
        transform=transform,
        build=lambda size, on_event: assemble(network, stored.weights, (size[2], *size[:2]), on_event),
    )


def _read_npy(model: Path, config: ConvertConfig) -> CaffeFiles:
    arch, layers = tensorflow.identify(tensorflow.read_layers(model), config.arch)
    weights = tensorflow.caffe_layout(layers)
    digest = weights_sha256(weights)
    known = catalog.KNOWN_WEIGHTS.get(digest)
    published = {file.git_blob_sha1 for file in catalog.DOWNLOADS.get("seed-weights", ())}
    return CaffeFiles(
        path=model,
        kind="caffe-tensorflow",
        name=model.stem,
        sha256=sha256_file(model),
        weights_sha256=digest,
        known=known,
        input_size=known.input_size if known else tensorflow.input_size(arch, layers),
        channels=layers["conv1"][0].shape[2],
        transform=_REFERENCE if git_blob_sha1_file(model) in published else Transform(),
        build=lambda size, on_event: tensorflow.build(arch, weights, size),
    )


def to_classifier(
    files: CaffeFiles,
    config: ConvertConfig,
    *,
    train_images: Images | None = None,
    classes: tuple[str, ...] | None = None,
    data_label: str | None = None,
    on_event: OnEvent = ignore,
) -> Conversion:
    """Build the classifier from network, weights and preprocessing.

    Args:
        train_images: uint8 (N, H, W, C), to fit the preprocessing on, and for the input size where the files do
            not give it.
        classes: class names of that data, used if their number is the network's.
        data_label: that data's name in tables.

    Raises:
        KdError: layers, weights, images and preprocessing do not fit together.
    """
    # 1. Input size
    size = files.input_size
    if size is None:
        if train_images is None:
            raise KdError(
                f"the image size is not given in {files.path}",
                "Pass --image-size, --data with images of that size, or a deploy prototxt with --prototxt.",
            )
        _, height, width, channels = train_images.shape
        size = (height, width, channels)
    # 2. Network and preprocessing
    built = files.build(size, on_event)
    if built.classes < 2:
        raise KdError(
            f"{files.path} has one output: no classifier",
            "kd distils classifiers with an output for each of two classes or more.",
        )
    preprocess = make_preprocess(
        config, files.known, files.transform, size=size, images=train_images, on_event=on_event
    )
    # 3. Class names and provenance
    numbers = tuple(str(number) for number in range(built.classes))
    candidates = (files.known.classes if files.known else (), classes or (), numbers)
    provenance: dict[str, Any] = {
        "kind": files.kind,
        "name": files.known.name if files.known else files.name,
        "source": files.path.name,
        "source_sha256": files.sha256,
        "weights_sha256": files.weights_sha256,
        "published": files.known.published if files.known else "",
        "measured": dict(files.known.measured) if files.known else {},
        "preprocess_data": data_label if files.fits_preprocessing(config) else None,
    }
    checkpoint = Checkpoint(
        arch=built.arch,
        arch_args=built.arch_args,
        state_dict=built.state,
        preprocess=preprocess.spec(),
        classes=next(names for names in candidates if len(names) == built.classes),
        input_size=built.input_size,
        provenance=provenance,
    )
    return Conversion(from_checkpoint(checkpoint, str(files.path)), built.layers, files.known)
