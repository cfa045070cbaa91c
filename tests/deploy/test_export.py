"""Export: parity with the checkpoint, metadata, no file on failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image

from kdcli.base.config import ExportConfig, PredictConfig
from kdcli.base.errors import KdError, UsageError
from kdcli.data.preprocess import PREPROCESSES, MeanImage, fit
from kdcli.deploy.export import ExportResult, default_output, export, exporter, job, parity
from kdcli.deploy.export.job import disjoint_indices
from kdcli.deploy.onnx_model import OnnxClassifier, OnnxRunner, count_model
from kdcli.deploy.onnx_model.metadata import decode_preprocess, encode_preprocess
from kdcli.deploy.onnx_model.translate import ExportedModule, file_bytes
from kdcli.deploy.predict import predict
from kdcli.models import Classifier, load
from tests.deploy.helpers import CLASSES, SPLITS, classifier, exported, random_splits, resizing_classifier


def test_logits_equal_a_forward_pass_by_hand(plain: tuple[Classifier, ExportResult]) -> None:
    model, result = plain
    state = {name: value.double().numpy() for name, value in model.network.state_dict().items()}
    pixels = SPLITS.test.images[:3].astype(np.float64)
    train = SPLITS.train.images.reshape(-1, 3).astype(np.float64)
    maps = ((pixels - train.mean(0)) / train.std(0)).transpose(0, 3, 1, 2)

    def convolve(maps: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(maps, (5, 5), axis=(2, 3))
        return np.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]

    def pool(maps: np.ndarray) -> np.ndarray:
        batch, channels, height, width = maps.shape
        return maps.reshape(batch, channels, height // 2, 2, width // 2, 2).max(axis=(3, 5))

    hidden = pool(convolve(maps, state["conv1.weight"], state["conv1.bias"]))
    hidden = pool(convolve(hidden, state["conv2.weight"], state["conv2.bias"])).reshape(3, -1)
    hidden = np.maximum(hidden @ state["ip1.weight"].T + state["ip1.bias"], 0)
    expected = hidden @ state["ip2.weight"].T + state["ip2.bias"]

    session = ort.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("input", ["batch", 3, 16, 16], "tensor(float)")
    ]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    given = session.run(None, {"input": maps.astype(np.float32)})[0]
    np.testing.assert_allclose(given, expected, atol=1e-5)


def test_with_preprocessing_takes_pixels_and_gives_probabilities(
    whole: tuple[Classifier, ExportResult],
) -> None:
    model, result = whole
    session = ort.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("images", ["batch", 16, 16, 3], "tensor(uint8)")
    ]
    for count in (1, 5, 20):
        images = SPLITS.test.images[:count]
        given = session.run(["probabilities"], {"images": images})[0]
        np.testing.assert_allclose(given.sum(axis=1), 1, atol=1e-6)
        with torch.inference_mode():
            expected = model(torch.from_numpy(images)).softmax(dim=1).numpy()
        np.testing.assert_allclose(given, expected, atol=1e-5)


def test_file_is_self_contained_and_has_no_paths(
    plain: tuple[Classifier, ExportResult], whole: tuple[Classifier, ExportResult]
) -> None:
    for _, result in (plain, whole):
        assert [path.name for path in sorted(result.path.parent.iterdir())] == ["model.onnx", "model.pt"]
        content = result.path.read_bytes()
        for word in (
            b"/home/",
            b"Users",
            b"secret",
            b".py",
            b"site-packages",
            str(Path.cwd()).encode(),
            b"kdcli.",
        ):
            assert word not in content, word
        onnx.checker.check_model(onnx.load(result.path), full_check=True)
        assert result.size_bytes == len(content)


def test_metadata_of_an_export(plain: tuple[Classifier, ExportResult]) -> None:
    model, result = plain
    metadata = {entry.key: entry.value for entry in onnx.load(result.path).metadata_props}
    assert json.loads(metadata["kd.classes"]) == list(CLASSES)
    assert metadata["kd.method"] == "kd"
    assert metadata["kd.teacher"] == "nin"
    assert metadata["kd.test_accuracy"] == "61.5"
    assert json.loads(metadata["kd.provenance"])["data"] == {"spec": "pictures", "label": "pictures"}
    loaded = OnnxClassifier.load(result.path)
    assert (loaded.classes, loaded.input_size, loaded.gives) == (CLASSES, (16, 16, 3), "logits")
    images = torch.from_numpy(SPLITS.test.images)
    with torch.inference_mode():
        assert torch.allclose(loaded(images), model(images), atol=1e-5)


def test_file_of_a_model_that_resizes_takes_the_same_images(tmp_path: Path) -> None:
    model = resizing_classifier()
    loaded = OnnxClassifier.load(exported(tmp_path, model).path)
    assert (loaded.input_size, loaded.network_size, loaded.any_size) == ((30, 30, 3), (16, 16, 3), True)
    random = np.random.default_rng(0)
    for shape in ((30, 30, 3), (16, 16, 3), (41, 57, 3), (23, 20, 1)):
        images = torch.from_numpy(random.integers(0, 256, (3, *shape), np.uint8))
        with torch.inference_mode():
            torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=1e-5)
    Image.fromarray(random.integers(0, 256, (64, 48, 3), np.uint8)).save(tmp_path / "photo.png")
    found, expected = (
        list(predict(each, [tmp_path / "photo.png"], PredictConfig())) for each in (loaded, model)
    )
    assert found[0].classes == expected[0].classes
    assert found[0].probabilities == pytest.approx(expected[0].probabilities, abs=1e-6)


@pytest.mark.parametrize("after", ["Identity", "Flatten", "Identity Flatten Identity"])
def test_probabilities_are_detected_behind_identity_operators(
    after: str, tmp_path: Path, whole: tuple[Classifier, ExportResult]
) -> None:
    model = onnx.load(whole[1].path)
    [output] = model.graph.output
    last = output.name
    for number, kind in enumerate(after.split()):
        model.graph.node.append(onnx.helper.make_node(kind, [last], [f"end{number}"]))
        last = f"end{number}"
    output.name = last
    onnx.save(model, tmp_path / "m.onnx")
    assert OnnxClassifier.load(tmp_path / "m.onnx").gives == "probabilities"
    model.graph.node.append(onnx.helper.make_node("Log", [last], ["log"]))
    output.name = "log"
    onnx.save(model, tmp_path / "m.onnx")
    assert OnnxClassifier.load(tmp_path / "m.onnx").gives == "logits"


def test_loaded_probabilities_become_logits_up_to_a_shift(whole: tuple[Classifier, ExportResult]) -> None:
    model, result = whole
    images = torch.from_numpy(SPLITS.test.images)
    logits = OnnxClassifier.load(result.path)(images)
    with torch.inference_mode():
        shift = model(images) - logits
    assert torch.allclose(shift, shift[:, :1].expand_as(shift), atol=1e-4)


def test_counts_separate_preprocessing_from_the_network(whole: tuple[Classifier, ExportResult]) -> None:
    counted = count_model(onnx.load(whole[1].path))
    assert abs(counted.preprocessing_bytes - 4 * (768 + 768 * 768)) < 200
    assert counted.network_bytes < 5000
    # conv 3→4 on 16×16, conv 4→8 on 8×8, linear 8→5
    assert counted.macs == 16 * 16 * 4 * 27 + 8 * 8 * 8 * 36 + 40


@pytest.mark.parametrize("side", [pytest.param(16, marks=pytest.mark.slow), 25])
def test_nin_export_with_ceil_mode_pooling(side: int, tmp_path: Path) -> None:
    model = classifier("nin", "mean-image", side=side)
    result = exported(tmp_path, model)
    assert result.parity.images == 30
    assert result.parity.same_top1 + result.parity.ties == 30
    assert result.parity.largest_difference <= 1e-4 * result.parity.scale


@pytest.mark.parametrize("corruption", ["weight", "nan", "class order"])
def test_wrong_weights_are_never_written(
    corruption: str,
    plain: tuple[Classifier, ExportResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole_model = onnx.load(plain[1].path)

    def corrupted(model: object, **settings: object) -> onnx.ModelProto:
        broken = onnx.ModelProto()
        broken.CopyFrom(whole_model)
        tensors = {
            tensor.name.split(".", 1)[1]: tensor for tensor in broken.graph.initializer if "." in tensor.name
        }
        name = "ip2.weight" if corruption == "class order" else "conv1.weight"
        values = onnx.numpy_helper.to_array(tensors[name]).copy()
        if corruption == "weight":
            values[0, 0, 0, 0] += 0.05
        elif corruption == "nan":
            values[0, 0, 0, 0] = np.nan
        else:
            values = values[::-1].copy()
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(values, tensors[name].name))
        return broken

    monkeypatch.setattr(exporter, "to_onnx", corrupted)
    earlier = tmp_path / "model.onnx"
    earlier.write_bytes(b"an earlier file")
    with pytest.raises(KdError, match="differs from the checkpoint"):
        exported(tmp_path, plain[0])
    assert earlier.read_bytes() == b"an earlier file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pt"]


WRONG_AT = [  # network, with its preprocessing, number of the node that gets a wrong constant, who is to blame
    ("lenet", False, 0, "conv1"),
    ("lenet", False, 2, "conv2"),
    ("lenet", True, -2, "ip2"),  # before the softmax
    ("lenet", True, 2, "preprocess"),
    (
        "convnet-tiny",
        False,
        0,
        "features.0 and features.1",
    ),  # batch norm is part of the convolution in the file
    ("convnet-tiny", False, -1, "fc"),
    pytest.param("nin", False, 2, "cccp1", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("arch", "raw", "number", "layer"), WRONG_AT)
def test_parity_error_names_the_first_differing_layer(
    arch: str, raw: bool, number: int, layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupted(model: onnx.ModelProto, metadata: dict[str, str]) -> bytes:
        broken = onnx.load_from_string(file_bytes(model, metadata))
        node = broken.graph.node[number]
        tensor = next(one for one in broken.graph.initializer if one.name in node.input)
        values = onnx.numpy_helper.to_array(tensor)
        values = (1.5 * values + 0.5).astype(values.dtype)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        return broken.SerializeToString()

    monkeypatch.setattr(job, "file_bytes", corrupted)
    with pytest.raises(KdError, match=f"first in layer {layer} \\(allowed"):
        exported(tmp_path, classifier(arch), with_preprocessing=raw)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_parity_runs_every_optimisation_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is right only where it is optimised is not written."""
    tried: list[str] = []
    wrong = ""

    class Runner(OnnxRunner):
        def __init__(self, *args: Any, level: str = "all", **more: Any) -> None:
            super().__init__(*args, level=level, **more)
            self.level = level
            tried.append(level)

        def run(self, *args: Any) -> np.ndarray:
            return super().run(*args) + (self.level == wrong)

    monkeypatch.setattr(parity, "OnnxRunner", Runner)
    exported(tmp_path, classifier("lenet"))
    assert tried == ["none", "basic", "extended", "all"]
    for wrong in tried[:4]:
        with pytest.raises(KdError, match=f"at batch 1, optimisation {wrong}"):
            exported(tmp_path, classifier("lenet"))


