"""OpenCV's own Caffe importer as a second opinion: a stranger's code that shares nothing with kd's."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from google.protobuf import text_format

from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress, ignore
from kdcli.base.text import first_line
from kdcli.caffe import schema
from kdcli.caffe.layers import DEPTHWISE
from kdcli.caffe.network import wire
from kdcli.caffe.read import CaffeModel, Network, Weights, read_caffemodel, read_prototxt
from kdcli.data import rows
from kdcli.models import Classifier

_BATCH = 64
_LOOKED_AT = 8  # images of a batch, in float64
_MOST_PIXELS = 2**19  # of a batch: VGG-16 holds 0.15 GB of activations for each image of 224×224
_MOST_REAL = 256


TOLERANCE = 1e-4
_ROUNDINGS = 8  # OpenCV sums in another order, and its float32 may be as far off the other way


@dataclass(frozen=True)
class Comparison:
    """How far two readings of the same files are apart, over all images and logits.

    Attributes:
        rounding: how far kd's own float32 is from float64, where that was worth a look.
    """

    largest_difference: float
    largest_logit: float
    images: int
    rounding: float = 0.0

    @property
    def tolerance(self) -> float:
        """1e-4; more where float32 keeps less: of logits beyond 100, or of large values that cancel out."""
        return max(TOLERANCE * max(1.0, self.largest_logit / 100), _ROUNDINGS * self.rounding)

    @property
    def holds(self) -> bool:
        """Whether they agree; NaN does not."""
        return self.largest_difference <= self.tolerance

    def text(self) -> str:
        """`1.1e-05 on 256 images (limit 1e-04): pass`."""
        verdict = "pass" if self.holds else "fail"
        return (
            f"{self.largest_difference:.2g} on {self.images} images (limit {self.tolerance:.0e}): {verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "tolerance": self.tolerance, "holds": self.holds}


def trial_images(size: tuple[int, int, int], real: rows.Images | None = None) -> npt.NDArray[np.uint8]:
    """Images to compare on: 64 of noise, and up to 256 real ones spread over those given.

    Args:
        size: (H, W, C).
        real: uint8 (N, H, W, C).
    """
    noise = np.random.default_rng(0).integers(0, 256, (_BATCH, *size), dtype=np.uint8)
    if real is None:
        return noise
    count = min(len(real), _MOST_REAL)
    return np.concatenate((noise, rows.take(real, np.arange(count) * len(real) // count)))


def largest_difference(
    classifier: Classifier, caffemodel: Path, prototxt: Path | None, images: npt.NDArray[np.uint8]
) -> float:
    """`compare(...)`, its largest difference alone."""
    return compare(classifier, caffemodel, prototxt, images).largest_difference


def compare(
    classifier: Classifier,
    caffemodel: Path,
    prototxt: Path | None,
    images: npt.NDArray[np.uint8],
    *,
    on_event: OnEvent = ignore,
) -> Comparison:
    """Compare the logits of the classifier's network with OpenCV's reading of the files, on the same input.

    Args:
        images: uint8 (N, H, W, C).

    Raises:
        KdError: OpenCV is missing, cannot read the files, or gives another number of logits.
    """
    if len(images) == 0:
        raise KdError("there are no images to compare on")
    if images.shape[1:] != classifier.input_size:
        raise KdError(f"the images are {images.shape[1:]}, the classifier takes {classifier.input_size}")
    model = read_caffemodel(caffemodel)
    network = model.network if prototxt is None else read_prototxt(prototxt)
    height, width, channels = classifier.input_size
    text, layer = deploy_text(network, (channels, height, width))
    net = _open(model, text)
    classifier = classifier.eval()
    difference, logit, rounding = 0.0, 0.0, 0.0
    step = max(1, min(_BATCH, _MOST_PIXELS // (height * width)))
    for start in range(0, len(images), step):
        batch = torch.from_numpy(np.array(images[start : start + step]))
        with torch.inference_mode():
            prepared = classifier.prepare(batch).contiguous()
            ours = classifier.network(prepared).numpy()
        theirs = _run(net, prepared.numpy(), layer).reshape(len(batch), -1)
        if theirs.shape != ours.shape:
            raise KdError(f"OpenCV gives {theirs.shape[1]} logits at {layer}, the classifier {ours.shape[1]}")
        apart = float(np.abs(ours - theirs).max())
        difference = float(np.maximum(difference, apart))  # keeps NaN
        logit = float(np.maximum(logit, np.abs(theirs).max()))
        if apart > max(TOLERANCE, _ROUNDINGS * rounding):
            worst = np.abs(ours - theirs).max(axis=1).argsort()[-_LOOKED_AT:]
            exact = copy.deepcopy(classifier.network).double()
            with torch.inference_mode():
                wanted = exact(prepared[worst].double()).numpy()
            rounding = max(rounding, float(np.abs(ours[worst] - wanted).max()))
        on_event(Progress("comparing with OpenCV", min(start + step, len(images)), len(images)))
    return Comparison(difference, logit, len(images), rounding)


def deploy_text(network: Network, shape: tuple[int, int, int]) -> tuple[str, str]:
    """The layers that give the logits, as a prototxt with a declared input, and the last one's name."""
    wiring = wire(network)
    kept = {id(step.layer) for step in wiring.steps}
    message = schema.net_parameter()
    message.name = network.name
    message.input.append(wiring.input_blob)
    message.input_dim.extend((1, *shape))
    last = next(step.layer.name for step in wiring.steps if step.node == wiring.output)
    read: set[str] = set()
    for layer in reversed(network.layers):
        if layer.type == "Split" and not read.isdisjoint(layer.tops):
            kept.add(id(layer))
        if id(layer) in kept:
            read.update(layer.bottoms)
    for layer in network.layers:
        if id(layer) not in kept:
            continue
        old = layer.param.DESCRIPTOR.name == "V1LayerParameter"
        copy = (message.layers if old else message.layer).add()
        copy.CopyFrom(layer.param)
        for field in ("blobs", "include", "exclude", "phase"):
            if field in layer.param.DESCRIPTOR.fields_by_name:
                copy.ClearField(field)
        if layer.type == "Split":  # OpenCV stumbles over outputs that nothing reads
            copy.top[:] = [blob for blob in copy.top if blob in read]
        if layer.type in DEPTHWISE:
            copy.type, copy.convolution_param.group = "Convolution", copy.convolution_param.num_output
        if layer.type == "BatchNorm":
            copy.batch_norm_param.use_global_stats = True
        if layer.type == "Pooling":
            copy.pooling_param.pool = copy.pooling_param.pool  # OpenCV wants the default written out
    return text_format.MessageToString(message), last


