"""kd export, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from kdcli import data, models
from kdcli.base.errors import KdError, UsageError
from kdcli.cli import bench, export, test, train
from tests.helpers import command_line, digits_student, image_folder


@pytest.fixture
def kd(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return command_line(monkeypatch, export, bench)


def test_export_verifies_and_suggests_next_command(kd: Any, workplace: Path) -> None:
    source = digits_student(Path("runs/kd-1/student.pt"))
    done = kd("export", str(source))
    assert done.exit_code == 0
    assert "verified on 256 training images of digits, batches 1, 2, 7" in done.stdout
    assert "top-1 class: 256 of 256 equal" in done.stdout
    assert "wrote exports/kd-1.onnx" in done.stdout
    assert done.stdout.splitlines()[-1] == "next: kd bench exports/kd-1.onnx --teacher runs/kd-1/student.pt"
    assert max(map(len, done.stdout.splitlines())) <= 80
    images = data.load("digits").test.images[:9]
    model = models.load(source)
    with torch.inference_mode():
        prepared = np.ascontiguousarray(model.prepare(torch.from_numpy(images)).numpy())
        expected = model(torch.from_numpy(images)).numpy()
    session = ort.InferenceSession("exports/kd-1.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"input": prepared})[0], expected, atol=1e-5)


def test_json_of_an_int8_export(kd: Any, workplace: Path) -> None:
    digits_student(Path("student.pt"))
    done = kd("export", "student.pt", "--int8", "--with-preprocessing", "-o", "app/m.onnx", "--json")
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert document["path"] == "app/m.onnx"
    assert document["size_bytes"] == Path("app/m.onnx").stat().st_size
    assert document["parity"]["images"] == 256
    assert document["quantisation"]["calibration_images"] == 512
    assert 0 <= document["quantisation"]["agreement"] <= 100


def test_export_usage_errors(kd: Any, workplace: Path) -> None:
    digits_student(Path("student.pt"))
    for words in (("--opset", "17"), ("--parity-images", "3"), ("--output", "x.pt")):
        with pytest.raises(UsageError):
            kd("export", "student.pt", *words)
    assert sorted(path.name for path in workplace.iterdir()) == ["student.pt"]


def test_skip_broken_is_recorded(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = command_line(monkeypatch, train, test, export)
    image_folder(Path("images"))
    Path("images/test/class-1/3.png").write_bytes(b"\x89PNG and no more")
    words = "--data images --method ce --student convnet-tiny --epochs 1 --precision 32 --threads 1 --name a"
    assert run("train", *words.split(), "--skip-broken").exit_code == 0
    assert json.loads(run("test", "runs/a/student.pt", "--json").stdout)["test"]["count"] == 29
    assert run("export", "runs/a/student.pt").exit_code == 0
    with pytest.raises(KdError, match=r"3\.png"):
        run("test", "runs/a/student.pt", "--data", "images")
