"""Caffe's files: written here byte by byte, read by kd and by OpenCV, compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli import caffe, models
from kdcli.base.config import ConvertConfig, make
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Note
from kdcli.caffe import opencv, schema
from kdcli.caffe.network import logits_graph
from kdcli.caffe.read import read_caffemodel, read_mean, read_prototxt, weights_sha256
from kdcli.models import Classifier
from tests.caffe_files import (
    BIAS1,
    BIAS2,
    CONV1,
    CONV1_PARAM,
    CONV2,
    FC,
    IMAGES,
    INPUT,
    IP,
    IPB,
    PARAM,
    blob,
    convert,
    converted,
    field,
    layer,
    layers_of,
    net,
    small,
    values,
    write,
)


def reference(pixels: np.ndarray) -> np.ndarray:
    """The small network in float64, window by window: (C, H, W) → logits."""

    def conv(maps: np.ndarray, weight: np.ndarray, bias: np.ndarray, pad: tuple, groups: int) -> np.ndarray:
        maps = np.pad(maps, ((0, 0), (pad[0],) * 2, (pad[1],) * 2))
        out, per, ky, kx = weight.shape
        high, wide = maps.shape[1] - ky + 1, maps.shape[2] - kx + 1
        result = np.zeros((out, high, wide))
        for o in range(out):
            first = o // (out // groups) * per
            for y in range(high):
                for x in range(wide):
                    window = maps[first : first + per, y : y + ky, x : x + kx]
                    result[o, y, x] = (window * weight[o].astype(float)).sum() + bias[o]
        return result

    def pool(maps: np.ndarray, k: int, s: int, how: Any) -> np.ndarray:
        size = [-(-(side - k) // s) + 1 for side in maps.shape[1:]]
        rows = [[how(maps[:, y * s : y * s + k, x * s : x * s + k], axis=(1, 2)) for x in range(size[1])]
                for y in range(size[0])]  # fmt: skip
        return np.array(rows).transpose(2, 0, 1)

    maps = conv(pixels.astype(float), CONV1, BIAS1, (1, 1), 1)
    maps = pool(np.where(maps > 0, maps, np.float32(0.1) * maps), 3, 2, np.max)
    squares = np.pad(maps**2, ((1, 1), (0, 0), (0, 0)))
    maps = maps / (1 + np.float32(0.1) / 3 * (squares[:-2] + squares[1:-1] + squares[2:])) ** 0.75
    maps = np.tanh(conv(maps, CONV2, BIAS2, (2, 1), 2))
    maps = pool(maps, 2, 2, np.mean)
    return IP.astype(float) @ maps.ravel() + IPB


def test_network_with_one_output_is_refused(tmp_path: Path) -> None:
    one = small(ip={"param": field(1, 1), "blobs": (IP[:1], IPB[:1])})
    with pytest.raises(KdError, match="has one output"):
        converted(write(tmp_path, net(one, v1=False)))


@pytest.fixture(params=["v1", "v2"])
def v1(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "v1")


def test_v1_and_v2_equal_float64_reference_and_opencv(tmp_path: Path, v1: bool) -> None:
    pytest.importorskip("cv2")
    path = write(tmp_path, net(small(), v1=v1))
    classifier = converted(path)
    found = classifier(torch.from_numpy(IMAGES)).detach().numpy()
    bgr = IMAGES[..., ::-1].transpose(0, 3, 1, 2)  # Caffe's order, by default
    wanted = np.stack([reference(image) for image in bgr])
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())
    assert opencv.compare_logits(classifier, path, None, IMAGES).holds
    assert [row.name for row in layers_of(classifier)] == [
        "conv1", "relu1", "pool1", "drop1", "norm1", "conv2", "tanh2", "pool2", "ip",
    ]  # fmt: skip
    row = layers_of(classifier)[5]
    assert (row.kind.partition("(")[0], row.output, row.parameters) == ("Conv2d", (4, 9, 8), 4 * 3 * 2 + 4)
    assert [m.p for m in classifier.modules() if isinstance(m, torch.nn.Dropout)] == [pytest.approx(0.3)]


def test_classifier_is_saved_and_loaded(tmp_path: Path) -> None:
    classifier = converted(write(tmp_path, net(small(), v1=True)))
    classifier.save(tmp_path / "teacher.pt")
    again = models.load(tmp_path / "teacher.pt")
    images = torch.from_numpy(IMAGES)
    torch.testing.assert_close(again(images), classifier(images), rtol=0, atol=0)
    assert again.arch == "graph"
    assert again.provenance["kind"] == "caffe"


@pytest.mark.parametrize("how", [{"double": True}, {"double": False}])
def test_every_encoding_holds_the_same_weights(tmp_path: Path, how: dict[str, bool]) -> None:
    _, first = read_caffemodel(write(tmp_path, net(small(), v1=True, **how)))
    _, second = read_caffemodel(write(tmp_path, net(small(), v1=False), "other.caffemodel"))
    assert weights_sha256(first) == weights_sha256(second)
    np.testing.assert_array_equal(first["conv1"][0], CONV1)


PROTOTXT = """
name: "tiny"
input: "data" input_dim: 1 input_dim: 3 input_dim: 12 input_dim: 12
some_vendors_field { depth: 3 }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  convolution_param { num_output: 6 pad: 1 kernel_size: 3 weight_filler { type: "xavier" } engine: CAFFE } }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1"
  pooling_param { pool: AVE global_pooling: true } }