def _open(model: CaffeModel, text: str) -> Any:
    try:
        import cv2
    except ImportError as error:
        raise _missing("OpenCV is not installed") from error
    if not hasattr(getattr(cv2, "dnn", None), "readNetFromCaffe"):
        raise _missing(f"OpenCV {getattr(cv2, '__version__', '')} has no Caffe importer")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what it complains of is raised, too
    with tempfile.TemporaryDirectory() as folder:
        path, weights = Path(folder) / "deploy.prototxt", model.path
        path.write_text(text, encoding="utf-8")
        if not model.widely_read:
            weights = Path(folder) / "weights.caffemodel"
            weights.write_bytes(_as_v2(model.weights))
        try:
            return cv2.dnn.readNetFromCaffe(str(path), str(weights))
        except cv2.error as error:
            raise KdError(f"OpenCV cannot read {model.path}: {first_line(error)}") from error


def _as_v2(weights: Weights) -> bytes:
    """Weights in the form that OpenCV reads; it knows no text, no V0 and no float64."""
    message = schema.net_parameter()
    for name, blobs in weights.items():
        layer = message.layer.add(name=name)
        for values in blobs:
            blob = layer.blobs.add()
            blob.shape.dim.extend(values.shape)
            blob.data.append(values.astype("<f4").tobytes())
    return bytes(message.SerializeToString())


def _run(net: Any, prepared: npt.NDArray[np.float32], layer: str) -> npt.NDArray[np.float32]:
    import cv2

    try:
        net.setInput(prepared)
        return np.asarray(net.forward(layer), dtype=np.float32)
    except cv2.error as error:
        raise KdError(f"OpenCV cannot run the network: {first_line(error)}") from error


def _missing(what: str) -> KdError:
    return KdError(
        f"{what}, so there is nothing to compare with", 'pip install "opencv-python-headless>=4.10,<5"'
    )
