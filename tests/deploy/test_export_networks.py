"""Networks in every form they are exported in, under the onnxruntime here and the oldest allowed.

Of the deep families, whose files take long to write, tests/test_networks.py exports one each.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcli import models
from kdcli.base.config import ExportConfig
from kdcli.deploy.export import export, exporter
from kdcli.deploy.onnx_model.translate import to_onnx
from kdcli.models import Classifier
from tests.caffe_files import converted, net, small, write
from tests.deploy.helpers import SPLITS, classifier, exported, random_splits

DEEP = ("resnet", "vgg", "mobilenet", "shufflenet")
ARCHS = [arch for arch, row in models.MODELS.items() if row.func.__module__.split(".")[-1] not in DEEP]
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {"int8": True, "calibration_images": 20},
    "images": {"with_preprocessing": True},
    "images-int8": {"with_preprocessing": True, "int8": True, "calibration_images": 20},
    "batch": {"batch": 4},
}


def make(arch: str, folder: Path) -> Classifier:
    if arch == "graph":
        return converted(write(folder, net(small(), v1=False))).eval()
    return classifier(arch, side=32 if arch == "cifarnet" else 16)


def write_all(folder: Path, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Path]:
    """All files, each with an .npz beside it of its input and its checkpoint's output."""
    made = {}
    for arch, form in pairs:
        place = folder / f"{arch}-{form}"
        place.mkdir()
        model = make(arch, place)
        if arch == "graph":
            model.classes = tuple(f"class {number}" for number in range(5))
        result = exported(place, model, **FORMS[form])
        images = torch.from_numpy(random_splits(model.input_size[0]).test.images)
        with torch.inference_mode():
            logits = model(images)
            prepared = model.prepare(images).contiguous()
        raw = "images" in form
        np.savez(
            place / "expected.npz",
            given=images.numpy() if raw else prepared.numpy(),
            expected=(logits.softmax(1) if raw else logits).numpy(),
        )
        made[arch, form] = result.path
    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every network in every form."""
    return write_all(tmp_path_factory.mktemp("networks"), [(arch, form) for arch in ARCHS for form in FORMS])


RUN = """
import json, sys
import numpy as np, onnxruntime as ort
found = {}
for path in sys.argv[1:]:
    stored = np.load(path.replace("model.onnx", "expected.npz"))
    found[path] = {}
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.log_severity_level = 4
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        [taken] = session.get_inputs()
        batch = taken.shape[0] if isinstance(taken.shape[0], int) else 5
        given = stored["given"]
        parts = [session.run(None, {taken.name: given[i : i + batch]})[0] for i in range(0, len(given), batch)]
        found[path][level] = np.concatenate(parts).tolist()
print(json.dumps([ort.__version__, found]))
"""


def run_all(
    paths: list[Path], environment: dict[str, str]
) -> tuple[str, dict[str, dict[str, list[list[float]]]]]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, paths)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    version, found = json.loads(done.stdout)
    return version, found


def check(written: dict[tuple[str, str], Path], found: dict[str, dict[str, list[list[float]]]]) -> None:
    for (arch, form), path in written.items():
        expected = np.load(path.with_name("expected.npz"))["expected"].astype(np.float64)
        spread = expected.max() - expected.min()
        for level, values in found[str(path)].items():
            off = np.abs(np.array(values) - expected).max()
            allowed = (
                0.25 if "int8" in form else 1e-5
            )  # int8 of random weights; what it costs is measured elsewhere
            assert off <= allowed * spread, (arch, form, level, off, spread)


def test_outputs_of_some_exports_equal_the_checkpoints(tmp_path: Path) -> None:
    """Three forms, a converted Caffe net among the networks; the slow test takes all."""
    pairs = [("graph", "fp32"), ("convnet-tiny", "int8"), ("lenet", "batch")]
    written = write_all(tmp_path, pairs)
    check(written, run_all(list(written.values()), {})[1])


@pytest.mark.slow
def test_outputs_of_all_exports_equal_the_checkpoints(
    written: dict[tuple[str, str], Path],
) -> None:
    assert len(written) == len(ARCHS) * len(FORMS)
    check(written, run_all(list(written.values()), {})[1])


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The oldest onnxruntime that pyproject.toml allows, in a folder of its own."""
    project = tomllib.loads(
        (Path(__file__).parent.parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    )
    [version] = [
        found[1]
        for line in project["project"]["dependencies"]
        if (found := re.fullmatch(r"onnxruntime>=([\d.]+)", line))
    ]
    folder = tmp_path_factory.mktemp("onnxruntime")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, f"onnxruntime=={version}"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"onnxruntime {version} cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
    return version, folder


@pytest.mark.slow
def test_outputs_under_the_oldest_onnxruntime(
    written: dict[tuple[str, str], Path], oldest: tuple[str, Path]
) -> None:
    version, folder = oldest
    used, found = run_all(list(written.values()), {"PYTHONPATH": str(folder)})
    assert used.split(".")[:2] == version.split(".")[:2]
    check(written, found)


@pytest.mark.parametrize(
    "form", [form if form == "int8" else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_export_is_reproducible(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "to_onnx", to_onnx)
    classifier("convnet-tiny").save(tmp_path / "model.pt")
    files = []
    for name in ("a.onnx", "b.onnx"):
        config = ExportConfig(output=tmp_path / name, parity_images=30, **FORMS[form])
        files.append(export(models.load(tmp_path / "model.pt"), config, SPLITS).path.read_bytes())
    assert files[0] == files[1]