layer { name: "fc" type: "InnerProduct" bottom: "pool1" top: "fc" inner_product_param { num_output: 2 } }
layer { name: "only-train" type: "Dropout" bottom: "fc" top: "fc" exclude { phase: TEST } }
layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }
"""


def with_prototxt(folder: Path, text: str, layers: list[dict[str, Any]]) -> Classifier:
    text_file = folder / "net.prototxt"
    text_file.write_text(text)
    return converted(write(folder, net(layers, v1=False)), prototxt=text_file)


def test_prototxt_gives_the_network_and_names_match_the_weights(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    classifier = with_prototxt(tmp_path, PROTOTXT, [FC, small()[2]])  # in another order than the network's
    assert classifier.input_size == (12, 12, 3)
    assert classifier.classes == ("0", "1")
    assert [row.name for row in layers_of(classifier)] == [
        "conv1",
        "relu1",
        "pool1",
        "fc",
    ]  # logits, not probabilities
    paths = tmp_path / "net.caffemodel", tmp_path / "net.prototxt"
    assert opencv.compare_logits(classifier, *paths, IMAGES).largest_difference < 1e-4


def test_branches_in_place_layers_and_batch_norm_agree_with_opencv(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    scale = (np.array([2.0], np.float32),)
    layers = [
        layer("Input", "data", "", "data", field(1, field(1, bytes((1, 3, 12, 12))))),
        small()[2],
        layer("BatchNorm", "bn", "conv1", "conv1", b"", (values(6), np.abs(values(6)) + 1, *scale)),
        layer("Scale", "sc", "conv1", "conv1", field(4, 1), (values(6), values(6))),
        layer("Split", "split", "conv1", "a b"),
        layer("ReLU", "relu", "a", "a"),
        layer("Sigmoid", "sig", "b", "c"),
        layer("Eltwise", "sum", "a c", "sum", field(1, 1) + field(2, 1.0) + field(2, -2.0)),
        layer("Concat", "cat", "sum a", "cat"),
        layer("Pooling", "pool", "cat", "pool", field(1, 1) + field(12, 1)),
        layer("InnerProduct", "fc", "pool", "fc", field(1, 2), (values(2, 12), values(2))),
        layer("Softmax", "prob", "fc", "prob"),
    ]
    path = write(tmp_path, net(layers, v1=False))
    classifier = converted(path)
    bn = classifier.network.get_submodule("bn")
    torch.testing.assert_close(bn.running_mean, torch.from_numpy(layers[2]["blobs"][0] / 2))
    assert opencv.compare_logits(classifier, path, None, IMAGES).holds


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_damaged_files_are_errors_not_tracebacks(
    tmp_path_factory: pytest.TempPathFactory, at: int, cut: bool
) -> None:
    content = bytearray(net(small(), v1=True))
    at %= len(content)
    content = content[:at] if cut else content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]
    path = write(tmp_path_factory.mktemp("damaged"), bytes(content))
    try:
        converted(path)
    except KdError as error:
        assert error.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no layers"),
        (net(small(), v1=True)[:-1500], "not a whole caffemodel"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "caffemodel"),
        (b"name: 'x'\n" + b"layer { name: 'a' }\n" * 9, "is a prototxt: it holds no weights"),
        (field(1, "name only"), "no layers"),
        (net(small(), v1=True) + net(small(), v1=False), "both `layer` and `layers`"),
        (b"layer { blobs { data: 1 data: 2 } }", "is a caffemodel written as text"),
        (field(2, field(1, field(1, "c") + field(2, "conv")) + field(2, "data")), "is in Caffe's V0 format"),
        (net(small(conv1={"blobs": ()}, conv2={"blobs": ()}, ip={"blobs": ()}), v1=True), "holds no weights"),
    ],
)
def test_files_that_are_no_caffemodel_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(KdError) as raised:
        converted(write(tmp_path, content))
    assert words in raised.value.message
    for bad in ("missing.caffemodel", "."):
        with pytest.raises(KdError):
            converted(tmp_path / bad)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conv1": {"kind": "Power2", "param": b""}}, "layer conv1: unknown type Power2"),
        ({"conv1": {"blobs": (values(6, 3, 5, 5), BIAS1)}}, "conv1: weight in the file is 6×3×5×5, in the"),
        ({"ip": {"blobs": (values(5, 100), IPB)}}, "ip: weight in the file is 5×100, in the network 5×80"),
        ({"ip": {"blobs": (IP, values(6))}}, "layer ip: bias in the file is 6, in the network 5"),
        ({"ip": {"blobs": ()}}, "ip: the file holds 0 blobs, the network has 2 (weight 5×80, bias 5)"),
        ({"ip": {"blobs": (IP,)}}, "layer ip: the file holds 1 blobs, the network has 2"),
        ({"ip": {"blobs": (IP * np.nan, IPB)}}, "layer ip, blob 0: some values are not finite"),
        ({"pool1": {"param": field(1, 2) + field(2, 3)}}, "pool1 (Pooling): stochastic"),
        ({"pool1": {"param": b""}}, "layer pool1: max_pool cannot be built"),
        ({"conv2": {"bottoms": ["norm1", "elsewhere"]}}, "2 inputs (data, elsewhere)"),
        ({"ip": {"param": b""}}, "layer ip: its output would be empty: 0"),
    ],
)  # fmt: skip
def test_error_of_a_wrong_layer_names_it(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(KdError) as raised:
        converted(write(tmp_path, net(small(**changes), v1=False)))
    assert words in raised.value.message


@pytest.mark.parametrize("shape", [(2**31 - 1, 2**31 - 1, 2, 2), (6, 3, 3, 2), (0, 3, 3, 3)])
def test_a_shape_must_fit_its_values_before_anything_is_allocated(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    lie = b"".join(field(i + 1, side) for i, side in enumerate(shape)) + field(5, CONV1.tobytes())
    body = field(4, "conv1") + field(5, 4) + field(6, lie)
    with pytest.raises(KdError, match="layer conv1, blob 0: shape"):
        read_caffemodel(write(tmp_path, field(2, body)))


def test_layer_names_that_are_not_utf8(tmp_path: Path) -> None:
    content = net(small(), v1=False).replace(b"conv1", b"c\xffnv1")
    assert layers_of(converted(write(tmp_path, content)))[0].name == "c_nv1"


def test_malformed_prototxt_names_the_line(tmp_path: Path) -> None:
    for text, words in (
        ("name: 'x'\nlayer {\n  name: }\n", "prototxt: 3:"),
        ("layer { name: 'a' type: 'ReLU' }\nlayers { name: 'b' type: RELU }", "both"),
        ("net: 'solver.prototxt'\nbase_lr: 0.1\n", "no layers"),
        ("layers { layer { name: 'conv1' type: 'conv' } bottom: 'data' }", "is in Caffe's V0 format"),
        ("a { " * 5000, "well-formed"),
    ):
        path = tmp_path / "x.prototxt"
        path.write_text(text)
        with pytest.raises(KdError) as raised:
            convert(write(tmp_path, net(small(), v1=True)), ConvertConfig(prototxt=path))
        assert words in raised.value.message
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KdError, match="not a well-formed prototxt"):
        read_prototxt(path)


# Input size, preprocessing, names


def heard(path: Path, **options: Any) -> tuple[Classifier, list[str]]:
    images = options.pop("train_images", None)
    names = options.pop("classes", None)
    notes: list[str] = []
    classifier = convert(
        path,
        ConvertConfig(**options),
        train_images=images,
        classes=names,
        data_label="toy",
        on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    return classifier, notes


def test_size_comes_from_the_file_or_else_from_the_data(tmp_path: Path) -> None:
    undeclared = write(tmp_path, net(small(), v1=True))
    with pytest.raises(KdError, match="does not record its input size"):
        heard(undeclared)
    assert heard(undeclared, train_images=IMAGES)[0].input_size == (12, 12, 3)
    declared = write(tmp_path, net(small(), v1=True, inputs=INPUT), "declared.caffemodel")
    assert heard(declared)[0].input_size == (12, 12, 3)


TRANSFORMED = PROTOTXT.replace(
    'input: "data" input_dim: 1 input_dim: 3 input_dim: 12 input_dim: 12',
    """layer { name: "d" type: "Data" top: "data" top: "label" include { phase: TRAIN }
         transform_param { crop_size: 10 mean_value: 1 } }
       layer { name: "d" type: "Data" top: "data" top: "label" include { phase: TEST } transform_param {
         crop_size: 12 scale: 0.5 %s } }""",
)


def test_transform_param_becomes_the_preprocessing(tmp_path: Path) -> None:
    (tmp_path / "t.prototxt").write_text(TRANSFORMED % "mean_value: 10 mean_value: 20 mean_value: 30")
    path = write(tmp_path, net([small()[2], FC], v1=False))
    classifier = heard(path, prototxt=tmp_path / "t.prototxt")[0]
    assert classifier.input_size == (12, 12, 3)
    bgr = IMAGES[..., ::-1].transpose(0, 3, 1, 2).astype(float)
    wanted = (bgr - np.array([10, 20, 30])[:, None, None]) * 0.5
    np.testing.assert_allclose(classifier.prepare(torch.from_numpy(IMAGES)).numpy(), wanted, atol=1e-5)
    classifier.save(tmp_path / "t.pt")
    np.testing.assert_allclose(
        models.load(tmp_path / "t.pt").prepare(torch.from_numpy(IMAGES)), wanted, atol=1e-5
    )


def test_a_mean_file_is_read_or_replaced_by_the_datas_mean_image(tmp_path: Path) -> None:
    (tmp_path / "t.prototxt").write_text(TRANSFORMED % 'mean_file: "some/where/mean.binaryproto"')
    path = write(tmp_path, net([small()[2], FC], v1=False))
    with pytest.raises(KdError, match="mean-image is fitted on training images"):
        heard(path, prototxt=tmp_path / "t.prototxt")
    classifier, notes = heard(path, prototxt=tmp_path / "t.prototxt", train_images=IMAGES)
    rgb = IMAGES.transpose(0, 3, 1, 2).astype(float)
    wanted = ((rgb - rgb.mean(0)) * 0.5)[:, ::-1]
    np.testing.assert_allclose(classifier.prepare(torch.from_numpy(IMAGES)), wanted, atol=1e-4)
    assert "mean.binaryproto is not beside the model" in notes[0]
    assert classifier.provenance["preprocess_data"] == "toy"

    mean = values(3, 14, 16) * 100
    write(tmp_path, blob(mean[None], legacy=True), "mean.binaryproto")
    np.testing.assert_array_equal(read_mean(tmp_path / "mean.binaryproto"), mean)
    found = heard(path, prototxt=tmp_path / "t.prototxt")[0].prepare(torch.from_numpy(IMAGES))
    wanted = (rgb[:, ::-1] - mean[:, 1:13, 2:14]) * 0.5  # the middle of the mean image, BGR
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_unknown_networks_get_raw_bgr_and_a_note(tmp_path: Path) -> None:
    path = write(tmp_path, net(small(), v1=True, inputs=INPUT))
    classifier, notes = heard(path)
    assert "unknown preprocessing, so raw 0–255 pixels, BGR" in notes[0]
    prepared = classifier.prepare(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_array_equal(prepared, IMAGES[..., ::-1].transpose(0, 3, 1, 2))
    rgb = heard(path, channel_order="rgb")[0]
    np.testing.assert_array_equal(rgb.prepare(torch.from_numpy(IMAGES)), IMAGES.transpose(0, 3, 1, 2))


def test_described_preprocessing_equals_opencvs_blob(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    path = write(tmp_path, net(small(), v1=True, inputs=INPUT))
    classifier, notes = heard(path, mean="104,117,123", resize=16)
    assert not notes  # nothing was declared, nothing is assumed
    found = classifier.prepare(torch.from_numpy(IMAGES)).numpy()
    wanted = cv2.dnn.blobFromImages([image[..., ::-1] for image in IMAGES], mean=(104, 117, 123))
    np.testing.assert_array_equal(found, wanted)
    assert classifier.resize == 16
    classifier.save(tmp_path / "t.pt")
    assert models.load(tmp_path / "t.pt").resize == 16
    # (pixel · scale − mean) / std, one value for all channels, in RGB
    prepared = heard(path, scale="1/255", mean="0.5", std="0.2,0.25,0.5", channel_order="rgb")[0]
    wanted = (IMAGES / 255 - 0.5) / np.array([0.2, 0.25, 0.5])
    np.testing.assert_allclose(
        prepared.prepare(torch.from_numpy(IMAGES)).numpy(), wanted.transpose(0, 3, 1, 2), atol=1e-5
    )


def test_described_preprocessing_replaces_the_declared_one_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "t.prototxt").write_text(TRANSFORMED % "mean_value: 10 mean_value: 20 mean_value: 30")
    path = write(tmp_path, net([small()[2], FC], v1=False))
    classifier, notes = heard(path, prototxt=tmp_path / "t.prototxt", std="2")
    assert notes == [
        "--scale, --mean and --std replace the preprocessing of the files: mean 10,20,30, scale 0.5"
    ]
    found = classifier.prepare(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_array_equal(found, IMAGES[..., ::-1].transpose(0, 3, 1, 2) / np.float32(2))


def test_described_preprocessing_of_the_wrong_form_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, net(small(), v1=True, inputs=INPUT))
    with pytest.raises(UsageError, match="mean: 2 values for 3 channels"):
        heard(path, mean="1,2")
    for chosen, words in (
        ({"mean": "104", "preprocess": "none"}, "--preprocess cannot be combined with"),
        ({"mean": "104,117,123", "scale": "0.017"}, "outside the pixels"),
        ({"resize": 3}, "--resize 3"),
        ({"resize": 5000}, "--resize 5000"),
    ):
        with pytest.raises(UsageError, match=words):
            make(ConvertConfig, chosen)


def test_a_mean_image_larger_than_the_input_sets_the_crop(tmp_path: Path) -> None:
    (tmp_path / "t.prototxt").write_text(TRANSFORMED % 'mean_file: "mean.binaryproto"')
    path = write(tmp_path, net([small()[2], FC], v1=False))
    write(tmp_path, blob(values(1, 3, 16, 16), legacy=True), "mean.binaryproto")
    classifier, notes = heard(path, prototxt=tmp_path / "t.prototxt")
    assert classifier.resize == 16
    assert notes == ["the mean image is larger than the input, so images are cropped: --resize 16"]
    assert heard(path, prototxt=tmp_path / "t.prototxt", resize=12)[0].resize == 0


def test_class_names_come_from_data_of_the_right_number(tmp_path: Path) -> None:
    path = write(tmp_path, net(small(), v1=True, inputs=INPUT))
    five = tuple("abcde")
    assert heard(path, classes=five)[0].classes == five
    assert heard(path, classes=("a", "b"))[0].classes == tuple("01234")


def test_layers_of_one_name_become_numbered_nodes(tmp_path: Path) -> None:
    """Also where a number is taken; lines run grow with the number of layers, not with its square."""

    def lines_run(count: int) -> int:
        relus = [layer("ReLU", "relu", "ip", "ip") for _ in range(count)]
        network, _ = read_caffemodel(
            write(tmp_path, net([*small(), layer("ReLU", "relu_3", "ip", "ip"), *relus], v1=False))
        )
        lines = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            lines += event == "line"
            return trace

        sys.settrace(trace)
        try:
            steps, _ = logits_graph(network)
        finally:
            sys.settrace(None)
        numbers = [number for number in range(2, count + 2) if number != 3]
        wanted = ["relu_3", "relu", *(f"relu_{number}" for number in numbers)]
        assert [step.node for step in steps][-count - 1 :] == wanted
        return lines

    assert lines_run(400) < 3 * lines_run(200)


def test_two_layers_of_one_name_with_weights_are_refused(tmp_path: Path) -> None:
    """A file of one layer's weights could otherwise fill memory a thousand times."""
    square = layer("InnerProduct", "twin", "ip", "ip", field(1, 5), (np.eye(5), np.zeros(5)))
    again = layer("InnerProduct", "twin", "ip", "ip", field(1, 5))
    path = write(tmp_path, net([*small(), square, again], v1=False))
    with pytest.raises(KdError, match="two layers named twin take weights"):
        converted(path)


