"""Comparison of a converted network with OpenCV's own Caffe importer, an independent implementation."""

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
from kdcli.caffe.layer_types import DEPTHWISE
from kdcli.caffe.network import logits_graph
from kdcli.caffe.read import Network, read_caffemodel, read_prototxt
from kdcli.data import rows
from kdcli.models import Classifier
from kdcli.models.graph import INPUT

TOLERANCE = 1e-4
_BATCH = 64
_MAX_BATCH_PIXELS = 2**19  # VGG-16 holds 0.15 GB of activations for each image of 224×224
_MAX_REAL_IMAGES = 256
_FLOAT64_IMAGES = 8  # evaluated in float64
_ROUNDING_FACTOR = 8  # OpenCV sums in another order, and its rounding may have the other sign


@dataclass(frozen=True)
class Agreement:
    """Difference between the two networks' logits."""

    largest_difference: float  # over all images and logits
    largest_logit: float  # magnitude of OpenCV's largest logit
    images: int
    rounding: float = 0.0  # largest difference between kd's float32 and float64, where it was measured

    @property
    def tolerance(self) -> float:
        """1e-4; more for logits beyond 100, and where large values cancel out in float32."""
        return max(TOLERANCE * max(1.0, self.largest_logit / 100), _ROUNDING_FACTOR * self.rounding)

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; false for NaN."""
        return self.largest_difference <= self.tolerance

    def text(self) -> str:
        """`1.1e-05 on 256 images (limit 1e-04): pass`."""
        found = f"{self.largest_difference:.2g} on {self.images} images (limit {self.tolerance:.0e})"
        return f"{found}: {'pass' if self.holds else 'fail'}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tolerance": self.tolerance, "holds": self.holds}


def check_images(size: tuple[int, int, int], real: rows.Images | None = None) -> npt.NDArray[np.uint8]:
    """Images uint8 (N, H, W, C) to compare on: 64 of noise, and up to 256 of `real`, evenly spaced."""
    noise = np.random.default_rng(0).integers(0, 256, (_BATCH, *size), dtype=np.uint8)
    if real is None:
        return noise
    count = min(len(real), _MAX_REAL_IMAGES)
    return np.concatenate((noise, rows.take(real, np.arange(count) * len(real) // count)))


def compare_logits(
    classifier: Classifier,
    caffemodel: Path,
    prototxt: Path | None,
    images: npt.NDArray[np.uint8],
    *,
    on_event: OnEvent = ignore,
) -> Agreement:
    """Compare logits for images uint8 (N, H, W, C) with those of OpenCV's network from the same files.

    KdError where OpenCV is missing, cannot read the files, or gives another number of logits.
    """
    network = read_prototxt(prototxt) if prototxt is not None else read_caffemodel(caffemodel)[0]
    height, width, channels = classifier.input_size
    text, layer = deploy_text(network, (channels, height, width))
    net = _import(caffemodel, text)
    classifier = classifier.eval()
    # 1. Logits of both networks
    found, wanted = [], []
    step = max(1, min(_BATCH, _MAX_BATCH_PIXELS // (height * width)))
    for start in range(0, len(images), step):
        with torch.inference_mode():
            prepared = classifier.prepare(torch.from_numpy(images[start : start + step].copy())).contiguous()
            found.append(classifier.network(prepared).numpy())
        wanted.append(_forward(net, prepared.numpy(), layer).reshape(len(prepared), -1))
        on_event(Progress("comparing with OpenCV", min(start + step, len(images)), len(images)))
    logits, expected = np.concatenate(found), np.concatenate(wanted)
    if expected.shape != logits.shape:
        raise KdError(f"OpenCV gives {expected.shape[1]} logits at {layer}, the classifier {logits.shape[1]}")
    differences = np.abs(logits - expected).max(axis=1)
    # 2. A wrong layer or only rounding? float64 on the images that differ most
    rounding = 0.0
    if differences.max() > TOLERANCE:
        worst = differences.argsort()[-_FLOAT64_IMAGES:]
        with torch.inference_mode():
            prepared = classifier.prepare(torch.from_numpy(images[worst])).double()
            exact = copy.deepcopy(classifier.network).double()(prepared).numpy()
        rounding = float(np.abs(logits[worst] - exact).max())
    return Agreement(float(differences.max()), float(np.abs(expected).max()), len(images), rounding)


def deploy_text(network: Network, shape: tuple[int, int, int]) -> tuple[str, str]:
    """A prototxt of the layers that compute the logits, for images of (C, H, W), and the last layer's name."""
    steps, _ = logits_graph(network)
    message = schema.NetParameter(name=network.name, input=[INPUT], input_dim=[1, *shape])
    written: dict[int, Any] = {}  # by identity of the layer
    for step in steps:
        layer = step.layer
        if id(layer) in written:  # a further output of a Slice
            written[id(layer)].top[step.output] = step.node
            continue
        v1 = layer.param.DESCRIPTOR.name == "V1LayerParameter"
        param = (message.layers if v1 else message.layer).add()
        param.CopyFrom(layer.param)
        param.bottom[:] = step.inputs
        param.top[:] = [f"{layer.name}/{number}" for number in range(len(layer.tops))]
        param.top[step.output] = step.node
        written[id(layer)] = param
        for field in ("blobs", "include", "exclude", "phase"):
            if field in param.DESCRIPTOR.fields_by_name:
                param.ClearField(field)
        # Adaptations to OpenCV's importer
        if layer.type in DEPTHWISE:
            param.type, param.convolution_param.group = "Convolution", param.convolution_param.num_output
        if layer.type == "BatchNorm":
            param.batch_norm_param.use_global_stats = True
        if layer.type == "Pooling":  # the default, written out
            param.pooling_param.pool = param.pooling_param.pool
    return text_format.MessageToString(message), steps[-1].layer.name


def _import(caffemodel: Path, text: str) -> Any:
    """OpenCV's network from the caffemodel and a prototxt's text."""
    try:
        import cv2

        read_network = cv2.dnn.readNetFromCaffe
    except (ImportError, AttributeError) as error:  # OpenCV 5 has no Caffe importer
        raise KdError(
            "OpenCV with a Caffe importer is not installed, so there is nothing to compare with",
            'pip install "opencv-python-headless>=4.10,<5"',
        ) from error
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # errors are raised as well
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deploy.prototxt"
        path.write_text(text, encoding="utf-8")
        try:
            return read_network(str(path), str(caffemodel))
        except cv2.error as error:
            raise KdError(f"OpenCV cannot read {caffemodel}: {first_line(error)}") from error


def _forward(net: Any, prepared: npt.NDArray[np.float32], layer: str) -> npt.NDArray[np.float32]:
    import cv2

    try:
        net.setInput(prepared)
        return np.asarray(net.forward(layer), dtype=np.float32)
    except cv2.error as error:
        raise KdError(f"OpenCV cannot run the network: {first_line(error)}") from error
