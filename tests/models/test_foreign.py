"""Model files of other programs are named for what they are, with a way that works; nothing in them is run."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdcli.base.config import make
from kdcli.base.config.settings import InputSettings
from kdcli.base.errors import KdError
from kdcli.deploy.load import load_model
from kdcli.models.foreign import explain


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()


def script(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(network(), torch.zeros(1, 3, 8, 8)).save(str(path))


def keras(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, "{}")


def saved(content: Any, **options: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, **options)


WEIGHTS = network().state_dict()
HEADER = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
FILES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "plain": (saved(WEIGHTS), "a state_dict", "torchvision:NAME:.*/m.pt"),
    "plain dictionary": (saved(dict(WEIGHTS)), "a state_dict", "torchvision:NAME:.*/m.pt"),
    "parallel": (saved({f"module.{name}": value for name, value in WEIGHTS.items()}), "a state_dict", "torchvision"),
    "nested": (saved({"epoch": 1, "state_dict": WEIGHTS}), "a state_dict", "torchvision:NAME"),
    "module": (saved(network()), "a pickled PyTorch module", "runs no code"),
    "module in a dictionary": (saved({"model": network(), "ema": None}), "a pickled PyTorch module", "runs no code"),
    "legacy": (saved(WEIGHTS, _use_new_zipfile_serialization=False), "a state_dict", "torchvision:NAME"),
    "legacy module": (
        saved(network(), _use_new_zipfile_serialization=False), "a pickled PyTorch module", "program that defines",
    ),
    "TorchScript": (script, "a TorchScript program", "torch.jit.load"),
    "safetensors": (
        lambda path: path.write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + bytes(4)),
        "a safetensors file", "torchvision:NAME:.*/m.pt",
    ),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "an HDF5 file", 'format="onnx"'),
    "Keras": (keras, "a Keras model", 'format="onnx"'),
    "TensorFlow Lite": (lambda path: path.write_bytes(b"\x1c\0\0\0TFL3" + bytes(50)), "Lite model", "--tflite"),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        "a Git LFS pointer", "git lfs pull",
    ),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html>\n<html>"), "a web page", "raw"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", ["pt", "onnx"])
def test_a_foreign_file_is_named_with_a_way_that_works(tmp_path: Path, name: str, suffix: str) -> None:
    write, kind, way = FILES[name]
    path = tmp_path / f"m.{suffix}"
    write(path)
    with pytest.raises(KdError, match=f"is .*{kind}") as caught:
        load_model(path)
    assert str(path) in caught.value.message
    assert re.search(way.replace("m.pt", path.name), caught.value.hint), caught.value.hint


def test_a_saved_model_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "saved model").mkdir()
    assert explain(tmp_path / "saved model") is None
    (tmp_path / "saved model/saved_model.pb").write_bytes(b"\x08\x01")
    found = explain(tmp_path / "saved model")
    assert found is not None
    assert "is a TensorFlow SavedModel" in found.message
    assert f"--saved-model '{tmp_path}/saved model' --output model.onnx" in found.hint


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x05\x06" + bytes(18), b"\x80\x02}q\x00."])
def test_other_files_are_not_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    assert explain(tmp_path / "m.pt") is None
    with pytest.raises(KdError, match=r"m\.pt"):
        load_model(tmp_path / "m.pt")


@pytest.mark.slow
def test_the_printed_export_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = network()
    torch.save(given, "m.pt")
    found = explain(Path("m.pt"))
    assert found is not None
    [export] = re.findall(r"torch.onnx.export\(.*?False\)", found.hint)
    exec(export, {"torch": torch, "network": given})
    model = load_model(Path("model.onnx"), assumed=make(InputSettings, {"scale": "1/255"}))
    images = torch.randint(0, 256, (3, 224, 224, 3), dtype=torch.uint8)
    expected = given(images.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
