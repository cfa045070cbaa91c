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

TOLERANCE = 1e-4
_BATCH = 64
_MAX_BATCH_PIXELS = 2**19  # VGG-16 holds 0.15 GB of activations for each image of 224×224
_MAX_REAL_IMAGES = 256
_FLOAT64_IMAGES = 8  # images of a batch that are evaluated in float64
_ROUNDING_FACTOR = 8  # OpenCV sums in another order, and its rounding may have the other sign


@dataclass(frozen=True)
class Agreement:
    """Difference between the two networks' logits.

    Attributes:
        largest_difference: over all images and logits.
        largest_logit: magnitude of OpenCV's largest logit.
        rounding: largest difference between kd's float32 and float64, where it was measured.
    """

    largest_difference: float
    largest_logit: float
    images: int
    rounding: float = 0.0

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
        verdict = "pass" if self.holds else "fail"
        return (
            f"{self.largest_difference:.2g} on {self.images} images (limit {self.tolerance:.0e}): {verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "tolerance": self.tolerance, "holds": self.holds}


def check_images(size: tuple[int, int, int], real: rows.Images | None = None) -> npt.NDArray[np.uint8]:
    """Images to compare on: 64 of noise, and up to 256 real ones, evenly spaced.

    Args:
        size: (H, W, C).
        real: uint8 (N, H, W, C).
    """
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
    """Compare the classifier's logits with those of OpenCV's network from the same files, on the same input.

    Args:
        images: uint8 (N, H, W, C).

    Raises:
        KdError: OpenCV is missing, cannot read the files, or gives another number of logits.
    """
    network = read_caffemodel(caffemodel).network if prototxt is None else read_prototxt(prototxt)
    height, width, channels = classifier.input_size
    text, layer = deploy_text(network, (channels, height, width))
    net = _import(caffemodel, text)
    classifier = classifier.eval()
    difference = largest_logit = rounding = 0.0
    step = max(1, min(_BATCH, _MAX_BATCH_PIXELS // (height * width)))
    for start in range(0, len(images), step):
        batch = torch.from_numpy(np.array(images[start : start + step]))
        with torch.inference_mode():
            prepared = classifier.prepare(batch).contiguous()
            logits = classifier.network(prepared).numpy()
        expected = _forward(net, prepared.numpy(), layer).reshape(len(batch), -1)
        if expected.shape != logits.shape:
            raise KdError(
                f"OpenCV gives {expected.shape[1]} logits at {layer}, the classifier {logits.shape[1]}"
            )
        differences = np.abs(logits - expected).max(axis=1)
        difference = float(np.maximum(difference, differences.max()))  # keeps NaN
        largest_logit = float(np.maximum(largest_logit, np.abs(expected).max()))
        if differences.max() > max(TOLERANCE, _ROUNDING_FACTOR * rounding):
            # A wrong layer or only rounding? float64 on the images that differ most
            worst = differences.argsort()[-_FLOAT64_IMAGES:]
            with torch.inference_mode():
                exact = copy.deepcopy(classifier.network).double()(prepared[worst].double()).numpy()
            rounding = max(rounding, float(np.abs(logits[worst] - exact).max()))
        on_event(Progress("comparing with OpenCV", min(start + step, len(images)), len(images)))
    return Agreement(difference, largest_logit, len(images), rounding)


def deploy_text(network: Network, shape: tuple[int, int, int]) -> tuple[str, str]:
    """A prototxt of the layers that compute the logits, for images of (C, H, W), and the last layer's name."""
    graph = logits_graph(network)
    message = schema.net_parameter()
    message.name = network.name
    message.input.append(graph.input_blob)
    message.input_dim.extend((1, *shape))
    kept = {id(step.layer) for step in graph.steps}
    read: set[str] = set()
    for layer in reversed(network.layers):
        if layer.type == "Split" and not read.isdisjoint(layer.tops):
            kept.add(id(layer))
        if id(layer) in kept:
            read.update(layer.bottoms)
    for layer in network.layers:
        if id(layer) not in kept:
            continue
        v1 = layer.param.DESCRIPTOR.name == "V1LayerParameter"
        param = (message.layers if v1 else message.layer).add()
        param.CopyFrom(layer.param)
        for field in ("blobs", "include", "exclude", "phase"):
            if field in param.DESCRIPTOR.fields_by_name:
                param.ClearField(field)
        # What OpenCV's importer needs spelled out or cannot take
        if layer.type == "Split":  # outputs that nothing reads
            param.top[:] = [blob for blob in param.top if blob in read]
        if layer.type in DEPTHWISE:
            param.type, param.convolution_param.group = "Convolution", param.convolution_param.num_output
        if layer.type == "BatchNorm":
            param.batch_norm_param.use_global_stats = True
        if layer.type == "Pooling":  # the default, written out
            param.pooling_param.pool = param.pooling_param.pool
    last = next(step.layer.name for step in graph.steps if step.node == graph.output)
    return text_format.MessageToString(message), last


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