def test_unused_layers_are_noted(tmp_path: Path) -> None:
    extra = layer("InnerProduct", "aux", "conv1", "aux", field(1, 2), (values(2, 6 * 144), values(2)))
    layers = small()
    classifier, notes = heard(write(tmp_path, net([*layers[:4], extra, *layers[4:]], v1=False, inputs=INPUT)))
    assert layers_of(classifier)[-1].name == "ip"
    assert any("do not need them: aux" in note for note in notes)
    assert any("does not use: aux" in note for note in notes)


def test_arch_is_refused_for_a_caffemodel(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        caffe.read(write(tmp_path, net(small(), v1=True)), ConvertConfig(arch="nin"))


def test_arch_of_an_npy_is_recognised_by_kernels_with_a_note(tmp_path: Path) -> None:
    shapes = {"a": (5, 5, 3, 4), "b": (5, 5, 4, 4), "c": (16, 6), "d": (6, 3)}
    layers = {
        name: {"weights": np.ones(shape, np.float32), "biases": np.ones(shape[-1], np.float32)}
        for name, shape in shapes.items()
    }
    np.save(tmp_path / "net.npy", np.array(layers, object), allow_pickle=True)
    notes: list[str] = []
    for arch in ("auto", "lenet"):
        source = caffe.read(tmp_path / "net.npy", ConvertConfig(arch=arch))
        source.build((20, 20, 3), lambda event: notes.append(event.text))
    assert len(notes) == 1 and notes[0].startswith("read as lenet by its kernels alone")


def test_missing_opencv_importer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, net(small(), v1=True))
    classifier = converted(path)
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(KdError) as raised:
        opencv.compare_logits(classifier, path, None, IMAGES)
    assert 'pip install "opencv-python-headless>=4.10,<5"' in raised.value.hint


