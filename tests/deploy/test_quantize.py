"""int8: what is quantised, what is not, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from kdcli.base.errors import KdError
from kdcli.deploy import int8
from kdcli.deploy.export import ExportResult
from kdcli.deploy.export.job import disjoint_indices
from kdcli.deploy.onnx_model import OnnxClassifier, count_model
from kdcli.models import Classifier
from tests.deploy.helpers import SPLITS, classifier, exported


def test_weights_are_int8_per_channel_and_whitening_stays_float(
    whitened: tuple[Classifier, ExportResult],
) -> None:
    model = onnx.load(whitened[1].path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {
        name: t for name, t in tensors.items() if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1
    }
    assert sorted(tuple(t.dims) for t in weights.values()) == [
        (5, 500),
        (20, 3, 5, 5),
        (50, 20, 5, 5),
        (500, 50),
    ]
    first = next(
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and "conv1.weight" in node.name
    )
    assert list(tensors[first.input[1]].dims) == [20]  # a scale for each output channel
    assert tensors["preprocess.whiten"].data_type == onnx.TensorProto.FLOAT
    produced = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.name.startswith("preprocess/"):
            assert all("Quantize" not in produced[name].op_type for name in node.input if name in produced)


def test_int8_outputs_and_size(whitened: tuple[Classifier, ExportResult]) -> None:
    model, result = whitened
    cost = result.quantisation
    assert cost is not None
    assert (cost.images, cost.calibration_images) == (30, 20)
    # of the training images: whitening fitted on 60 samples blows up whatever else is in an image
    images = torch.from_numpy(SPLITS.train.images)
    given = OnnxClassifier.load(result.path)(images).log_softmax(dim=1)
    with torch.inference_mode():
        expected = model(images).log_softmax(dim=1)
    assert (given - expected).abs().max() < 0.1 * (expected.max() - expected.min())
    assert not torch.allclose(given, expected, atol=1e-6)  # it was quantised
    counted = count_model(onnx.load(result.path))
    floats = sum(value.numel() for value in model.network.state_dict().values())
    assert counted.parameters == floats
    assert counted.network_bytes < 0.4 * 4 * floats


def test_int8_accuracy_is_measured_on_the_parity_images(whitened: tuple[Classifier, ExportResult]) -> None:
    model, result = whitened
    chosen, *_ = disjoint_indices(len(SPLITS.train), 30, 20)
    raw = torch.from_numpy(SPLITS.train.images[chosen])
    labels = SPLITS.train.labels[chosen]
    with torch.inference_mode():
        floats = model(raw).argmax(dim=1).numpy()
    ints = OnnxClassifier.load(result.path)(raw).argmax(dim=1).numpy()
    assert result.quantisation is not None
    assert result.quantisation.agreement == pytest.approx(100 * np.mean(floats == ints))
    assert result.quantisation.float_accuracy == pytest.approx(100 * np.mean(floats == labels))
    assert result.quantisation.int8_accuracy == pytest.approx(100 * np.mean(ints == labels))


def test_int8_metadata_renames_float_figures(
    whitened: tuple[Classifier, ExportResult],
) -> None:
    loaded = OnnxClassifier.load(whitened[1].path)
    assert whitened[0].provenance["test_accuracy"] == 61.5
    assert "kd.test_accuracy" not in loaded.metadata and "test_accuracy" not in loaded.provenance
    assert loaded.metadata["kd.float_test_accuracy"] == "61.5"
    assert loaded.provenance["float_test_accuracy"] == 61.5
    said = json.loads(loaded.metadata["kd.quantisation"])
    assert whitened[1].quantisation is not None
    assert said["int8_accuracy"] == whitened[1].quantisation.int8_accuracy
    assert (said["images"], said["calibration_images"]) == (30, 20)


@pytest.mark.parametrize(
    ("machine", "flags", "needed"),
    [
        ("x86_64", ["avx2"], True),
        ("x86_64", ["avx2", "avx512_vnni"], False),
        ("AMD64", ["avx2", "avx_vnni"], False),
        ("aarch64", [], False),
    ],
)
def test_needs_reduced_range(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: list[str], needed: bool
) -> None:
    monkeypatch.setattr(int8.platform, "machine", lambda: machine)
    monkeypatch.setattr(int8, "cpu_info", lambda: {"flags": flags})
    assert int8.needs_reduced_range() == needed


def test_failed_quantisation_leaves_no_file(
    whitened: tuple[Classifier, ExportResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise KdError("the network cannot be quantised: so there")

    monkeypatch.setattr(int8.Quantiser, "quantise", fail)
    with pytest.raises(KdError, match="so there"):
        exported(tmp_path, classifier("convnet-tiny"), int8=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
