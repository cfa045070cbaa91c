"""From Caffe's files to a `Classifier`: read them, decide input size and preprocessing, build."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcli.base.config import ConvertConfig
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Note, OnEvent, ignore
from kdcli.base.files import git_blob_sha1_file, sha256_file
from kdcli.base.text import dims
from kdcli.caffe import tensorflow
from kdcli.caffe.network import ConvertedNetwork, assemble, input_of, transform_params
from kdcli.caffe.read import Array, Network, read_caffemodel, read_mean, read_prototxt, weights_sha256
from kdcli.data import catalog
from kdcli.data.catalog import KnownNetwork
from kdcli.data.decode import checked_resize
from kdcli.data.preprocess import MeanStd, Preprocess, ScaleShift, fit
from kdcli.data.rows import Images
from kdcli.models import Classifier, from_checkpoint
from kdcli.models.checkpoint import Checkpoint

_CROPPED = 128  # networks for such images and larger ones are often published with a centre crop
_FITTED = ("gcn-zca", "mean-std", "mean-image")  # kinds of preprocessing that are fitted on training images


@dataclass(frozen=True)
class Transform:
    """`(x − mean) · scale`, as a data layer declares it; means in the network's channel order.

    `mean_file` names a mean image that is subtracted; `mean_image` is its content where it was found.
    """

    scale: float = 1.0
    mean_values: tuple[float, ...] = ()
    mean_file: str = ""
    mean_image: Array | None = None
    channel_order: str = ""  # `rgb`, `bgr`, or empty where it is unknown

    def is_identity(self) -> bool:
        return self.scale == 1.0 and not self.mean_values and not self.mean_file

    def text(self) -> str:
        """`mean 104,117,123, scale 0.017`."""
        mean = self.mean_file or ",".join(f"{value:g}" for value in self.mean_values)
        return ", ".join([f"mean {mean}"] * bool(mean) + [f"scale {self.scale:g}"] * (self.scale != 1))


# The reference's weights were trained on RGB less the mean image of the train data
_REFERENCE = Transform(mean_file="the reference's mean image", channel_order="rgb")


@dataclass(frozen=True)
class CaffeFiles:
    """The content of the files, before input size and preprocessing are decided.

    Attributes:
        input_size: (H, W, C), or None where neither the files nor the catalogue gives it.
        build: (H, W, C), on_event → the network with its weights.
    """

    path: Path
    kind: str  # `caffe` or `caffe-tensorflow`
    name: str
    weights_sha256: str
    known: KnownNetwork | None  # the catalogue's entry for these weights
    input_size: tuple[int, int, int] | None
    channels: int
    transform: Transform
    build: Callable[[tuple[int, int, int], OnEvent], ConvertedNetwork]

    def preprocess_kind(self, config: ConvertConfig) -> str:
        """The kind of preprocessing: as the options describe it, else the known network's, else the transform's."""
        if config.mean_std is not None:
            return "described"
        if config.preprocess != "auto":
            return config.preprocess
        if self.known is not None:
            return self.known.preprocess
        if self.missing_mean(config):
            return "mean-image"
        return "none" if self.transform.is_identity() else "scale-shift"

    def missing_mean(self, config: ConvertConfig) -> str:
        """The mean file that the preprocessing needs, if it was not found; else empty."""
        replaced = config.mean_std is not None or config.preprocess != "auto" or self.known is not None
        return "" if replaced or self.transform.mean_image is not None else self.transform.mean_file

    @property
    def resize(self) -> int:
        """Pixels of a side before Caffe's crop, where a mean image larger than the input shows them; else 0."""
        mean, size = self.transform.mean_image, self.input_size
        sides = {*mean.shape[1:]} if mean is not None else set()
        if size is None or len(sides) != 1 or size[0] != size[1]:
            return 0
        side = sides.pop()
        return side if size[0] < side <= 4 * size[0] else 0

    def needs_images(self, config: ConvertConfig) -> bool:
        """Whether training images are required: to fit the preprocessing, or for the input size."""
        return self.input_size is None or self.preprocess_kind(config) in _FITTED


