"""kd info: what is in a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from kdcli import models
from kdcli.base.config import ExportConfig, make
from kdcli.base.errors import KdError, UsageError
from kdcli.cli import info, test
from kdcli.data import preprocess
from kdcli.deploy.export import export_classifier
from kdcli.deploy.onnx_model.counts import count_model
from kdcli.models.layers import count_network, summarize_layers
from tests.helpers import command_line

PIXELS = np.random.default_rng(5).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)

# by hand: 5×5 convolutions without padding, each followed by 2×2 pooling; 16 → 12 → 6 → 2 → 1
LENET_CAFFE = {
    "conv1": ([20, 12, 12], 20 * (3 * 25 + 1), 20 * 12 * 12 * 75),
    "pool1": ([20, 6, 6], 0, 0),
    "conv2": ([50, 2, 2], 50 * (20 * 25 + 1), 50 * 2 * 2 * 500),
    "pool2": ([50, 1, 1], 0, 0),
    "ip1": ([500], 500 * 51, 500 * 50),
    "ip2": ([4], 4 * 501, 4 * 500),
}
PARAMETERS = sum(count for _, count, _ in LENET_CAFFE.values())
MACS = sum(work for _, _, work in LENET_CAFFE.values())


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return command_line(monkeypatch, info, test)


@pytest.fixture
def model(workplace: Path) -> models.Classifier:
    torch.manual_seed(0)
    made = models.Classifier(
        models.build("lenet-caffe", classes=4, input_size=(16, 16, 3)),
        preprocess.fit("mean-std", PIXELS),
        arch="lenet-caffe",
        arch_args={},
        classes=("ant", "bee\x1b[31m", "[red]cat", "dog"),
        input_size=(16, 16, 3),
        provenance={"method": "kd", "data": {"label": "toy", "image_size": None}, "published": None},
    ).eval()
    made.save(workplace / "m.pt")
    return made


def look(run: Any, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("info", *words, "--json").stdout)
    return found


def test_info_of_a_network_name(run: Any) -> None:
    found = look(run, "lenet-caffe", "--classes", "4", "--image-size", "16")
    rows = {row["name"]: (row["output"], row["parameters"], row["macs"]) for row in found["layers"]}
    assert rows == LENET_CAFFE
    assert (found["kind"], found["parameters"], found["macs"]) == ("network", PARAMETERS, MACS)
    assert found["input_size"] == [16, 16, 3]
    assert look(run, "lenet", "--grey", "--image-size", "28")["input_size"] == [28, 28, 1]
    assert look(run, "lenet")["parameters"] == 3_497_866


def test_work_of_attention_is_unknown(run: Any) -> None:
    """Its weights are used without calls of their layers: a sum over calls would be too low."""
    assert look(run, "torchvision:vit_b_32", "--classes", "4", "--image-size", "224")["macs"] is None


def test_work_of_an_unused_head_is_none() -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Sequential(nn.Linear(6, 7))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.body(images.flatten(1))

    assert count_network(WithHead(), torch.zeros(1, 3, 1, 2)).macs == 6 * 5


def test_info_of_a_checkpoint(run: Any, model: models.Classifier) -> None:
    found = look(run, "m.pt")
    rows = {row["name"]: (row["output"], row["parameters"], row["macs"]) for row in found["layers"]}
    assert rows == LENET_CAFFE
    content = Path("m.pt").read_bytes()
    assert found["sha256"] == hashlib.sha256(content).hexdigest()
    assert found["file_bytes"] == len(content)
    assert found["provenance"]["data"]["label"] == "toy"
    assert found["preprocess"]["name"] == "mean-std"
    assert found["preprocess"]["mean"] == pytest.approx(PIXELS.mean(axis=(0, 1, 2)), abs=1e-3)
    model.provenance["run"] = "other"
    model.save(Path("other.pt"))
    other = look(run, "other.pt")
    assert other["sha256"] != found["sha256"] and other["weights_sha256"] == found["weights_sha256"]
    out = run("info", "m.pt", "--classes", "7")
    assert "--classes has no effect with a file" in out.stderr
    for words in ("ant, bee [31m, [red]cat, dog", "data.label", "toy", f"{PARAMETERS:,}", "16×16×3"):
        assert words in " ".join(out.stdout.split()), words
    assert "published" not in out.stdout
    lines = out.stdout.splitlines()  # the summary, an empty line, the layers
    assert lines[0].split() == ["model", "m.pt"] and lines[lines.index("") + 1].startswith("layer")
    assert "\x1b" not in out.stdout  # a class name does not steer the terminal


@pytest.mark.parametrize("raw", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_info_of_an_exported_file(run: Any, model: models.Classifier, raw: bool) -> None:
    config = make(ExportConfig, {"output": Path("m.onnx"), "with_preprocessing": raw})
    export_classifier(model, config, PIXELS, "toy", lambda event: None)
    found = look(run, "m.onnx")
    assert (found["kind"], found["arch"], found["gives"]) == (
        "onnx", "lenet-caffe", "probabilities" if raw else "logits",
    )  # fmt: skip
    assert (found["parameters"], found["macs"]) == (PARAMETERS, MACS)
    layers = [row for row in found["layers"] if row["macs"]]
    wanted = [row for row in LENET_CAFFE.values() if row[2]]
    assert [(row["output"], row["macs"]) for row in layers] == [(output, work) for output, _, work in wanted]
    assert sum(row["parameters"] for row in found["layers"]) == PARAMETERS
    assert run("info", "m.onnx").exit_code == 0


def test_info_of_a_foreign_file(run: Any, workplace: Path) -> None:
    """Weights beside a node that only makes weights of them: no shape of an image."""
    weight = np.random.default_rng(0).normal(size=(3, 3 * 4 * 4)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        onnx.helper.make_node("Flatten", ["x"], ["f"]),
        onnx.helper.make_node("MatMul", ["f", "wt"], ["y"]),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, ["n", 3, 4, 4])],
        [onnx.helper.make_tensor_value_info("y", kind, ["n", 3])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9),
        "s.onnx",
    )
    found = look(run, "s.onnx")
    rows = [(row["kind"], row["output"], row["parameters"], row["macs"]) for row in found["layers"]]
    assert rows == [("Transpose 3×48", [], 144, 0), ("Flatten", [48], 0, 0), ("MatMul", [3], 0, 144)]
    assert (found["arch"], found["preprocess"], found["macs"]) == (None, None, 144)


def test_summary_of_shared_and_transposed_layers() -> None:
    """A layer that runs twice has its work twice and its weights once; a transposed convolution, grouped."""
    shared = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
    up = nn.ConvTranspose2d(4, 6, (2, 3), stride=2, groups=2)
    rows = summarize_layers(nn.Sequential(shared, nn.Sequential(shared), up), torch.zeros(2, 4, 5, 7))
    assert [(row.output, row.parameters, row.macs) for row in rows] == [
        ((4, 5, 7), 4 * 2 * 9, 4 * 35 * 2 * 9),
        ((4, 5, 7), 0, 4 * 35 * 2 * 9),
        ((6, 10, 15), 4 * 3 * 6 + 6, 35 * 4 * 3 * 6),  # each input value meets 3 channels of a 2×3 kernel
    ]


@pytest.mark.parametrize(
    ("operator", "inputs", "work"),
    [
        ("ConvTranspose", {"w": np.ones((3, 2, 2, 2), np.float32)}, 3 * 64 * 2 * 4),
        ("ConvInteger", {"w": np.ones((4, 3, 3, 3), np.uint8)}, 4 * 36 * 3 * 9),
        (
            "QLinearConv",
            {
                "xs": np.float32(1), "xz": np.uint8(0), "w": np.ones((4, 3, 3, 3), np.uint8),
                "ws": np.float32(1), "wz": np.uint8(0), "ys": np.float32(1), "yz": np.uint8(0),
            },
            4 * 36 * 3 * 9,
        ),
    ],
)  # fmt: skip
def test_work_of_further_operators(operator: str, inputs: dict[str, np.ndarray], work: int) -> None:
    """Convolutions of 3 channels of 8×8 pixels: a transposed one (stride 1), and those of int8 files."""
    kind = onnx.TensorProto.FLOAT if operator == "ConvTranspose" else onnx.TensorProto.UINT8
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["x", *inputs], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, ["n", 3, 8, 8])],
        [onnx.ValueInfoProto(name="y")],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in inputs.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    assert count_model(model).macs == work


def test_info_of_a_missing_model(run: Any, workplace: Path) -> None:
    with pytest.raises(UsageError, match="no file and no network: lenett") as caught:
        run("info", "lenett")
    assert caught.value.hint == "Did you mean lenet?"
    with pytest.raises(KdError, match=r"no such file: m\.pt"):
        run("info", "m.pt")
    with pytest.raises(UsageError, match="too small for a LeNet"):
        run("info", "lenet", "--image-size", "8")
    with pytest.raises(UsageError, match="no file and no network: graph"):
        run("info", "graph")
