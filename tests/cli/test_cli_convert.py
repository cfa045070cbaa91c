"""kd convert-caffe and kd validate, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from kdcli import models
from kdcli.base.errors import KdError, UsageError
from kdcli.cli import convert_caffe, output, validate
from tests.caffe.test_caffe import TRANSFORMED
from tests.caffe_files import FC, IMAGES, INPUT, field, layer, net, small, write
from tests.helpers import command_line


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return command_line(monkeypatch, convert_caffe, validate)


@pytest.fixture
def pictures(workplace: Path) -> str:
    """12×12 colour images of five classes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 3)):
        for name in "abcde":
            folder = workplace / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return "pictures"


def test_convert_and_validate(run: Any, workplace: Path, pictures: str) -> None:
    pytest.importorskip("cv2")
    write(workplace, net(small(), v1=True))
    done = run("convert-caffe", "net.caffemodel", "--data", pictures)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert "5 classes, preprocessing none bgr" in lines[-3]
    assert "wrote weights/teacher.pt" in lines
    assert "next: kd validate --data pictures --against net.caffemodel" in lines
    teacher = models.load(Path("weights/teacher.pt"))
    assert teacher.classes == tuple("abcde")

    done = run("validate", "--data", pictures, "--against", "net.caffemodel")
    assert done.exit_code == 0
    assert "pass" in done.stdout
    assert "published" in done.stdout


