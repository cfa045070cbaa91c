"""Each Caffe layer, written byte by byte, against numpy in float64 and against OpenCV's importer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as part
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli import models
from kdcli.base.config import ConvertConfig
from kdcli.base.errors import KdError
from kdcli.caffe import opencv, schema
from kdcli.deploy.onnx_model.translate import to_onnx
from kdcli.models import Classifier
from kdcli.models.graph import GraphNet
from tests.caffe_files import V1, convert, field, layer, layers_of, net, write

Maps = np.ndarray  # float64 (C, H, W)
R = np.random.default_rng(7)
SHAPE = (4, 6, 5)
INPUT = field(3, "data") + b"".join(field(4, side) for side in (1, *SHAPE))
IMAGES = R.integers(0, 256, (5, 6, 5, 4), dtype=np.uint8)


def values(*shape: int) -> np.ndarray:
    return R.normal(0, 0.5, shape).astype(np.float32)


def dims(*sides: int) -> bytes:
    return b"".join(field(1, side) for side in sides)


@dataclass
class Case:
    """Layers that read `x` (and `y` = |x|) and write `out`, and what they should write.

    `opencv`: whether OpenCV's importer has the layer with these settings, or why not.
    """

    layers: list[dict[str, Any]]
    wanted: Callable[[Maps], Maps]
    opencv: bool | str = True
    features: int = part(default=0)


def one(
    kind: str, param: bytes = b"", *blobs: np.ndarray, bottoms: str = "x", tops: str = "out"
) -> list[Any]:
    return [layer(kind, "it", bottoms, tops, param, blobs)]


def deconv(x: Maps, weight: Maps, bias: Maps, stride: tuple, pad: tuple, dilation: int, groups: int) -> Maps:
    """Each input value paints the kernel into the output; the padding is cut off."""
    channels, high, wide = x.shape
    per, ky, kx = weight.shape[1:]
    size = [
        s * (n - 1) + dilation * (k - 1) + 1 for n, k, s in zip((high, wide), (ky, kx), stride, strict=True)
    ]
    full = np.zeros((per * groups, *size))
    for c in range(channels):
        first = c // (channels // groups) * per
        for y in range(high):
            for i in range(wide):
                for a in range(ky):
                    for b in range(kx):
                        place = y * stride[0] + a * dilation, i * stride[1] + b * dilation
                        full[first : first + per, place[0], place[1]] += x[c, y, i] * weight[c, :, a, b]
    return full[:, pad[0] : size[0] - pad[0], pad[1] : size[1] - pad[1]] + bias[:, None, None]


def conv(x: Maps, weight: Maps, stride: tuple, pad: tuple, dilation: tuple, groups: int) -> Maps:
    """Window by window."""
    out, per, ky, kx = weight.shape
    x = np.pad(x, ((0, 0), (pad[0],) * 2, (pad[1],) * 2))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, (ky, kx), strict=True)]
    high, wide = ((n - r) // s + 1 for n, r, s in zip(x.shape[1:], reach, stride, strict=True))
    result = np.zeros((out, high, wide))
    for o in range(out):
        first = o // (out // groups) * per
        for y in range(high):
            for i in range(wide):
                top, left = y * stride[0], i * stride[1]
                window = x[
                    first : first + per,
                    top : top + reach[0] : dilation[0],
                    left : left + reach[1] : dilation[1],
                ]
                result[o, y, i] = (window * weight[o]).sum()
    return result


def within(x: Maps, size: int, alpha: float, beta: float) -> Maps:
    padded = np.pad(x**2, ((0, 0), (size // 2,) * 2, (size // 2,) * 2))
    mean = np.zeros_like(x)
    for y in range(x.shape[1]):
        for i in range(x.shape[2]):
            mean[:, y, i] = padded[:, y : y + size, i : i + size].sum((1, 2)) / size**2
    return x * (1 + alpha * mean) ** -beta


def across(x: Maps, size: int, alpha: float, beta: float, k: float) -> Maps:
    squares = np.pad(x**2, ((size // 2,) * 2, (0, 0), (0, 0)))
    total = sum(squares[shift : shift + len(x)] for shift in range(size))
    return x / (k + alpha / size * total) ** beta


def pool(x: Maps, kernel: tuple, stride: tuple, pad: tuple, average: bool, up: bool = True) -> Maps:
    out = []
    for n, k, s, p in zip(x.shape[1:], kernel, stride, pad, strict=True):
        length = (n + 2 * p - k + (s - 1 if up else 0)) // s + 1
        out.append(length - 1 if any(pad) and (length - 1) * s >= n + p else length)
    result = np.zeros((len(x), *out))
    for y in range(out[0]):
        for i in range(out[1]):
            top, left = y * stride[0] - pad[0], i * stride[1] - pad[1]
            low, right = min(top + kernel[0], x.shape[1] + pad[0]), min(left + kernel[1], x.shape[2] + pad[1])
            area = (low - top) * (right - left)
            window = x[:, max(top, 0) : min(low, x.shape[1]), max(left, 0) : min(right, x.shape[2])]
            result[:, y, i] = window.sum((1, 2)) / area if average else window.max((1, 2))
    return result


def mvn(x: Maps, variance: bool, together: bool, eps: float) -> Maps:
    axes = (0, 1, 2) if together else (1, 2)
    x = x - x.mean(axes, keepdims=True)
    return x / (np.sqrt((x**2).mean(axes, keepdims=True)) + eps) if variance else x


def batch_norm(x: Maps, mean: Maps, variance: Maps, factor: float, eps: float) -> Maps:
    scale = 0 if factor == 0 else 1 / factor
    return (x - (mean * scale)[:, None, None]) / np.sqrt((variance * scale)[:, None, None] + eps)


W = values(6, 2, 3, 2)
W1 = values(5, 4, 1, 3)
DW, DB = values(4, 3, 3, 2), values(6)
DW1, DB1 = values(4, 5, 2, 2), values(5)
SLOPE, ONE_SLOPE = values(4), values(1)
MEAN, VARIANCE = values(4), np.abs(values(4)) + 1
CHANNELS, MORE = values(4), values(4)
PLANE, ROWS, ALL = values(6, 5), values(4, 6), values(4, 6, 5)
SCALAR = np.array(1.75, np.float32)
IP2, IPB2 = values(7, 30), values(7)
WT = values(120, 3)
A02, A9 = float(np.float32(0.2)), float(np.float32(0.9))
CONV_PARAM = (
    field(1, 6) + field(2, 0) + field(11, 3) + field(12, 2) + field(5, 2) + field(13, 2) + field(14, 1)
)
CONV_PARAM += field(9, 1) + field(10, 2)
DECONV_PARAM = (
    field(1, 6) + field(5, 2) + field(11, 3) + field(12, 2) + field(13, 2) + field(14, 3) + field(9, 1)
)
DECONV_PARAM += field(10, 0)
POOL_PARAM = field(5, 3) + field(6, 2) + field(7, 2) + field(8, 1) + field(9, 1) + field(10, 1)
NOT_THERE = "OpenCV has no such layer"

CASES: dict[str, Case] = {
    "conv-groups-rectangular-padded-no-bias": Case(
        one("Convolution", CONV_PARAM, W),
        lambda x: conv(x, W, (2, 1), (1, 2), (1, 1), 2),
    ),
    "conv-dilated": Case(
        one("Convolution", field(1, 5) + field(2, 0) + field(11, 1) + field(12, 3) + field(18, 2) + field(18, 2), W1),
        lambda x: conv(x, W1, (1, 1), (0, 0), (2, 2), 1),
    ),
    "deconv-groups-strides-cut": Case(
        one("Deconvolution", DECONV_PARAM, DW, DB),
        lambda x: deconv(x, DW, DB, (2, 3), (1, 0), 1, 2),
    ),
    "deconv-dilated": Case(
        one("Deconvolution", field(1, 5) + field(4, 2) + field(18, 2), DW1, DB1),
        lambda x: deconv(x, DW1, DB1, (1, 1), (0, 0), 2, 1),
        "OpenCV does not dilate deconvolutions",
    ),
    "inner-product-of-an-axis": Case(
        one("InnerProduct", field(1, 7) + field(5, 2), IP2, IPB2),
        lambda x: x.reshape(4, 30) @ IP2.T.astype(float) + IPB2,
    ),
    "inner-product-transposed-no-bias": Case(
        one("InnerProduct", field(1, 3) + field(2, 0) + field(6, 1), WT),
        lambda x: x.ravel() @ WT.astype(float),
        "OpenCV takes the blob's shape for the untransposed one",
    ),
    "pool-max-padded-rectangular": Case(
        one("Pooling", POOL_PARAM), lambda x: pool(x, (3, 2), (2, 1), (1, 1), False)
    ),
    "pool-ave-padded-rectangular": Case(
        one("Pooling", field(1, 1) + POOL_PARAM), lambda x: pool(x, (3, 2), (2, 1), (1, 1), True)
    ),
    "pool-max-rounded-up": Case(
        one("Pooling", field(2, 3) + field(3, 2)), lambda x: pool(x, (3, 3), (2, 2), (0, 0), False)
    ),
    "pool-ave-rounded-up": Case(
        one("Pooling", field(1, 1) + field(2, 2) + field(3, 2)), lambda x: pool(x, (2, 2), (2, 2), (0, 0), True)
    ),
    "pool-ave-rounded-down": Case(
        one("Pooling", field(1, 1) + field(2, 2) + field(3, 2) + field(13, 1)),
        lambda x: pool(x, (2, 2), (2, 2), (0, 0), True, up=False),
        "OpenCV knows no round_mode",
    ),
    "pool-max-rounded-down-by-a-fork": Case(
        one("Pooling", field(2, 2) + field(3, 2) + field(1000, 0)),
        lambda x: pool(x, (2, 2), (2, 2), (0, 0), False, up=False),
    ),
    "pool-max-global": Case(one("Pooling", field(12, 1)), lambda x: x.max((1, 2))),
    "relu-negative-slope": Case(one("ReLU", field(1, 0.2)), lambda x: np.where(x > 0, x, A02 * x)),
    "prelu": Case(
        one("PReLU", b"", SLOPE), lambda x: np.where(x > 0, x, SLOPE[:, None, None].astype(float) * x)
    ),
    "prelu-shared": Case(
        one("PReLU", field(2, 1), ONE_SLOPE), lambda x: np.where(x > 0, x, float(ONE_SLOPE[0]) * x),
    ),
    "elu": Case(one("ELU", field(1, 0.2)), lambda x: np.where(x > 0, x, A02 * np.expm1(x))),
    "sigmoid": Case(one("Sigmoid"), lambda x: 1 / (1 + np.exp(-x))),
    "tanh": Case(one("TanH"), np.tanh),
    "abs": Case(one("AbsVal"), np.abs),
    "power": Case(one("Power", field(1, 3.0) + field(2, 0.5) + field(3, 0.25)), lambda x: (0.25 + 0.5 * x) ** 3),
    "power-constant": Case(one("Power", field(1, 2.0) + field(2, 0.0) + field(3, 3.0)), lambda x: 9 + 0 * x),
    "exp": Case(one("Exp", field(2, 0.5) + field(3, 0.25)), lambda x: np.exp(0.25 + 0.5 * x)),
    "exp-base": Case(one("Exp", field(1, 2.0) + field(2, 0.5) + field(3, 1.0)), lambda x: 2 ** (1 + 0.5 * x)),
    "log": Case(one("Log", field(2, 0.5) + field(3, 3.0)), lambda x: np.log(3 + 0.5 * x), "OpenCV gives NaN"),
    "log-base": Case(
        one("Log", field(1, 2.0) + field(3, 4.0)), lambda x: np.log2(4 + x), "OpenCV gives NaN"
    ),
    "bnll": Case(one("BNLL"), lambda x: np.logaddexp(0, x)),
    "dropout": Case(one("Dropout", field(1, 0.75)), lambda x: x),
    "dropout-scaled-in-use": Case(one("Dropout", field(1, 0.75) + field(2, 0)), lambda x: 0.25 * x),
    "lrn-across": Case(
        one("LRN", field(1, 3) + field(2, 0.2) + field(3, 0.5)), lambda x: across(x, 3, A02, 0.5, 1.0)
    ),
    "lrn-across-from-k": Case(
        one("LRN", field(1, 3) + field(2, 0.2) + field(3, 0.5) + field(5, 2.0)),
        lambda x: across(x, 3, A02, 0.5, 2.0),
        "OpenCV takes k to be 1",
    ),
    "lrn-within": Case(
        one("LRN", field(1, 3) + field(2, 0.2) + field(4, 1)), lambda x: within(x, 3, A02, 0.75)
    ),
    "batch-norm": Case(
        one("BatchNorm", field(3, 0.5), MEAN, VARIANCE, np.array([4], np.float32)),
        lambda x: batch_norm(x, MEAN, VARIANCE, 4, 0.5),
    ),
    "batch-norm-of-factor-zero": Case(
        one("BatchNorm", field(3, 0.5), MEAN, VARIANCE, np.array([0], np.float32)),
        lambda x: batch_norm(x, MEAN, VARIANCE, 0, 0.5),
    ),
    "scale": Case(
        one("Scale", field(4, 1), CHANNELS, MORE), lambda x: x * CHANNELS[:, None, None] + MORE[:, None, None]
    ),
    "scale-two-axes": Case(
        one("Scale", field(2, 2), ROWS), lambda x: x * ROWS[:, :, None],
    ),
    "scale-to-the-end": Case(one("Scale", field(1, 2) + field(2, -1), PLANE), lambda x: x * PLANE),
    "scale-by-one-number": Case(
        one("Scale", field(2, 0), SCALAR), lambda x: x * 1.75, "OpenCV does not read a blob without axes"
    ),
    "scale-by-a-second-input": Case(
        [layer("Pooling", "squeeze", "y", "s", field(12, 1)),
         layer("Flatten", "flat", "s", "f"),
         *one("Scale", field(1, 0), bottoms="x f")],
        lambda x: x * np.abs(x).max((1, 2))[:, None, None],
    ),
    "bias": Case(one("Bias", b"", MORE), lambda x: x + MORE[:, None, None], NOT_THERE),
    "bias-to-the-end": Case(one("Bias", field(2, -1), ALL), lambda x: x + ALL, NOT_THERE),
    "bias-by-a-second-input": Case(
        one("Bias", field(1, 0), bottoms="x y"), lambda x: x + np.abs(x), NOT_THERE
    ),
    "concat-rows": Case(one("Concat", field(2, 2), bottoms="x y"), lambda x: np.concatenate((x, np.abs(x)), 1)),
    "concat-old-field": Case(
        one("Concat", field(1, 1), bottoms="x y"), lambda x: np.concatenate((x, np.abs(x)), 0)
    ),
    "slice-at-points": Case(
        [*one("Slice", field(2, 1) + field(2, 3), tops="a b c"),
         layer("Concat", "join", "c a b", "out", field(2, 1))],
        lambda x: np.concatenate((x[3:], x[:1], x[1:3])),
    ),
    "slice-equally-along-rows": Case(
        [*one("Slice", field(3, 2), tops="a b"), layer("Eltwise", "join", "a b", "out", field(1, 2))],
        lambda x: np.maximum(x[:, :3], x[:, 3:]),
    ),
    "slice-with-a-part-unused": Case(
        [*one("Slice", field(2, 1), tops="a out"), layer("Silence", "quiet", "a", "")], lambda x: x[1:]
    ),
    "split": Case(
        [*one("Split", tops="a b"), layer("Eltwise", "join", "a b", "out", field(1, 0))], lambda x: x * x
    ),
    "eltwise-coefficients": Case(
        one("Eltwise", field(2, 2.0) + field(2, -0.5), bottoms="x y"), lambda x: 2 * x - 0.5 * np.abs(x)
    ),
    "flatten-some": Case(one("Flatten", field(1, 2)), lambda x: x.reshape(4, 30)),
    "reshape-copy-and-infer": Case(
        one("Reshape", field(1, dims(0, -1, 0, 2))), lambda x: x.reshape(10, 6, 2),
    ),
    "reshape-from-axis": Case(
        one("Reshape", field(1, dims(3, -1)) + field(2, 1) + field(3, 2)), lambda x: x.reshape(3, 8, 5),
    ),
    "reshape-batch-inferred": Case(one("Reshape", field(1, dims(-1, 120))), lambda x: x.ravel()),
    "crop": Case(
        [layer("Pooling", "smaller", "y", "like", field(2, 3)),
         *one("Crop", field(1, 2) + field(2, 2) + field(2, 1), bottoms="x like")],
        lambda x: x[:, 2:6, 1:4],
    ),
    "crop-one-offset": Case(
        [layer("Pooling", "smaller", "y", "like", field(2, 2)),
         *one("Crop", field(1, -2) + field(2, 1), bottoms="x like")],
        lambda x: x[:, 1:6, 1:5],
    ),
    "softmax-over-rows": Case(
        one("Softmax", field(2, 2)), lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)
    ),
    "mvn": Case(one("MVN", field(3, 0.2)), lambda x: mvn(x, True, False, A02), "OpenCV adds eps under the root"),
    "mvn-plain": Case(one("MVN"), lambda x: mvn(x, True, False, 1e-9)),
    "mvn-across-mean-only": Case(
        one("MVN", field(1, 0) + field(2, 1)), lambda x: mvn(x, False, True, 0)
    ),
    "reduction-mean-of-maps": Case(
        one("Reduction", field(1, 4) + field(2, 2) + field(3, 2.0)), lambda x: 2 * x.mean((1, 2)), NOT_THERE
    ),
    "reduction-sum-of-squares": Case(
        one("Reduction", field(1, 3) + field(2, -1)), lambda x: (x**2).sum(2), NOT_THERE
    ),
    "reduction-sum-of-magnitudes": Case(
        one("Reduction", field(1, 2) + field(2, -2)), lambda x: np.abs(x).sum((1, 2)), NOT_THERE
    ),
}  # fmt: skip


def built(folder: Path, case: Case, *, v1: bool = False) -> tuple[Classifier, Path, np.ndarray]:
    """data → x = data/64 − 2 → the layers → three classes; and the logits that float64 gives."""
    inputs = IMAGES.transpose(0, 3, 1, 2).astype(float) / 64 - 2
    features = np.stack([case.wanted(image).ravel() for image in inputs])
    weight, bias = values(3, features.shape[1]), values(3)
    layers = [
        layer("Power", "pre", "data", "x", field(2, 1 / 64) + field(3, -2.0)),
        layer("AbsVal", "magnitude", "x", "y"),
        *case.layers,
        layer("InnerProduct", "fc", "out", "fc", field(1, 3), (weight, bias)),
    ]
    path = write(folder, net(layers, v1=v1, inputs=INPUT))
    classifier = convert(path, ConvertConfig(preprocess="none", channel_order="rgb"))
    return classifier, path, features @ weight.T.astype(float) + bias


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_numpy_and_opencv(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    classifier, path, wanted = built(tmp_path, case)
    with torch.inference_mode():
        found = classifier(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    pytest.importorskip("cv2")
    if case.opencv is True:
        assert opencv.compare_logits(classifier, path, None, IMAGES).holds
    else:  # the reason is still one
        try:
            assert not opencv.compare_logits(classifier, path, None, IMAGES).holds
        except KdError as error:
            assert "OpenCV cannot" in error.message


def side_by_side(cases: list[Case]) -> Case:
    """Cases in one network, their outputs flattened and joined."""
    layers = []
    for number, case in enumerate(cases):
        own = {"x": "x", "y": "y", "out": f"out{number}"}
        for one_layer in case.layers:
            names = {
                side: [own.setdefault(name, f"{name}{number}") for name in one_layer[side]]
                for side in ("bottoms", "tops")
            }
            layers.append({**one_layer, **names, "name": f"{one_layer['name']}{number}"})
        layers.append(layer("Flatten", f"flat{number}", f"out{number}", f"flat{number}"))
    joined = layer("Concat", "all", " ".join(f"flat{number}" for number in range(len(cases))), "out")
    return Case([*layers, joined], lambda x: np.concatenate([case.wanted(x).ravel() for case in cases]))


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_layers_saved_loaded_and_exported_to_onnx(every: int, tmp_path: Path) -> None:
    classifier, _, wanted = built(tmp_path, side_by_side(list(CASES.values())[::every]))
    classifier.save(tmp_path / "net.pt")
    classifier = models.load(tmp_path / "net.pt")
    model = to_onnx(classifier, opset=20, with_preprocessing=False)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    prepared = classifier.prepare(torch.from_numpy(IMAGES)).contiguous()
    ours = classifier.network(prepared).detach().numpy()
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    for count in (1, 3, 5):
        theirs = session.run(None, {"input": prepared[:count].numpy()})[0]
        np.testing.assert_allclose(theirs, ours[:count], rtol=1e-4, atol=1e-5 * np.abs(ours).max())


V1_CASES = sorted(
    name
    for name, case in CASES.items()
    if {one["kind"] for one in case.layers} <= set(V1) and name != "flatten-some"  # V1 has no settings for it
)


@pytest.mark.parametrize("name", V1_CASES)
def test_layer_in_v1_equals_numpy(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    classifier, _, wanted = built(tmp_path, case, v1=True)
    with torch.inference_mode():
        found = classifier(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "stochastic": (one("Pooling", field(1, 2) + field(2, 2)), "it (Pooling): stochastic pooling"),
    "batch-statistics": (one("BatchNorm", field(1, 0), MEAN, VARIANCE, ONE_SLOPE), "(BatchNorm): use_global_stats"),
    "convolution-of-rows": (one("Convolution", CONV_PARAM + field(16, 2), W), "it (Convolution): axis 2"),
    "softmax-of-images": (one("Softmax", field(2, 0)), "layer it: axis 0 is the batch"),
    "reduction-of-images": (one("Reduction"), "layer it: axis 0 is the batch"),
    "no-such-axis": (one("Concat", field(2, 4), bottoms="x y"), "layer it: axis 4 is not one of"),
    "scale-of-images": (one("Scale", field(1, 0), CHANNELS), "layer it: axis 0 is the batch"),
    "scale-of-too-much": (one("Scale", field(2, 9), CHANNELS), "layer it: 9 axes from 1 on"),
    "scale-wrong-shape": (one("Scale", b"", MEAN[:3]), "it: weight in the file is 3, in the network 4"),
    "scale-second-input": (
        [layer("Pooling", "less", "x", "l", field(2, 2)), *one("Scale", field(1, 0), bottoms="x l")],
        "its second input 4×5×4 does not begin its first 4×6×5",
    ),
    "scale-second-input-from-1": (one("Scale", field(1, 1), bottoms="x y"), "only axis 0 is supported"),
    "scale-second-input-bias": (one("Scale", field(1, 0) + field(4, 1), bottoms="x y"), "learned summands"),
    "slice-unequal": (one("Slice", tops="out b c"), "4 values along axis 1 cannot be cut into 3"),
    "slice-points": (one("Slice", field(2, 3) + field(2, 1), tops="out b c"), "cut into 3 parts at [3, 1]"),
    "slice-point-number": (one("Slice", field(2, 3), tops="out b c"), "cut into 3 parts at [3]"),
    "slice-nothing": (one("Slice", tops=""), "it (Slice): it has 0 outputs"),
    "reshape-images": (one("Reshape", field(1, dims(2, -1))), "cannot reshape each image's 4×6×5"),
    "reshape-wrong": (one("Reshape", field(1, dims(0, 7, -1))), "cannot reshape each image's 4×6×5"),
    "reshape-twice": (one("Reshape", field(1, dims(0, -1, -1))), "cannot reshape each image's 4×6×5"),
    "reshape-nothing": (one("Reshape"), "cannot reshape each image's 4×6×5"),
    "reshape-far": (one("Reshape", field(1, dims(0, 1, 2, 3, 0))), "reshape cannot be built"),
    "reshape-axes": (one("Reshape", field(1, dims(0)) + field(3, 9)), "do not lie in its input"),
    "crop-outside": (
        [layer("Pooling", "less", "x", "l", field(2, 2)), *one("Crop", field(2, 2), bottoms="x l")],
        "a box of 4×5×4 at 2×2 does not lie in 4×6×5",
    ),
    "crop-offsets": (one("Crop", field(2, 0) * 3, bottoms="x y"), "crop cannot be built"),
    "crop-alone": (one("Crop"), "layer it: crop cannot be built"),
    "flatten-backwards": (one("Flatten", field(1, 3) + field(2, 2)), "start_dim cannot come after end_dim"),
    "exp-base": (one("Exp", field(1, -2.0)), "exp cannot be built"),
    "log-base": (one("Log", field(1, 1.0)), "log cannot be built"),
    "exp-overflow": (one("Exp", field(1, 1e30) + field(3, 1e30)), "cannot be built"),
    "deconv-nothing-left": (
        one("Deconvolution", field(1, 5) + field(2, 0) + field(4, 1) + field(3, 3), values(4, 5, 1, 1)),
        "Output size is too small",
    ),
    "deconv-groups": (one("Deconvolution", field(1, 5) + field(4, 1) + field(5, 3), W), "divisible by groups"),
    "deconv-weights": (
        one("Deconvolution", field(1, 5) + field(4, 2) + field(2, 0), values(5, 4, 2, 2)),
        "it: weight in the file is 5×4×2×2, in the network 4×5×2×2",
    ),
    "eltwise-shapes": (
        [layer("Pooling", "less", "x", "l", field(2, 2)), *one("Eltwise", bottoms="x l")],
        "layer it: its inputs differ: 4×6×5 and 4×5×4",
    ),
    "pool-padding-bomb": (
        one("Pooling", field(2, 1 << 30) + field(4, (1 << 30) - 1)), "layer it: its padded input of 4×2147483652",
    ),
    "lrn-bomb": (one("LRN", field(1, (1 << 31) - 1)), "layer it: its padded input of 2147483651×6×5"),
    "lrn-within-bomb": (one("LRN", field(1, (1 << 31) - 1) + field(4, 1)), "layer it: its padded input"),
    "even-lrn": (one("LRN", field(1, 4) + field(4, 1)), "local size 4 must be odd"),
    "unknown": (one("SPP"), "layer it: unknown type SPP"),
    "argmax-inside": (one("ArgMax"), "layer it: unknown type ArgMax"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_settings_are_refused(name: str, tmp_path: Path) -> None:
    layers, words = REFUSED[name]
    pre = layer("Power", "pre", "data", "x", field(2, 1 / 64)), layer("AbsVal", "magnitude", "x", "y")
    head = layer("InnerProduct", "fc", "out", "fc", field(1, 3), (values(3, 120), values(3)))
    path = write(tmp_path, net([*pre, *layers, head], v1=False, inputs=INPUT))
    with pytest.raises(KdError) as raised:
        convert(path, ConvertConfig(preprocess="none"))
    assert words in raised.value.message


# What a network may say of its own state


@pytest.mark.parametrize(
    ("rules", "state", "kept"),
    [
        ([], b"", True),
        ([("include", field(1, 1))], b"", True),
        ([("include", field(1, 0))], b"", False),
        ([("exclude", field(1, 1))], b"", False),
        ([("exclude", field(1, 0))], b"", True),
        ([("include", field(4, "deploy"))], b"", False),
        ([("include", field(4, "deploy"))], field(3, "deploy"), True),
        ([("include", field(4, "deploy") + field(4, "fast"))], field(3, "deploy"), False),
        ([("include", field(5, "deploy"))], b"", True),
        ([("include", field(5, "deploy"))], field(3, "deploy"), False),
        ([("exclude", field(4, "deploy"))], field(3, "deploy"), False),
        ([("include", field(2, 1))], b"", False),
        ([("include", field(2, 1))], field(2, 1), True),
        ([("include", field(3, 1))], field(2, 2), False),
        ([("include", field(3, -1))], b"", False),
        ([("include", field(1, 0)), ("include", field(4, "a"))], field(3, "a"), True),
        ([("include", field(1, 1) + field(4, "a"))], field(1, 0) + field(3, "a"), True),  # kd tests, always
    ],
)  # fmt: skip
@pytest.mark.parametrize("v1", [True, False])
def test_include_and_exclude_rules(
    rules: list[tuple[str, bytes]], state: bytes, kept: bool, v1: bool, tmp_path: Path
) -> None:
    numbers = {"include": 32, "exclude": 33} if v1 else {"include": 8, "exclude": 9}
    double = layer("Power", "twice", "fc", "fc", field(2, 2.0))
    content = net([layer("InnerProduct", "fc", "data", "fc", field(1, 3), (WT.T.copy(), values(3)))], v1=v1)
    body = net([double], v1=v1)[len(field(1, "tiny")) :]
    message = schema.NetParameter()
    message.ParseFromString(body)
    one_layer = (message.layers or message.layer)[0].SerializeToString()
    ruled = one_layer + b"".join(field(numbers[name], rule) for name, rule in rules)
    content += field(2 if v1 else 100, ruled) + INPUT + (field(6, state) if state else b"")
    rows = layers_of(convert(write(tmp_path, content), ConvertConfig(preprocess="none")))
    assert [row.name for row in rows] == ["fc", "twice"][: 1 + kept]


# A plain module like any other


def test_every_layer_that_learns_is_trained(tmp_path: Path) -> None:
    """All parameters of a network made of such layers get a gradient, and the loss falls."""
    layers = [
        layer("Convolution", "c", "x", "c", field(1, 6) + field(4, 3) + field(3, 1), (values(6, 4, 3, 3), values(6))),
        layer("BatchNorm", "b", "c", "c", b"", (values(6), np.abs(values(6)) + 1, np.ones(1, np.float32))),
        layer("Scale", "s", "c", "c", field(4, 1), (values(6), values(6))),
        layer("PReLU", "p", "c", "c", b"", (values(6),)),
        layer("Bias", "a", "c", "c", b"", (values(6),)),
        layer("MVN", "m", "c", "c"),
        layer("Deconvolution", "d", "c", "d", field(1, 4) + field(4, 2) + field(6, 2),
              (values(6, 4, 2, 2), values(4))),
        layer("LRN", "l", "d", "out", field(1, 3) + field(2, 0.1) + field(4, 1)),
    ]  # fmt: skip
    case = Case(layers, lambda x: np.zeros(4 * 12 * 10))
    network = built(tmp_path, case)[0].network.train()
    torch.manual_seed(0)
    inputs, labels = torch.randn(32, *SHAPE) * 64 + 128, torch.arange(32) % 3
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(network(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0 or name == "c.bias", name  # batch norm takes that one away
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_network_can_be_traced_and_read(tmp_path: Path) -> None:
    network = built(tmp_path, CASES["slice-at-points"])[0].network
    traced = torch.fx.symbolic_trace(network)
    inputs = torch.randn(2, *SHAPE)
    torch.testing.assert_close(traced(inputs), network(inputs))
    assert str(network).splitlines()[2:4] == [
        "  (it_0): slice(of=3, axis=1, points=[1, 3], part=0)",
        "  (it_1): slice(of=3, axis=1, points=[1, 3], part=1)",
    ]


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pad=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_convolutions_of_every_geometry(
    size: tuple,
    kernel: tuple,
    stride: tuple,
    pad: tuple,
    dilation: int,
    groups: int,
    transposed: bool,
    seed: int,
) -> None:
    chance = np.random.default_rng(seed)
    x = chance.normal(size=(4, *size))
    args = {"out": 6, "kernel": kernel, "stride": stride, "pad": pad, "dilation": (dilation, dilation)}
    reach = [dilation * (k - 1) + 1 for k in kernel]
    if transposed:
        weight, bias = chance.normal(size=(4, 6 // groups, *kernel)), chance.normal(size=6)
        fits = all(s * (n - 1) + r - 2 * p > 0 for n, r, s, p in zip(size, reach, stride, pad, strict=True))
    else:
        weight, bias = chance.normal(size=(6, 4 // groups, *kernel)), chance.normal(size=6)
        fits = all(n + 2 * p >= r for n, r, p in zip(size, reach, pad, strict=True))
    kind = "deconv" if transposed else "conv"
    node = {"name": "it", "op": kind, "inputs": ["input"], "args": {**args, "groups": groups}}
    if not fits:
        with pytest.raises(KdError):
            GraphNet(x.shape, [node], "it")
        return
    network = GraphNet(x.shape, [node], "it")
    module = network.get_submodule("it")
    module.double().load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    with torch.inference_mode():
        found = module(torch.from_numpy(x[None])).numpy()[0]
    if transposed:
        wanted = deconv(x, weight, bias, stride, pad, dilation, groups)
    else:
        wanted = conv(x, weight, stride, pad, (dilation, dilation), groups) + bias[:, None, None]
    assert found.shape == wanted.shape == network.shapes["it"]
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)