def read(model: Path, config: ConvertConfig) -> CaffeFiles:
    """Read a caffemodel or a caffe-tensorflow `.npy`; KdError where kd does not support it."""
    if model.suffix == ".npy":
        if config.prototxt is not None:
            raise UsageError("--prototxt requires a caffemodel", "Use --arch.")
        return _read_npy(model, config)
    if config.arch != "auto":
        raise UsageError(
            f"--arch {config.arch} requires a caffe-tensorflow .npy", "A caffemodel names its layers."
        )
    trained, weights = read_caffemodel(model)
    network = read_prototxt(config.prototxt) if config.prototxt is not None else trained
    digest = weights_sha256(weights)
    known = catalog.KNOWN_WEIGHTS.get(digest)
    size, channels = input_of(network, weights)
    if size is None and known is not None:
        size = known.input_size
    elif size is None and config.image_size:
        size = (config.image_size, config.image_size, channels)
    folders = [path.parent for path in (config.prototxt, model) if path is not None]
    transform = _transform_of(network, folders)
    if transform.is_identity():  # a deploy prototxt has no data layer; the caffemodel records the trained one
        transform = _transform_of(trained, folders)
    return CaffeFiles(
        path=model,
        kind="caffe",
        name=network.name or trained.name or model.stem,
        weights_sha256=digest,
        known=known,
        input_size=size,
        channels=channels,
        transform=transform,
        build=lambda size, on_event: assemble(network, weights, (size[2], *size[:2]), on_event),
    )


def _read_npy(model: Path, config: ConvertConfig) -> CaffeFiles:
    stored = tensorflow.read_layers(model)
    arch, layers = tensorflow.identify(stored, config.arch)
    weights = tensorflow.caffe_layout(layers)
    digest = weights_sha256(weights)
    known = catalog.KNOWN_WEIGHTS.get(digest)
    channels = layers["conv1"][0].shape[2]
    size = known.input_size if known else tensorflow.input_size(arch, layers)
    if size is None and config.image_size:
        size = (config.image_size, config.image_size, channels)

    def build(size: tuple[int, int, int], on_event: OnEvent) -> ConvertedNetwork:
        if config.arch == "auto" and stored.keys() != layers.keys():
            on_event(Note(f"read as {arch} by its kernels alone: another network would give wrong logits"))
        return tensorflow.build(arch, weights)

    published = {file.git_blob_sha1 for file in catalog.DOWNLOADS.get("seed-weights", ())}
    return CaffeFiles(
        path=model,
        kind="caffe-tensorflow",
        name=model.stem,
        weights_sha256=digest,
        known=known,
        input_size=size,
        channels=channels,
        transform=_REFERENCE if git_blob_sha1_file(model) in published else Transform(),
        build=build,
    )


def _transform_of(network: Network, folders: list[Path]) -> Transform:
    """The transformation of the test phase's data layer, or of any other; a mean file is searched in `folders`."""
    for source in network.sources:
        for name, param in transform_params(source):
            values = tuple(param.mean_value) if name == "transform_param" else ()
            file = Path(param.mean_file.replace("\\", "/")).name
            if param.scale != 1.0 or values or file:
                found = [folder / file for folder in folders if file and (folder / file).is_file()]
                return Transform(param.scale, values, file, read_mean(found[0]) if found else None)
    return Transform()


def to_classifier(
    files: CaffeFiles,
    config: ConvertConfig,
    *,
    train_images: Images | None = None,
    classes: tuple[str, ...] | None = None,
    data_label: str | None = None,
    on_event: OnEvent = ignore,
) -> Classifier:
    """Build the classifier; KdError where layers, weights, images and preprocessing do not fit together.

    Args:
        train_images: uint8 (N, H, W, C), see `CaffeFiles.needs_images`; of the network's input size.
        classes: class names of that data, used if their number is the network's.
        data_label: that data's name in tables.
    """
    # 1. Network, for images of the input size
    size = files.input_size
    if size is None:
        if train_images is None:
            raise KdError(f"{files.path} does not record its input size", "Pass --image-size, or --data.")
        _, height, width, channels = train_images.shape
        size = (height, width, channels)
    built = files.build(size, on_event)
    if built.classes < 2:
        raise KdError(f"{files.path} has one output", "A classifier has one for each of two or more classes.")
    # 2. Preprocessing
    preprocess = _make_preprocess(files, config, size, train_images, on_event)
    resize = _resize(files, config, size, on_event)
    # 3. Class names and provenance
    known = files.known
    source, names = _class_names(built.classes, known, classes or (), data_label)
    provenance: dict[str, Any] = {
        "kind": files.kind,
        "name": known.name if known else files.name,
        "source": files.path.name,
        "source_sha256": sha256_file(files.path),
        "weights_sha256": files.weights_sha256,
        "published": known.published if known else "",
        "measured": dict(known.measured) if known else {},
        "preprocess_data": data_label if files.preprocess_kind(config) in _FITTED else None,
    }
    if source:
        provenance["class_names"] = source
    checkpoint = Checkpoint(
        arch=built.arch,
        arch_args=built.arch_args,
        state_dict=built.state,
        preprocess=preprocess.spec(),
        classes=names,
        input_size=size,
        provenance=provenance,
        resize=resize,
    )
    return from_checkpoint(checkpoint, str(files.path))


