"""caffe-tensorflow's `.npy`: axes in TensorFlow's order, checked with its arithmetic in numpy."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcli import caffe
from kdcli.base.config import ConvertConfig
from kdcli.base.errors import KdError, UsageError
from kdcli.data import catalog
from kdcli.models import Classifier
from tests.caffe_files import layers_of

R = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return R.normal(0, 0.1, shape).astype(np.float32)


def lenet(widths: tuple[int, ...] = (3, 4, 6, 10)) -> dict[str, Any]:
    """Of 20×20×3 images: maps of 2×2 reach ip1."""
    first, second, hidden, classes = widths
    shapes = {"conv1": (5, 5, 3, first), "conv2": (5, 5, first, second), "ip1": (4 * second, hidden),
              "ip2": (hidden, classes)}  # fmt: skip
    return {name: {"weights": values(*shape), "biases": values(shape[-1])} for name, shape in shapes.items()}


NIN = {"conv1": (5, 3, 6), "cccp1": (1, 6, 5), "cccp2": (1, 5, 4), "conv2": (5, 4, 6), "cccp3": (1, 6, 6),
       "cccp4": (1, 6, 6), "conv3": (3, 6, 6), "cccp5": (1, 6, 5)}  # fmt: skip


def nin(end: str) -> dict[str, Any]:
    layers = {name: {"weights": values(k, k, i, o), "biases": values(o)} for name, (k, i, o) in NIN.items()}
    if end == "nin":
        layers["cccp6"] = {"weights": values(1, 1, 5, 10), "biases": values(10)}
    else:
        layers["ip1"] = {"weights": values(3 * 3 * 5, 7), "biases": values(7)}
        layers["ip2"] = {"weights": values(7, 10), "biases": values(10)}
    return layers


def write(folder: Path, layers: Any, name: str = "net.npy") -> Path:
    path = folder / name
    np.save(path, np.array(layers, dtype=object), allow_pickle=True)
    return path


def convert(path: Path, images: np.ndarray, **options: Any) -> Classifier:
    config = ConvertConfig(preprocess="none", channel_order="rgb", **options)
    return caffe.to_classifier(caffe.read(path, config), config, train_images=images)


# TensorFlow's way: maps (H, W, C), weights as stored


def conv(maps: np.ndarray, layer: dict[str, np.ndarray], pad: int, relu: bool) -> np.ndarray:
    weight, k = layer["weights"].astype(float), len(layer["weights"])
    maps = np.pad(maps, ((pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(maps, (k, k), axis=(0, 1))  # (y, x, C, ky, kx)
    out = np.einsum("yxcij,ijco->yxo", windows, weight) + layer["biases"]
    return np.maximum(out, 0) if relu else out


def pool(maps: np.ndarray, k: int, s: int, how: Any) -> np.ndarray:
    size = [-(-(side - k) // s) + 1 for side in maps.shape[:2]]
    return np.array([[how(maps[y * s : y * s + k, x * s : x * s + k], axis=(0, 1)) for x in range(size[1])]
                     for y in range(size[0])])  # fmt: skip


def dense(vector: np.ndarray, layer: dict[str, np.ndarray]) -> np.ndarray:
    return vector @ layer["weights"].astype(float) + layer["biases"]


def run_lenet(image: np.ndarray, layers: dict[str, Any]) -> np.ndarray:
    maps = pool(conv(image.astype(float), layers["conv1"], 0, False), 2, 2, np.max)
    maps = pool(conv(maps, layers["conv2"], 0, False), 2, 2, np.max)
    return dense(np.maximum(dense(maps.ravel(), layers["ip1"]), 0), layers["ip2"])


def run_nin(image: np.ndarray, layers: dict[str, Any]) -> np.ndarray:
    maps = image.astype(float)
    for name, pad in (("conv1", 2), ("cccp1", 0), ("cccp2", 0)):
        maps = conv(maps, layers[name], pad, True)
    maps = pool(maps, 3, 2, np.max)
    for name, pad in (("conv2", 2), ("cccp3", 0), ("cccp4", 0)):
        maps = conv(maps, layers[name], pad, True)
    maps = pool(maps, 3, 2, np.mean)
    for name, pad in (("conv3", 1), ("cccp5", 0)):
        maps = conv(maps, layers[name], pad, True)
    if "cccp6" in layers:
        return conv(maps, layers["cccp6"], 0, True).mean((0, 1))
    return dense(np.maximum(dense(maps.ravel(), layers["ip1"]), 0), layers["ip2"])


@pytest.mark.parametrize("arch", ["lenet", "nin", "nin-fc"])
def test_registered_networks_compute_what_tensorflow_does(tmp_path: Path, arch: str) -> None:
    side = 20 if arch == "lenet" else 12
    layers = lenet() if arch == "lenet" else nin(arch)
    images = R.integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    classifier = convert(write(tmp_path, layers), images)
    assert classifier.arch == arch
    run = run_lenet if arch == "lenet" else run_nin
    wanted = np.stack([run(image, layers) for image in images])
    found = classifier(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4 * max(1, np.abs(wanted).max()))
    assert {"conv1.weight", "conv1.bias"} <= set(classifier.network.state_dict())
    assert [row.name for row in layers_of(classifier) if row.parameters] == list(layers)
    classifier.save(tmp_path / "x.pt")


def test_size_is_read_off_the_inner_product(tmp_path: Path) -> None:
    assert caffe.read(write(tmp_path, lenet()), ConvertConfig()).input_size == (20, 20, 3)
    assert caffe.read(write(tmp_path, nin("nin-fc")), ConvertConfig()).input_size == (12, 12, 3)
    assert caffe.read(write(tmp_path, nin("nin")), ConvertConfig()).input_size is None


def test_layers_may_have_names_in_bytes(tmp_path: Path) -> None:
    layers = {k.encode(): {part.encode(): v for part, v in both.items()} for k, both in lenet().items()}
    images = np.zeros((1, 20, 20, 3), np.uint8)
    assert convert(write(tmp_path, layers), images).arch == "lenet"


def test_the_references_own_weights_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, lenet())
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    file = catalog.RemoteFile("student.npy", "weights", (), git_blob_sha1=blob)
    monkeypatch.setitem(catalog.DOWNLOADS, "seed-weights", (file,))
    config = ConvertConfig()
    assert caffe.read(path, config).needs_images(config)
    images = R.integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    files = caffe.read(path, config)
    preprocess = caffe.to_classifier(files, config, train_images=images).preprocess
    assert (preprocess.name, preprocess.channel_order) == ("mean-image", "rgb")


def flat(layers: dict[str, Any], end: str = "") -> dict[str, Any]:
    return {f"{name}/{part}{end}": array for name, both in layers.items() for part, array in both.items()}


LAYOUTS: dict[str, Any] = {
    "nested": lambda layers: layers,
    "flat": flat,
    "flat-numbered": lambda layers: flat(layers, ":0"),
    "lists": lambda layers: {name: [both["weights"], both["biases"]] for name, both in layers.items()},
    "tuples": lambda layers: {name: tuple(both.values()) for name, both in layers.items()},
    "other-names": lambda layers: {f"scope/layer_{at}": both for at, both in enumerate(layers.values())},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protocol", range(5))
def test_every_layout_and_protocol_gives_the_same(tmp_path: Path, layout: str, protocol: int) -> None:
    layers = lenet()
    array = np.empty((), dtype=object)
    array[()] = LAYOUTS[layout](layers)
    path = tmp_path / "net.npy"
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    header += b" " * (53 - len(header) % 64 % 64) + b"\n"
    path.write_bytes(
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickle.dumps(array, protocol)
    )
    images = R.integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    found = convert(path, images)(torch.from_numpy(images)).detach().numpy()
    wanted = np.stack([run_lenet(image, layers) for image in images])
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def of_python_2(value: Any) -> bytes:
    """Protocol 2 as Python 2 wrote it: names and data are `str`, read as bytes here."""
    if isinstance(value, dict):
        items = b"".join(of_python_2(key) + of_python_2(item) for key, item in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    shape = b"".join(b"J" + side.to_bytes(4, "little") for side in value.shape)
    data = value.tobytes()
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(" + shape + b"t"
        b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + len(data).to_bytes(4, "little") + data + b"tb"
    )


@pytest.mark.parametrize("layout", ["nested", "flat", "other-names"])
def test_pickles_of_python_2(tmp_path: Path, layout: str) -> None:
    layers = lenet()
    content = b"\x80\x02" + of_python_2(LAYOUTS[layout](layers)) + b"."
    unpickled = pickle.loads(content, encoding="latin1")  # it is one: Python's own reader agrees
    assert list(unpickled) == list(LAYOUTS[layout](layers))
    path = tmp_path / "net.npy"
    path.write_bytes(content)  # np.load takes a bare pickle, too
    images = R.integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    found = convert(path, images)(torch.from_numpy(images)).detach().numpy()
    wanted = np.stack([run_lenet(image, layers) for image in images])
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_layers_of_other_names_must_fit_one_another(tmp_path: Path) -> None:
    for change, words in (
        ("order", "no known network has the layers"),
        ("kernel", "no known network has the layers"),
        ("width", "size mismatch for ip2.weight"),
    ):
        layers = LAYOUTS["other-names"](lenet())
        names = list(layers)
        if change == "order":
            layers = {name: layers[name] for name in reversed(names)}
        elif change == "kernel":
            layers[names[1]]["weights"] = values(3, 3, 3, 4)
        else:
            layers[names[3]]["weights"] = values(7, 10)
        with pytest.raises(KdError, match=words):
            convert(write(tmp_path, layers), np.zeros((1, 20, 20, 3), np.uint8))


def broken(change: str) -> Any:
    layers = lenet()
    match change:
        case "missing":
            del layers["ip2"]
        case "extra":
            layers["ip3"] = layers["ip2"]
        case "parts":
            layers["ip2"] = {"weights": values(6, 10)}
        case "array":
            layers["ip2"] = values(6, 10)
        case "three":
            layers["ip2"] = [values(6, 10), values(10), values(10)]
        case "integers":
            layers["ip2"]["weights"] = np.ones((6, 10), int)
        case "nan":
            layers["ip2"]["biases"][0] = np.nan
        case "axes":
            layers["conv2"]["weights"] = values(3, 4)
        case "shape":
            layers["ip2"]["weights"] = values(7, 10)
        case "between":
            layers["conv2"]["weights"] = values(5, 5, 7, 4)
        case "square":
            layers["ip1"]["weights"] = values(3 * 4, 6)
        case "list":
            return [1, 2]
    return layers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "no known network has the layers"),
        ("extra", "no known network has the layers"),
        ("parts", "layer ip2 holds weights, not weights and biases"),
        ("array", "layer ip2 must be a pair of weights and biases"),
        ("three", "layer ip2 must be a pair of weights and biases"),
        ("integers", "layer ip2, weights are not floating-point"),
        ("nan", "layer ip2, biases: some values are not finite"),
        ("axes", "no known network has the layers conv1 5×5, conv2, ip1, ip2"),
        ("shape", "size mismatch for ip2.weight"),
        ("between", "size mismatch for conv2.weight"),
        ("square", "layer ip1: 12 inputs are no square map of 4 channels"),
        ("list", "npy"),
    ],
)
def test_error_of_wrong_content_names_it(tmp_path: Path, change: str, words: str) -> None:
    with pytest.raises(KdError) as raised:
        convert(write(tmp_path, broken(change)), np.zeros((1, 20, 20, 3), np.uint8))
    assert words in raised.value.message


def test_a_named_arch_needs_its_layers(tmp_path: Path) -> None:
    images = np.zeros((1, 20, 20, 3), np.uint8)
    for change in ("missing", "extra"):
        with pytest.raises(KdError, match="no network of that --arch has the layers conv1") as raised:
            convert(write(tmp_path, broken(change)), images, arch="lenet")
        assert raised.value.hint == "Layers of lenet: conv1 5×5, conv2 5×5, ip1, ip2."
    with pytest.raises(UsageError):
        caffe.read(write(tmp_path, lenet()), ConvertConfig(prototxt=tmp_path / "x"))


def test_nothing_is_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    with pytest.raises(KdError):
        convert(write(tmp_path, Trap()), np.zeros((1, 20, 20, 3), np.uint8))
    assert not (tmp_path / "executed").exists()


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    content = write(tmp_path, lenet()).read_bytes()
    for end in (3, 8, 60, 200, len(content) // 2, len(content) - 1):
        path = tmp_path / "cut.npy"
        path.write_bytes(content[:end])
        with pytest.raises(KdError):
            convert(path, np.zeros((1, 20, 20, 3), np.uint8))
