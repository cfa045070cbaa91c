"""ONNX files of other programs: layout, sides, outputs, names, and what the user says about their input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array
from PIL import Image

from kdcli.base.config import BenchConfig, InfoConfig, InputSettings, PredictConfig, make
from kdcli.base.errors import KdError, UsageError
from kdcli.deploy.bench.benchmark import candidates_of
from kdcli.deploy.info import info
from kdcli.deploy.load import load_model
from kdcli.deploy.onnx_model import OnnxClassifier, count_model
from kdcli.deploy.predict import predict

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(3, 4)).astype(np.float32)  # channels → classes
IMAGES = RANDOM.integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
node = helper.make_node


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, Any],
    sides: Sequence[Any],
    *,
    kind: int = TensorProto.FLOAT,
    outputs: Sequence[str] = ("y",),
    metadata: dict[str, str] | None = None,
    domains: dict[str, int] | None = None,
) -> Path:
    """A model from `x` to the outputs, whose sides are not declared."""
    values = [from_array(np.asarray(value), name) for name, value in weights.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, sides)], ends, values)
    opsets = [helper.make_opsetid(name, version) for name, version in {"": 18, **(domains or {})}.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return path


def means(
    path: Path, tail: Sequence[onnx.NodeProto] = (), axes: tuple[int, int] = (1, 2), **changes: Any
) -> Path:
    """Logits from the mean of each channel of uint8 (N, H, W, C), then `tail`, from `logits` to `y`."""
    nodes = [node("Cast", ["x"], ["f"], to=1), node("ReduceMean", ["f", "axes"], ["m"], keepdims=0)]
    nodes += [node("MatMul", ["m", "w"], ["logits"]), *(tail or [node("Identity", ["logits"], ["y"])])]
    weights = {"axes": np.array(axes, np.int64), "w": WEIGHT / 50, **changes.pop("weights", {})}
    settings = {"sides": ["n", 6, 8, 3], "kind": TensorProto.UINT8, **changes}
    return save(path, nodes, weights, settings.pop("sides"), **settings)


def logits(images: Any) -> Any:
    return images.astype(np.float64).mean(axis=(1, 2)) @ WEIGHT / 50


KERNEL = np.zeros((2, 3, 1, 1), np.float32)
TAIL = [node("GlobalAveragePool", ["c"], ["p"]), node("Flatten", ["p"], ["y"])]
TRANSPOSED = [node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), node("Conv", ["t", "k"], ["c"]), *TAIL]
SCALED = [node("Div", ["x", "s"], ["t"]), node("Conv", ["t", "k"], ["c"]), *TAIL]


@pytest.mark.parametrize(
    ("nodes", "sides", "layout"),
    [
        (TRANSPOSED, ["n", "h", "w", 3], "NHWC"),
        (TRANSPOSED, ["n", "h", "w", "c"], "NHWC"),
        (SCALED, ["n", 3, "h", "w"], "NCHW"),
        (SCALED, [-1, -1, -1, -1], "NCHW"),
        (SCALED, ["n", 3, 3, 3], "NCHW"),
    ],
)
def test_layout_is_what_the_sides_and_the_network_need(
    tmp_path: Path, nodes: list[onnx.NodeProto], sides: list[Any], layout: str
) -> None:
    weights = {"k": KERNEL, "s": np.float32(255)}
    path = save(tmp_path / "m.onnx", nodes, weights, sides)
    found = OnnxClassifier.load(path, assumed=make(InputSettings, {"image_size": 12}))
    assert found.layout == layout
    open_size = (
        (12, 12, 3) if isinstance(sides[2], str) or sides[2] < 0 else (3 if sides[1] == 3 else 4,) * 2 + (3,)
    )
    assert found.input_size == open_size


def test_layout_that_nothing_shows_is_an_error(tmp_path: Path) -> None:
    nodes = [node("Flatten", ["x"], ["f"]), node("MatMul", ["f", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"w": np.ones((27, 2), np.float32)}, ["n", 3, 3, 3])
    with pytest.raises(KdError, match="which side has the channels") as error:
        load_model(path)
    assert "--layout nchw" in str(error.value.hint)
    with pytest.raises(KdError) as error:
        load_model(path, assumed=make(InputSettings, {"image_size": 3}))
    assert load_model(path, assumed=make(InputSettings, {"layout": "nhwc"})).layout == "NHWC"  # type: ignore[union-attr]


def test_open_size_is_never_guessed(tmp_path: Path) -> None:
    weights = {"k": KERNEL}
    path = save(tmp_path / "m.onnx", TRANSPOSED, weights, ["n", "h", "w", 3])
    with pytest.raises(KdError, match="leaves the size") as error:
        load_model(path)
    assert "--image-size" in str(error.value.hint)
    assert load_model(path, input_size=(20, 24, 3)).input_size == (20, 24, 3)
    sized = save(tmp_path / "s.onnx", TRANSPOSED, weights, ["n", "h", "w", 3], metadata={"imgsz": "[16, 32]"})
    assert load_model(sized, input_size=(20, 24, 3)).input_size == (16, 32, 3)
    found = OnnxClassifier.load(path, input_size=(20, 24, 3))
    assert found.counts().macs == 20 * 24 * 2 * 3


SOFTMAXES = {
    "softmax": [node("Softmax", ["logits"], ["y"])],
    "mean of two": [
        node("Softmax", ["logits"], ["a"]), node("Mul", ["logits", "half"], ["l"]), node("Softmax", ["l"], ["b"]),
        node("Add", ["a", "b"], ["c"]), node("Mul", ["c", "half"], ["y"]),
    ],
    "written out": [
        node("Exp", ["logits"], ["e"]), node("ReduceSum", ["e", "one"], ["s"]), node("Div", ["e", "s"], ["y"]),
    ],
    "clipped": [node("Softmax", ["logits"], ["p"]), node("Clip", ["p", "low"], ["y"])],
}  # fmt: skip


@pytest.mark.parametrize("name", SOFTMAXES)
def test_outputs_that_add_up_to_one_are_probabilities(tmp_path: Path, name: str) -> None:
    weights = {"half": np.float32(0.5), "one": np.array([1]), "low": np.float32(1e-7)}
    found = OnnxClassifier.load(means(tmp_path / "m.onnx", SOFTMAXES[name], weights=weights))
    assert found.gives == "probabilities"
    wide, narrow = logits(IMAGES), logits(IMAGES) / 2

    def softmax(values: Any) -> Any:
        return np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)

    wanted = (softmax(wide) + softmax(narrow)) / 2 if name == "mean of two" else softmax(wide)
    given = found(torch.from_numpy(IMAGES)).double().softmax(dim=1).numpy()
    np.testing.assert_allclose(given, wanted, rtol=1e-4)


def test_log_probabilities_are_logits(tmp_path: Path) -> None:
    found = OnnxClassifier.load(means(tmp_path / "m.onnx", [node("LogSoftmax", ["logits"], ["y"])]))
    assert found.gives == "logits"


@pytest.mark.parametrize("clipped", [False, True])
def test_sigmoids_are_inverted(tmp_path: Path, clipped: bool) -> None:
    tail = [node("Sigmoid", ["logits"], ["s"]), node("Clip" if clipped else "Identity", ["s"], ["y"])]
    found = OnnxClassifier.load(means(tmp_path / "m.onnx", tail))
    assert found.gives == "sigmoids"
    np.testing.assert_allclose(found(torch.from_numpy(IMAGES)).numpy(), logits(IMAGES), atol=1e-3)


def test_pixel_format_of_the_metadata_is_applied(tmp_path: Path) -> None:
    key = "Image.BitmapPixelFormat"
    found = OnnxClassifier.load(means(tmp_path / "bgr.onnx", metadata={key: "Bgr8"}))
    given = found(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(given, logits(IMAGES[..., ::-1]), rtol=1e-4)
    overruled = OnnxClassifier.load(found.path, assumed=make(InputSettings, {"channel_order": "rgb"}))
    np.testing.assert_allclose(overruled(torch.from_numpy(IMAGES)).numpy(), logits(IMAGES), rtol=1e-4)
    with pytest.raises(KdError, match="Bgra8"):
        load_model(means(tmp_path / "bgra.onnx", metadata={key: "Bgra8"}))
    for form, scaled in (("Normalized_0_1", IMAGES / 255), ("NominalRange_0_255", IMAGES)):
        path = means(
            tmp_path / "range.onnx", kind=TensorProto.FLOAT, metadata={"Image.NominalPixelRange": form}
        )
        given = load_model(path)(torch.from_numpy(IMAGES)).numpy()
        np.testing.assert_allclose(given, logits(scaled), rtol=1e-4)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_input_as_the_user_describes_it(tmp_path: Path, layout: str, kind: int) -> None:
    """(pixel · scale − mean) / std in the network's channel order."""
    nhwc = layout == "nhwc"
    sides = ["n", 6, 8, 3] if nhwc else ["n", 3, 6, 8]
    path = means(tmp_path / "m.onnx", axes=(1, 2) if nhwc else (2, 3), sides=sides, kind=kind)
    values = {"scale": "1/255", "mean": "0.1,0.2,0.3", "std": [0.5, 0.25, 0.125], "channel_order": "bgr"}
    found = load_model(path, assumed=make(InputSettings, values))
    wanted = (IMAGES[..., ::-1] / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 0.125]
    tolerance = 2e-3 if kind == TensorProto.FLOAT16 else 1e-5
    np.testing.assert_allclose(found(torch.from_numpy(IMAGES)).numpy(), logits(wanted), atol=tolerance)
    with pytest.raises(KdError, match="no preprocessing recorded") as error:
        load_model(path)(torch.from_numpy(IMAGES))
    assert "--scale 1/255" in str(error.value.hint)
    assert "kd export" not in str(error.value.hint)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": "0.485,0.456,0.406", "std": 0.229}, "0–1"),
        ({"std": "0.5"}, "0–1"),
        ({"scale": "1/255", "mean": "123.68"}, "outside the pixels"),
        ({"scale": "1/0"}, "fraction"),
        ({"scale": "nan"}, "fraction"),
        ({"mean": "1,x"}, "number"),
        ({"std": "0"}, "above 0"),
    ],
)
def test_descriptions_of_an_input_that_cannot_be_meant(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(InputSettings, values)


def test_descriptions_that_do_not_fit_the_file(tmp_path: Path) -> None:
    path = means(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="uint8"):
        load_model(path, assumed=make(InputSettings, {"scale": "1/255"}))
    path = means(tmp_path / "f.onnx", kind=TensorProto.FLOAT)
    with pytest.raises(UsageError, match="2 values for 3 channels"):
        load_model(path, assumed=make(InputSettings, {"mean": "100,120"}))


def test_batch_statistics_are_refused(tmp_path: Path) -> None:
    norm = node("BatchNormalization", ["m", "g", "z", "z", "g"], ["b", "b2", "b3"], training_mode=1)
    nodes = [node("Cast", ["x"], ["f"], to=1), node("ReduceMean", ["f", "axes"], ["m"], keepdims=0)]
    nodes += [norm, node("MatMul", ["b", "w"], ["y"])]
    weights = {
        "axes": np.array([1, 2]),
        "w": WEIGHT,
        "g": np.ones(3, np.float32),
        "z": np.zeros(3, np.float32),
    }
    path = save(tmp_path / "m.onnx", nodes, weights, ["n", 6, 8, 3], kind=TensorProto.UINT8)
    with pytest.raises(KdError, match="alone than within a batch"):
        load_model(path)


def test_file_that_runs_singly_is_run_singly(tmp_path: Path) -> None:
    tail = [node("Reshape", ["logits", "one"], ["y"])]
    found = OnnxClassifier.load(means(tmp_path / "m.onnx", tail, weights={"one": np.array([1, 4])}))
    assert found.runner.batch == 1
    np.testing.assert_allclose(found(torch.from_numpy(IMAGES)).numpy(), logits(IMAGES), rtol=1e-4)


def test_batch_of_minus_one_is_open(tmp_path: Path) -> None:
    found = OnnxClassifier.load(means(tmp_path / "m.onnx", sides=[-1, 6, 8, 3]))
    assert found.runner.batch is None
    np.testing.assert_allclose(found(torch.from_numpy(IMAGES)).numpy(), logits(IMAGES), rtol=1e-4)


def test_output_of_the_classes_among_several(tmp_path: Path) -> None:
    tail = [node("Identity", ["m"], ["features"]), node("Identity", ["logits"], ["out"])]
    found = OnnxClassifier.load(means(tmp_path / "m.onnx", tail, outputs=["features", "out"]))
    np.testing.assert_allclose(found(torch.from_numpy(IMAGES)).numpy(), logits(IMAGES), rtol=1e-4)
    tail = [node("Identity", ["m"], ["a"]), node("Identity", ["logits"], ["b"])]
    with pytest.raises(KdError, match="several outputs"):
        load_model(means(tmp_path / "n.onnx", tail, outputs=["a", "b"]))


@pytest.mark.parametrize(
    ("sides", "message"), [([-1, 2, 2], "not a classifier"), ([-1, 1], "one number an image")]
)
def test_other_outputs_are_no_classifier(tmp_path: Path, sides: list[int], message: str) -> None:
    if len(sides) == 3:
        path = means(
            tmp_path / "m.onnx", [node("Reshape", ["logits", "s"], ["y"])], weights={"s": np.array(sides)}
        )
    else:
        path = means(tmp_path / "m.onnx", weights={"w": WEIGHT[:, :1]})
    with pytest.raises(KdError, match=message):
        load_model(path)


NAMES = ("ant", "bee", "cat's", "dog")


@pytest.mark.parametrize(
    ("metadata", "files", "source"),
    [
        ({"names": str(dict(enumerate(NAMES)))}, {}, "its metadata, names"),
        ({"id2label": json.dumps({str(n): name for n, name in enumerate(NAMES)})}, {}, "its metadata, id2label"),
        ({"classes": "\n".join(NAMES)}, {}, "its metadata, classes"),
        ({"classes": "4"}, {"labels.txt": "\n".join(NAMES) + "\n"}, "labels.txt"),
        ({}, {"labels.txt": "".join(f"{n} {name}\n" for n, name in enumerate(NAMES))}, "labels.txt"),
        ({}, {"config.json": json.dumps({"id2label": {str(n): s for n, s in enumerate(NAMES)}})}, "config.json"),
    ],
)  # fmt: skip
def test_class_names_of_exporters(
    tmp_path: Path, metadata: dict[str, str], files: dict[str, str], source: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    path = means(tmp_path / "m.onnx", metadata=metadata)
    found = load_model(path)
    assert found.classes == NAMES
    assert found.provenance["class_names"].endswith(source)
    own = tmp_path / "own.json"
    own.write_text('["p", "q", "r", "s"]', encoding="utf-8")
    given = load_model(path, assumed=make(InputSettings, {"class_names": own}))
    assert given.classes == ("p", "q", "r", "s")


@pytest.mark.parametrize("text", ["a\nb\n", "[" * 100_000, "{'a': __import__('os')}"])
def test_class_names_of_another_number(tmp_path: Path, text: str) -> None:
    file = tmp_path / "list.txt"
    file.write_text(text, encoding="utf-8")
    path = means(tmp_path / "m.onnx")
    with pytest.raises(KdError, match=r"names 2 classes|no class names"):
        load_model(path, assumed=make(InputSettings, {"class_names": file}))
    assert load_model(means(tmp_path / "m.onnx", metadata={"names": "(" * 50_000})).classes == tuple("0123")
    with pytest.raises(KdError, match="names 2 classes"):
        load_model(means(tmp_path / "m.onnx", metadata={"names": "{0: 'a', 1: 'b'}"}))


@pytest.mark.parametrize(("kind", "precision"), [(np.float16, "fp16"), (np.float32, "fp32")])
def test_precision_is_that_of_the_weights(tmp_path: Path, kind: type[Any], precision: str) -> None:
    """A float16 file with float32 input and output (keep_io_types)."""
    nodes = [node("Cast", ["x"], ["t"], to=10 if kind is np.float16 else 1), node("Conv", ["t", "k"], ["c"])]
    nodes += [*TAIL[:1], node("Flatten", ["p"], ["f"]), node("Cast", ["f"], ["y"], to=1)]
    path = save(tmp_path / "m.onnx", nodes, {"k": np.ones((4, 3, 3, 3), kind)}, ["n", 3, 8, 8])
    model = OnnxClassifier.load(path)
    [found], _ = candidates_of(path, "m", model, BenchConfig(), 1, is_teacher=True)
    assert found.row.precision == precision == info(str(path), InfoConfig()).precision


def test_weights_of_scikit_learn_are_attributes(tmp_path: Path) -> None:
    weights = RANDOM.normal(size=12).tolist()
    linear = helper.make_node(
        "LinearClassifier", ["m"], ["label", "y"], domain="ai.onnx.ml", coefficients=weights,
        intercepts=[0.0] * 4, classlabels_ints=[0, 1, 2, 3],
    )  # fmt: skip
    path = means(tmp_path / "m.onnx", [linear], domains={"ai.onnx.ml": 1})
    counts = count_model(OnnxClassifier.load(path).model)
    assert (counts.parameters, counts.network_bytes, counts.macs) == (12 + 4 + 12, 4 * 28 + 16, None)


def test_crop_as_the_user_describes_it(tmp_path: Path) -> None:
    path = means(tmp_path / "m.onnx", sides=["n", 8, 8, 3])
    assert load_model(path).resize == 0
    assert load_model(path, assumed=make(InputSettings, {"resize": 16})).resize == 16
    file = tmp_path / "image.png"
    image = np.zeros((16, 16, 3), np.uint8)
    image[4:12, 4:12] = 200
    Image.fromarray(image).save(file)
    config = make(PredictConfig, {"resize": 16, "top_k": 4})
    [found] = predict(load_model(path, assumed=config), [file], config)
    wanted = np.exp(logits(np.full((1, 8, 8, 3), 200)))[0]
    np.testing.assert_allclose(found.probabilities, sorted(wanted / wanted.sum(), reverse=True), rtol=1e-4)
