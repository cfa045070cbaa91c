"""Caffe's files for tests, written byte by byte from the wire format, and a small network of them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcli import caffe
from kdcli.base.config import ConvertConfig
from kdcli.models import Classifier
from kdcli.models.layers import LayerSummary, summarize_layers

# protobuf's wire format, without protobuf


def varint(value: int) -> bytes:
    value, out = value & (2**64 - 1), b""  # a negative one has ten bytes
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | float | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def blob(values: np.ndarray, *, legacy: bool, double: bool = False, packed: bool = True) -> bytes:
    if legacy:
        sides = (1,) * (4 - values.ndim) + values.shape
        shape = b"".join(field(i + 1, int(side)) for i, side in enumerate(sides))
    else:
        shape = field(7, field(1, b"".join(varint(int(side)) for side in values.shape)))
    if double:
        return shape + field(8, values.astype("<f8").tobytes())
    if packed:
        return shape + field(5, values.astype("<f4").tobytes())
    return shape + b"".join(field(5, float(value)) for value in values.ravel())


V1 = {"Data": 5, "Convolution": 4, "ReLU": 18, "Pooling": 17, "InnerProduct": 14, "SoftmaxWithLoss": 21,
      "Dropout": 6, "LRN": 15, "Softmax": 20, "Accuracy": 1, "Concat": 3, "Eltwise": 25, "Split": 22,
      "Sigmoid": 19, "TanH": 23, "Flatten": 8, "Deconvolution": 39, "Power": 26, "Exp": 38, "Slice": 33,
      "ArgMax": 30, "MVN": 34, "AbsVal": 35, "BNLL": 2, "Silence": 36}  # fmt: skip
PARAM = {"Convolution": (106, 10), "Pooling": (121, 19), "InnerProduct": (117, 17), "LRN": (118, 18),
         "BatchNorm": (139, 0), "Scale": (142, 0), "ReLU": (123, 30), "Eltwise": (110, 24),
         "Dropout": (108, 12), "Input": (143, 0), "Deconvolution": (106, 10), "Power": (122, 21),
         "Exp": (111, 41), "Log": (134, 0), "ELU": (140, 0), "PReLU": (131, 0), "Bias": (141, 0),
         "Slice": (126, 31), "Reshape": (133, 0), "Crop": (144, 0), "MVN": (120, 34),
         "Reduction": (136, 0), "Concat": (104, 9), "Flatten": (135, 0), "Softmax": (125, 39)}  # fmt: skip


def layer(
    kind: str,
    name: str,
    bottoms: str,
    top: str,
    param: bytes = b"",
    blobs: tuple = (),
    phase: int | None = None,
) -> dict[str, Any]:
    return {"kind": kind, "name": name, "bottoms": bottoms.split(), "tops": top.split(), "param": param,
            "blobs": blobs, "phase": phase}  # fmt: skip


def net(layers: list[dict[str, Any]], *, v1: bool, inputs: bytes = b"", **how: Any) -> bytes:
    out = field(1, "tiny") + inputs
    for one in layers:
        kind, rule = one["kind"], b"" if one["phase"] is None else field(1, one["phase"])
        if v1:
            body = b"".join(field(2, b) for b in one["bottoms"]) + b"".join(field(3, t) for t in one["tops"])
            body += field(4, one["name"]) + field(5, V1[kind])
            body += b"".join(field(6, blob(b, legacy=True, **how)) for b in one["blobs"])
            body += field(32, rule) if rule else b""
        else:
            body = field(1, one["name"]) + field(2, kind)
            body += b"".join(field(3, b) for b in one["bottoms"]) + b"".join(field(4, t) for t in one["tops"])
            body += b"".join(field(7, blob(b, legacy=False, **how)) for b in one["blobs"])
            body += field(8, rule) if rule else b""
        if one["param"]:
            body += field(PARAM[kind][1 if v1 else 0], one["param"])
        out += field(2 if v1 else 100, body)
    return out


def write(folder: Path, content: bytes, name: str = "net.caffemodel") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


R = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return R.normal(0, 0.2, shape).astype(np.float32)


CONV1, BIAS1 = values(6, 3, 3, 3), values(6)
CONV2, BIAS2 = values(4, 3, 2, 1), values(4)
IP, IPB = values(5, 4 * 5 * 4), values(5)
CONV1_PARAM = field(1, 6) + field(3, 1) + field(4, 3)
CONV2_PARAM = field(1, 4) + field(5, 2) + field(11, 2) + field(12, 1) + field(9, 2) + field(10, 1)
INPUT = field(3, "data") + b"".join(field(4, side) for side in (1, 3, 12, 12))


def small(**changes: Any) -> list[dict[str, Any]]:
    """conv – ReLU in place – max-pool – LRN – grouped conv – tanh – ave-pool – inner product – loss."""
    layers = [
        layer("Data", "train-data", "", "data label", phase=0),
        layer("Data", "test-data", "", "data label", phase=1),
        layer("Convolution", "conv1", "data", "conv1", CONV1_PARAM, (CONV1, BIAS1)),
        layer("ReLU", "relu1", "conv1", "conv1", field(1, 0.1)),
        layer("Pooling", "pool1", "conv1", "pool1", field(2, 3) + field(3, 2)),
        layer("Dropout", "drop1", "pool1", "pool1", field(1, 0.3)),
        layer("LRN", "norm1", "pool1", "norm1", field(1, 3) + field(2, 0.1)),
        layer(
            "Convolution", "conv2", "norm1", "conv2",
            CONV2_PARAM, (CONV2, BIAS2),
        ),
        layer("TanH", "tanh2", "conv2", "conv2"),
        layer("Pooling", "pool2", "conv2", "pool2", field(1, 1) + field(2, 2) + field(3, 2)),
        layer("InnerProduct", "ip", "pool2", "ip", field(1, 5), (IP, IPB)),
        layer("Accuracy", "accuracy", "ip label", "accuracy", phase=1),
        layer("SoftmaxWithLoss", "loss", "ip label", "loss"),
    ]  # fmt: skip
    for one in layers:
        one.update(changes.get(one["name"], {}))
    return layers


IMAGES = R.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)


FC = layer("InnerProduct", "fc", "pool1", "fc", field(1, 2), (values(2, 6), values(2)))


def convert(model: Path, config: ConvertConfig, **context: Any) -> Classifier:
    """Read the files and build the classifier."""
    return caffe.to_classifier(caffe.read(model, config), config, **context)


def layers_of(classifier: Classifier) -> list[LayerSummary]:
    height, width, channels = classifier.input_size
    return summarize_layers(classifier.network, torch.zeros(1, channels, height, width))


def converted(path: Path, **options: Any) -> Classifier:
    return convert(path, ConvertConfig(preprocess="none", **options), train_images=IMAGES)