def _class_names(
    count: int, known: KnownNetwork | None, of_data: tuple[str, ...], data_label: str | None
) -> tuple[str, tuple[str, ...]]:
    """The first names of that number: of the known network, of the data, or numbers; and their origin."""
    candidates = (
        ("the catalogue of weights", known.classes if known else ()),
        (data_label or "data", of_data),
        ("", tuple(map(str, range(count)))),
    )
    return next((source, names) for source, names in candidates if len(names) == count)


def _resize(files: CaffeFiles, config: ConvertConfig, size: tuple[int, int, int], on_event: OnEvent) -> int:
    """Pixels of the shorter side before the centre crop, 0: no crop; an assumption is a note."""
    if config.resize is not None:
        return checked_resize(config.resize, *size[:2])
    if files.resize:
        on_event(
            Note(f"the mean image is larger than the input, so images are cropped: --resize {files.resize}")
        )
    elif size[0] == size[1] and files.known is None and _CROPPED <= size[0] < 256:
        text = "whole images are resized; for weights published with a crop of 256 × 256 pixels"
        on_event(Note(f"{text}: --resize 256"))
    return files.resize


def _make_preprocess(
    files: CaffeFiles,
    config: ConvertConfig,
    size: tuple[int, int, int],
    images: Images | None,
    on_event: OnEvent,
) -> Preprocess:
    """The preprocessing for inputs of (H, W, C), fitted on the images if need be."""
    automatic, transform = config.preprocess == "auto", files.transform
    kind = files.preprocess_kind(config)
    order: str = config.channel_order
    if order == "auto":
        known_order = files.known.channel_order if files.known else transform.channel_order
        order = known_order or ("bgr" if size[2] == 3 else "rgb")
    if config.mean_std is not None:
        declared = f"preprocessing {files.known.preprocess}" if files.known else transform.text()
        if declared:
            on_event(Note(f"--scale, --mean and --std replace the preprocessing of the files: {declared}"))
        return MeanStd.described(config.mean_std, size[2], order)
    if kind == "scale-shift":
        return _scale_shift(transform, size, order)
    if kind not in _FITTED:
        if automatic:
            pixels = f"raw 0–255 pixels, {order.upper() if size[2] == 3 else 'grey'}"
            on_event(Note(f"unknown preprocessing, so {pixels}; see --mean, --scale and --channel-order"))
        return Preprocess(order)
    if images is None:
        raise KdError(f"preprocessing {kind} is fitted on training images", "Pass them with --data.")
    if automatic and files.known is None:
        on_event(
            Note(f"{transform.mean_file} is not beside the model: the mean image of the data replaces it")
        )
    fitted = fit(kind, images, channel_order=order, on_event=on_event)
    if kind == "mean-image" and automatic and transform.scale != 1.0:
        return ScaleShift(fitted.get_buffer("mean"), transform.scale, order)
    return fitted


def _scale_shift(transform: Transform, size: tuple[int, int, int], order: str) -> ScaleShift:
    height, width, channels = size
    mean = transform.mean_image
    if mean is None:
        mean = np.array(transform.mean_values or (0.0,), np.float32).reshape(-1, 1, 1)
    else:  # its middle: Caffe subtracts before it crops
        top, left = (mean.shape[1] - height) // 2, (mean.shape[2] - width) // 2
        if top < 0 or left < 0:
            raise KdError(f"the mean image of {dims(mean.shape[1:])} is smaller than {dims((height, width))}")
        mean = mean[:, top : top + height, left : left + width]
    if mean.shape[0] == 1:
        mean = np.repeat(mean, channels, axis=0)
    if mean.shape[0] != channels:
        raise KdError(f"{mean.shape[0]} mean values for {channels} channels")
    if order == "bgr":
        mean = mean[::-1]
    return ScaleShift(torch.from_numpy(mean.copy()), transform.scale, order)