def test_parity_allows_a_ten_thousandth_of_the_largest_logit(plain: tuple[Classifier, ExportResult]) -> None:
    model, result = plain
    images = torch.from_numpy(SPLITS.test.images[:7])
    module = ExportedModule(model, with_preprocessing=False)
    with torch.inference_mode():
        inputs = np.ascontiguousarray(model.prepare(images).numpy())
        logits = model(images)
    content = result.path.read_bytes()
    unit = 1e-4 * logits.abs().max().item()
    for share in (0.5, -0.5):
        parity.check_parity(content, module, onnx.load(result.path), inputs, logits + share * unit, (1, 7))
    for share in (2, -2):
        with pytest.raises(KdError, match="differs from the checkpoint"):
            parity.check_parity(
                content, module, onnx.load(result.path), inputs, logits + share * unit, (1, 7)
            )


def test_parity_allows_another_class_only_in_a_tie(
    plain: tuple[Classifier, ExportResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, result = plain
    images = SPLITS.test.images[:7]
    with torch.inference_mode():
        inputs = np.ascontiguousarray(model.prepare(torch.from_numpy(images)).numpy())
        logits = model(torch.from_numpy(images))
    module = ExportedModule(model, with_preprocessing=False)
    # a further class that is just behind the first of image 0 in the file, just before it in the checkpoint
    scale = logits.abs().max().item()
    top = logits[0].max().item()

    def run(behind: float, before: float) -> parity.Parity:
        monkeypatch.setattr(
            parity,
            "run",
            lambda runner, inputs, batch, probabilities: torch.cat(
                [
                    real(runner, inputs, batch, probabilities=probabilities),
                    torch.full((len(inputs), 1), top - behind),
                ],
                dim=1,
            ),
        )
        expected = torch.cat([logits, torch.full((len(logits), 1), top + before)], dim=1)
        content = result.path.read_bytes()
        return parity.check_parity(content, module, onnx.load(result.path), inputs, expected, (1, 7))[1]

    real = parity.run
    near, far = 0.2 * parity.TIE * scale, 5 * parity.TIE * scale
    assert run(near, near).ties >= 1
    with pytest.raises(KdError, match="another class"):
        run(near, far)


@pytest.mark.parametrize("name", [name for name in PREPROCESSES if name not in ("scale-shift", "photo")])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_preprocessing_as_text_round_trip(name: str, order: str) -> None:
    made = fit(name, SPLITS.train.images[:, :6, :6], channel_order=order)
    text = encode_preprocess(made)
    again = decode_preprocess(text)
    pixels = torch.rand(2, 3, 6, 6) * 255
    assert again is not None
    assert torch.equal(again(pixels), made(pixels))
    assert decode_preprocess(encode_preprocess(made, most_values=0)) is None or name == "none"


def test_disjoint_indices_of_parity_and_calibration() -> None:
    check, calibration, _ = disjoint_indices(100, 30, 60)
    assert (len(check), len(calibration)) == (30, 60)
    assert not set(check) & set(calibration)
    check, calibration, _ = disjoint_indices(9, 30, 60)
    assert not set(check) & set(calibration)
    assert len(check) + len(calibration) == 9
    assert len(disjoint_indices(9, 30, 0)[0]) == 9


def test_default_output() -> None:
    config = ExportConfig()
    assert default_output(Path("runs/kd-lenet-1/student.pt"), config) == Path("exports/kd-lenet-1.onnx")
    assert default_output(Path("student.pt"), config) == Path("exports/student.onnx")
    assert default_output(Path("w/t.pt"), config, int8=True) == Path("exports/t-int8.onnx")
    assert default_output(Path("w/t.pt"), ExportConfig(opset=21)) == Path("exports/t-opset21.onnx")


def test_export_errors(tmp_path: Path) -> None:
    model = classifier("convnet-tiny")
    with pytest.raises(UsageError, match=r"\.onnx"):
        exported(tmp_path, model, output=tmp_path / "model.pt")
    with pytest.raises(KdError, match="takes 16×16×3"):
        export(load(tmp_path / "model.pt"), ExportConfig(output=tmp_path / "m.onnx"), random_splits(8))
    model.provenance = {}
    model.save(tmp_path / "model.pt")
    with pytest.raises(KdError, match="no data set recorded in") as caught:
        export(load(tmp_path / "model.pt"), ExportConfig(output=tmp_path / "m.onnx"))
    assert "--data" in caught.value.hint
    few = replace(SPLITS, train=random_splits(count=3).train)
    with pytest.raises(KdError, match="at least 8"):
        export(load(tmp_path / "model.pt"), ExportConfig(output=tmp_path / "m.onnx"), few)
    assert not (tmp_path / "m.onnx").exists()


def test_foreign_files(tmp_path: Path, plain: tuple[Classifier, ExportResult]) -> None:
    path = tmp_path / "foreign.onnx"
    model = onnx.load(plain[1].path)
    del model.metadata_props[:]
    onnx.save(model, path)
    foreign = OnnxClassifier.load(path)
    assert foreign.classes == ("0", "1", "2", "3", "4")
    ones = np.ones((2, 3, 16, 16), np.float32)
    assert foreign.run(ones).shape == (2, 5)
    with pytest.raises(KdError, match="no preprocessing recorded"):
        foreign(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))

    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    with pytest.raises(KdError, match="other files"):
        OnnxClassifier.load(path)
    whole = OnnxClassifier.load(path, external=True)
    assert whole.file_bytes == path.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    assert np.array_equal(whole.run(ones), foreign.run(ones))
    for content in (b"", b"not a model", b"\x08\x0a" + bytes(100), plain[1].path.read_bytes()[:5000]):
        path.write_bytes(content)
        with pytest.raises(KdError):
            OnnxClassifier.load(path)
    with pytest.raises(KdError, match="no such file"):
        OnnxClassifier.load(tmp_path / "nothing.onnx")


def test_external_weights_are_read_from_the_models_folder_only(
    tmp_path: Path, plain: tuple[Classifier, ExportResult]
) -> None:
    path, weights, secret = tmp_path / "a" / "m.onnx", tmp_path / "a" / "w.bin", tmp_path / "secret"
    path.parent.mkdir()
    onnx.save(
        onnx.load(plain[1].path), path, save_as_external_data=True, size_threshold=0, location=weights.name
    )
    secret.write_bytes(weights.read_bytes())

    def refused(change: Callable[[onnx.TensorProto], None], why: str) -> None:
        model = onnx.load_model(path, load_external_data=False)
        change(model.graph.initializer[0])
        hostile = path.with_name("hostile.onnx")
        hostile.write_bytes(model.SerializeToString())
        with pytest.raises(KdError, match=why):
            OnnxClassifier.load(hostile, external=True)

    def entry(key: str, value: str) -> Callable[[onnx.TensorProto], None]:
        def change(tensor: onnx.TensorProto) -> None:
            next(entry for entry in tensor.external_data if entry.key == key).value = value

        return change

    path.with_name("link").symlink_to(secret)
    for location in ("../secret", str(secret), "..", "", ".", "a\\b", "nothing", "link"):
        refused(entry("location", location), "cannot be read")
    for key, value in (("offset", "-4"), ("offset", "99999999"), ("length", "4"), ("length", str(2**40))):
        refused(entry(key, value), "cannot be read")
    refused(entry("offset", "x"), "cannot be read")


def test_damaged_metadata_is_an_error(tmp_path: Path, plain: tuple[Classifier, ExportResult]) -> None:
    for key, value in (
        ("kd.classes", "[1"),
        ("kd.preprocess", "[]"),
        ("kd.preprocess", encode_preprocess(MeanImage(torch.zeros(1, 5, 7)))),
        ("kd.provenance", '{"a": ' * 900 + "1" + "}" * 900),
        ("kd.provenance", "3"),
        ("kd.classes", "[]"),
        ("kd.input_size", "16"),
        ("kd.input_size", "[16, 17, 3]"),
    ):
        model = onnx.load(plain[1].path)
        for entry in model.metadata_props:
            if entry.key == key:
                entry.value = value
        onnx.save(model, tmp_path / "x.onnx")
        with pytest.raises(KdError, match="has invalid metadata"):
            OnnxClassifier.load(tmp_path / "x.onnx")


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "DOUBLE", "UINT8"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("opset", [9, 13, 21])
def test_inputs_of_any_layout_and_type(kind: str, layout: str, opset: int, tmp_path: Path) -> None:
    """Global mean of each channel, whatever the input looks like; TensorFlow's exporter writes NHWC."""
    helper, proto = onnx.helper, onnx.TensorProto
    shape = ["n", 3, 6, 5] if layout == "NCHW" else ["n", 6, 5, 3]
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=proto.FLOAT)]
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", ["f"], ["c"], perm=[0, 3, 1, 2]))
    nodes += [
        helper.make_node("GlobalAveragePool", ["f" if layout == "NCHW" else "c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", getattr(proto, kind), shape)],
        [helper.make_tensor_value_info("y", proto.FLOAT, ["n", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, tmp_path / "x.onnx")
    loaded = OnnxClassifier.load(tmp_path / "x.onnx")
    assert loaded.layout == layout
    assert loaded.input_size == (6, 5, 3)
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    given = loaded.run(loaded.to_layout(images))
    np.testing.assert_allclose(given, images.astype(float).mean((1, 2)), rtol=1e-3)
    assert (loaded.why_not_runnable is None) == (kind == "UINT8")
    if kind == "UINT8":
        np.testing.assert_allclose(loaded(torch.from_numpy(images)).numpy(), given)


def test_fixed_batch_is_padded(tmp_path: Path, plain: tuple[Classifier, ExportResult]) -> None:
    result = exported(tmp_path, plain[0], batch=3)
    three = OnnxClassifier.load(result.path)
    assert three.runner.batch == 3
    assert three.classes == CLASSES
    for count in (1, 3, 7):
        images = torch.from_numpy(SPLITS.test.images[:count])
        given = three(images)
        assert given.shape == (count, 5)
        assert torch.allclose(given, OnnxClassifier.load(plain[1].path)(images), atol=1e-6)
    assert count_model(three.model).macs == count_model(OnnxClassifier.load(plain[1].path).model).macs
    huge = onnx.load(result.path)
    huge.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**40
    onnx.save(huge, tmp_path / "huge.onnx")
    with pytest.raises(KdError, match="images at a time"):
        OnnxClassifier.load(tmp_path / "huge.onnx")


def test_fixed_batch_of_one(tmp_path: Path, plain: tuple[Classifier, ExportResult]) -> None:
    model = onnx.load(plain[1].path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "one.onnx")
    one = OnnxClassifier.load(tmp_path / "one.onnx")
    images = torch.from_numpy(SPLITS.test.images[:5])
    assert one.runner.batch == 1
    assert torch.allclose(one(images), OnnxClassifier.load(plain[1].path)(images), atol=1e-6)