def test_comparison_with_opencv_detects_a_changed_weight(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    path = write(tmp_path, net(small(), v1=True))
    classifier = converted(path)
    with torch.no_grad():
        classifier.network.get_parameter("ip.weight")[0, 0] += 0.5
    assert not opencv.compare_logits(classifier, path, None, IMAGES).holds


# The real network


def test_the_nin_equals_opencv_and_its_record(shared_data: Path) -> None:
    pytest.importorskip("cv2")
    path = shared_data / "cifar10_nin.caffemodel"
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    classifier, _ = heard(path, preprocess="mean-std", train_images=images)
    assert classifier.provenance["published"]
    assert classifier.preprocess.channel_order == "rgb"
    assert classifier.classes[0] == "airplane"
    assert models.parameter_count(classifier.network) == 966_986
    for prototxt in (None, shared_data / "cifar10_nin_train_val.prototxt"):
        assert opencv.compare_logits(classifier, path, prototxt, images).largest_difference < 1e-4
    source = caffe.read(path, ConvertConfig())
    assert source.needs_images(ConvertConfig())
    assert source.input_size == (32, 32, 3)


def test_nin_in_v1_v2_and_float64_has_equal_logits(shared_data: Path, tmp_path: Path) -> None:
    """V1, V2, and float64: the same logits, to the bit."""
    path = shared_data / "cifar10_nin.caffemodel"
    forms = {"v1": path}
    network, weights = read_caffemodel(path)
    settings_of = {name: number for name, (number, _) in PARAM.items()}
    for name, double in (("v2", False), ("double", True)):
        content = field(1, "upgraded") + b"".join(
            field(3, source) for source in network.inputs if source == "data"
        )
        for one in network.layers:
            if one.type in ("Data", "Accuracy", "SoftmaxWithLoss"):
                continue
            body = field(1, one.name) + field(2, one.type)
            body += b"".join(field(3, b) for b in one.bottoms) + b"".join(field(4, t) for t in one.tops)
            body += b"".join(
                field(7, blob(b, legacy=False, double=double)) for b in weights.get(one.name, ())
            )
            for setting, value in one.param.ListFields():
                if setting.name.endswith("_param") and one.type in settings_of:
                    body += field(settings_of[one.type], value.SerializeToString())
            content += field(100, body)
        forms[name] = write(tmp_path, content, f"{name}.caffemodel")
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    config = ConvertConfig(preprocess="none", channel_order="rgb")
    with torch.inference_mode():
        logits = {name: convert(form, config)(images) for name, form in forms.items()}
    assert logits["v1"].std() > 1
    for name, found in logits.items():
        assert torch.equal(found, logits["v1"]), name


def test_the_nin_is_known_by_its_weights_when_encoded_anew(shared_data: Path, tmp_path: Path) -> None:
    _, weights = read_caffemodel(shared_data / "cifar10_nin.caffemodel")
    layers = [layer("Convolution", name, "", "", b"", blobs) for name, blobs in weights.items()]
    path = write(tmp_path, net(layers, v1=False, double=True))
    prototxt = shared_data / "cifar10_nin_train_val.prototxt"
    source = caffe.read(path, ConvertConfig(prototxt=prototxt))
    assert source.known is not None


TRANSFORM = field(100, field(1, 0.00390625) + b"".join(field(5, mean) for mean in (104.0, 117.0, 123.0)))


def test_a_deploy_prototxt_keeps_the_transform_that_the_snapshot_recorded(tmp_path: Path) -> None:
    data = field(1, "data") + field(2, "Data") + field(4, "data") + field(4, "label") + TRANSFORM
    layers = net(small()[2:], v1=False)
    path = write(tmp_path, field(1, "tiny") + field(100, data) + layers)
    deploy = tmp_path / "deploy.prototxt"
    text = network_text(layers)
    deploy.write_text('input: "data" input_dim: 1 input_dim: 3 input_dim: 12 input_dim: 12\n' + text)
    options = {"train_images": IMAGES}
    alone = convert(path, ConvertConfig(), **options)
    beside = convert(path, ConvertConfig(prototxt=deploy), **options)
    images = torch.from_numpy(IMAGES)
    prepared = beside.prepare(images)
    bgr = IMAGES[..., ::-1].astype(np.float64) - (104, 117, 123)
    np.testing.assert_allclose(prepared.numpy(), bgr.transpose(0, 3, 1, 2) / 256, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(alone(images), beside(images))


def network_text(content: bytes) -> str:
    message = schema.NetParameter()
    message.ParseFromString(content)
    for one in message.layer:
        del one.blobs[:]
    return text_format.MessageToString(message)


@pytest.mark.parametrize("v1", [True, False])
def test_split_label_is_no_second_input(v1: bool, tmp_path: Path) -> None:
    plain = converted(write(tmp_path, net(small(), v1=v1), "plain.caffemodel"))
    layers = small()
    layers[-2]["phase"] = None  # accuracy while training, too: Caffe then splits the label
    split = {**layer("Split", "label_split", "label", "l0"), "tops": ["l0", "l1"]}
    layers[-2]["bottoms"], layers[-1]["bottoms"] = ["ip", "l0"], ["ip", "l1"]
    twice = converted(write(tmp_path, net([*layers[:2], split, *layers[2:]], v1=v1)))
    images = torch.from_numpy(IMAGES)
    with torch.inference_mode():
        assert torch.equal(plain(images), twice(images))


@pytest.mark.parametrize("bottoms", ["", "conv1 relu1"])
def test_split_without_exactly_one_input_is_refused(bottoms: str, tmp_path: Path) -> None:
    layers = small()
    split = {**layer("Split", "split", bottoms, "a"), "tops": ["a", "b"]}
    with pytest.raises(KdError, match=r"layer split \(Split\)"):
        converted(write(tmp_path, net([*layers[:4], split, *layers[4:]], v1=False)))


def test_two_inputs_that_are_needed_are_an_error(tmp_path: Path) -> None:
    add = layer("Eltwise", "sum", "conv1 other", "sum")
    content = net([small()[2], add, {**FC, "bottoms": ["sum"]}], v1=False)
    with pytest.raises(KdError, match=r"reads 2 inputs \(data, other\)"):
        converted(write(tmp_path, content))


def test_prototxt_in_any_encoding(tmp_path: Path) -> None:
    content = net(small(), v1=False, inputs=INPUT)
    path, text = write(tmp_path, content), tmp_path / "n.prototxt"
    for bytes_ in (
        b"\xef\xbb\xbf" + network_text(content).encode(),
        b"# caf\xe9\n" + network_text(content).encode(),
    ):
        text.write_bytes(bytes_)
        assert layers_of(converted(path, prototxt=text))[-1].name == "ip"


# How a network may say what it takes


def of_type(kind: str, settings: bytes, number: int = 0) -> bytes:
    body = field(1, "d") + field(2, kind) + field(4, "data") + (field(4, "label") if kind != "Input" else b"")
    return field(100, body + (field(number, settings) if number else b""))


BATCH = field(1, b"".join(map(bytes, ([5], [3], [12], [12]))))


@pytest.mark.parametrize(
    "declared",
    [
        field(3, "data") + b"".join(field(4, side) for side in (5, 3, 12, 12)),
        field(3, "data") + field(8, BATCH),
        of_type("Input", field(1, BATCH), 143),
        of_type("Data", field(3, 12), 100),
        of_type("ImageData", field(5, 12), 115),
        of_type("WindowData", field(5, 12), 129),
    ],
)
def test_every_declaration_of_the_input_is_read(declared: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, declared + net(small()[2:], v1=False))
    assert caffe.read(path, ConvertConfig()).input_size == (12, 12, 3)
    assert heard(path)[0].input_size == (12, 12, 3)


def test_incomplete_input_declaration_is_ignored(tmp_path: Path) -> None:
    for declared in (
        field(3, "data") + field(4, 1) + field(4, 3),
        of_type("Input", field(1, field(1, bytes([1, 108]))), 143),
    ):
        path = write(tmp_path, declared + net(small()[2:], v1=False))
        assert caffe.read(path, ConvertConfig()).input_size is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x08\x01\x1f", "is not a mean image"),
        (field(7, field(1, b"\x02\x03")) + field(5, np.ones(6, "<f4").tobytes()), "is C×H×W, this is (2, 3)"),
        (
            field(7, field(1, b"\x01" * 40)) + field(5, np.ones(1, "<f4").tobytes()),
            "does not fit its 1 values",
        ),
        (
            field(7, field(1, b"\xff" * 9 + b"\x01")) + field(5, bytes(4)),
            "shape (-1,) does not fit its 1 values",
        ),
    ],
)
def test_wrong_mean_image_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(KdError) as raised:
        read_mean(write(tmp_path, content, "mean.binaryproto"))
    assert words in raised.value.message


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([small()[2], small()[2]], "two layers named conv1 hold weights"),
        ([{**small()[2], "param": CONV1_PARAM + field(6, 1) * 3}], "3 values of stride: two spatial axes"),
        ([{**small()[-1], "blobs": (BIAS1,)}], "no layer that computes logits"),
        ([layer("Softmax", "prob", "data", "prob", b"", (BIAS1,))], "no layer that computes logits"),
    ],
)  # fmt: skip
def test_impossible_networks_are_refused(layers: list[dict[str, Any]], words: str, tmp_path: Path) -> None:
    bottoms = [{**one, "bottoms": ["data"]} for one in layers]
    with pytest.raises(KdError) as raised:
        heard(write(tmp_path, net(bottoms, v1=False, inputs=INPUT)))
    assert words in raised.value.message


def test_files_beyond_the_size_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, binary = write(tmp_path, PROTOTXT.encode(), "net.prototxt"), write(tmp_path, net(small(), v1=True))
    reader = sys.modules[read_caffemodel.__module__]
    monkeypatch.setattr(reader, "_MAX_TEXT", 99)
    with pytest.raises(KdError, match="more than the 99 that are read"):
        read_prototxt(text)
    assert read_caffemodel(binary)
    monkeypatch.setattr(reader, "_MAX_BYTES", 999)
    with pytest.raises(KdError, match="more than the 999 that are read"):
        read_caffemodel(binary)