def test_json_is_one_object(
    run: Any, workplace: Path, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cv2")
    write(workplace, net(small(), v1=False, inputs=INPUT))
    told = json.loads(run("convert-caffe", "net.caffemodel", "--json", "-o", "t.pt").stdout)
    assert told["schema_version"] == 1
    assert told["preprocess"] == {"name": "none", "channel_order": "bgr"}
    assert told["parameters"] == models.parameter_count(models.load(Path("t.pt")).network)

    options = ["validate", "--teacher", "t.pt", "--data", pictures, "--against", "net.caffemodel", "--json"]
    told = json.loads(run(*options).stdout)
    assert told["against"]["holds"] is True
    assert told["against"]["images"] == 15
    assert told["test"]["count"] == 15
    assert told["published"] is None

    teacher = models.load(Path("t.pt"))
    with torch.no_grad():
        teacher.network.get_parameter("ip.weight").mul_(1.01)
    teacher.save(Path("t.pt"))
    documents: list[dict[str, Any]] = []
    monkeypatch.setattr(output, "json", documents.append)
    with pytest.raises(KdError, match="logits differ by up to"):
        run(*options)
    assert documents[0]["against"]["holds"] is False


def test_convert_reads_data_only_if_needed(run: Any, workplace: Path) -> None:
    write(workplace, net(small(), v1=False, inputs=INPUT))
    assert run("convert-caffe", "net.caffemodel").exit_code == 0  # cifar10 is not here


def test_convert_missing_data_error_names_reason(run: Any, workplace: Path) -> None:
    write(workplace, net(small(), v1=True))
    with pytest.raises(
        KdError, match="does not record its input size, and CIFAR-10 not found in data"
    ) as raised:
        run("convert-caffe", "net.caffemodel")
    assert "--image-size" in raised.value.hint
    assert run("convert-caffe", "net.caffemodel", "--image-size", "12").exit_code == 0


def test_a_missing_mean_file_is_an_error(run: Any, workplace: Path) -> None:
    """The default data set is not that of any network."""
    Path("t.prototxt").write_text(TRANSFORMED % 'mean_file: "m.binaryproto"')
    write(workplace, net([small()[2], FC], v1=False))
    words = ("convert-caffe", "net.caffemodel", "--prototxt", "t.prototxt")
    with pytest.raises(UsageError, match=r"m\.binaryproto, the mean image of net\.caffemodel, is not in"):
        run(*words)
    assert run(*words, "--mean", "104,117,123").exit_code == 0


def test_image_size_is_that_of_the_network(run: Any, workplace: Path) -> None:
    write(workplace, net(small(), v1=True, inputs=INPUT))
    assert run("convert-caffe", "net.caffemodel", "--image-size", "12").exit_code == 0
    with pytest.raises(UsageError, match="takes 12×12×3 images"):
        run("convert-caffe", "net.caffemodel", "--image-size", "64")


def test_mismatched_data_is_an_error(run: Any, workplace: Path, pictures: str) -> None:
    write(workplace, net([small()[2], {**FC, "bottoms": ["conv1"]}], v1=False), "net.caffemodel")
    with pytest.raises(KdError, match="layer fc: weight in the file is 2×6"):
        run("convert-caffe", "net.caffemodel", "--data", pictures)
    write(workplace, net(small(), v1=False, inputs=INPUT))
    run("convert-caffe", "net.caffemodel")
    with pytest.raises(KdError, match="takes 12×12×3 images, the data has 10×10×3"):
        run("validate", "--data", pictures, "--image-size", "10")
    with pytest.raises(KdError, match="No such file"):
        run("convert-caffe", "elsewhere.caffemodel")
    assert list(Path("weights").iterdir()) == [Path("weights/teacher.pt")]


def test_convert_grey_network_takes_size_from_data(run: Any, workplace: Path, pictures: str) -> None:
    values = np.random.default_rng(1).normal(0, 0.1, (6, 1, 3, 3)).astype(np.float32)
    convolution = {**small()[2], "blobs": (values, np.zeros(6, np.float32))}
    inner = np.random.default_rng(2).normal(0, 0.1, (5, 6 * 10 * 10)).astype(np.float32)
    layers = [convolution, {**small()[-3], "bottoms": ["conv1"], "blobs": (inner, np.zeros(5, np.float32))}]
    convolution["param"] = field(1, 6) + field(4, 3)
    write(workplace, net(layers, v1=True))
    assert run("convert-caffe", "net.caffemodel", "--data", pictures).exit_code == 0
    assert models.load(Path("weights/teacher.pt")).input_size == (12, 12, 1)
    done = run("validate", "--data", pictures)
    assert "n = 15" in done.stdout


def test_check_and_onnx_at_once(run: Any, workplace: Path, pictures: str) -> None:
    pytest.importorskip("cv2")
    write(workplace, net(small(), v1=False, inputs=INPUT))
    done = run("convert-caffe", "net.caffemodel", "--check", "-o", "exports/net.onnx", "--data", pictures)
    assert done.exit_code == 0
    assert "on 84 images" in done.stdout  # 64 of noise and the 20 of the train split
    assert "next: kd bench exports/net.onnx" in done.stdout
    session = onnxruntime.InferenceSession("exports/net.onnx", providers=["CPUExecutionProvider"])
    images = torch.from_numpy(IMAGES)
    run("convert-caffe", "net.caffemodel", "-o", "t.pt")
    teacher = models.load(Path("t.pt"))
    with torch.inference_mode():
        prepared, logits = teacher.prepare(images).contiguous().numpy(), teacher(images).numpy()
    np.testing.assert_allclose(session.run(None, {"input": prepared})[0], logits, rtol=1e-4, atol=1e-3)
    assert not Path("weights").exists()
    told = json.loads(run("convert-caffe", "net.caffemodel", "--check", "-o", "x.onnx", "--json").stdout)
    assert told["check"]["holds"] is True
    assert told["check"]["images"] == 64
    assert told["output"] == "x.onnx"
    assert Path("x.onnx").is_file()


def test_check_tolerance_covers_float32_rounding(run: Any, workplace: Path) -> None:
    """Large values that nearly cancel out: both readings are right, and neither to 1e-4."""
    pytest.importorskip("cv2")
    random = np.random.default_rng(3)
    first = random.normal(0, 30, (40, 3 * 12 * 12)).astype(np.float32)
    first[20:] = first[:20] * np.float32(1.0001)
    second = np.concatenate([np.eye(20), -np.eye(20)], axis=1)[:5].astype(np.float32)
    ends = (np.zeros(40, np.float32), np.zeros(5, np.float32))
    layers = [
        layer("InnerProduct", "a", "data", "a", field(1, 40), (first, ends[0])),
        layer("InnerProduct", "b", "a", "b", field(1, 5), (second, ends[1])),
    ]
    write(workplace, net(layers, v1=False, inputs=INPUT))
    told = json.loads(run("convert-caffe", "net.caffemodel", "--check", "--json").stdout)["check"]
    assert told["largest_logit"] < 100
    assert 1e-4 < told["largest_difference"] < told["tolerance"] == pytest.approx(8 * told["rounding"])


def test_check_on_images_of_another_size(run: Any, workplace: Path, pictures: str) -> None:
    write(workplace, net(small(), v1=False, inputs=INPUT))
    with pytest.raises(KdError, match=r"takes 12×12×3 images, .* has 10×10×3"):
        run("convert-caffe", "net.caffemodel", "--check", "--data", pictures, "--image-size", "10")
    assert not Path("weights").exists()


def test_failed_check_writes_no_file(run: Any, workplace: Path) -> None:
    pytest.importorskip("cv2")
    norm = {"param": field(1, 3) + field(2, 0.1) + field(5, 2.0)}  # OpenCV takes k to be 1
    write(workplace, net(small(norm1=norm), v1=False, inputs=INPUT))
    with pytest.raises(KdError, match="OpenCV reads another network"):
        run("convert-caffe", "net.caffemodel", "--check")
    assert not Path("weights").exists()
    assert run("convert-caffe", "net.caffemodel").exit_code == 0
