"""False positives and detections of `kd bench`: a model against its copy, and against itself with more work.

A model is measured against a copy of itself: the verdict has to be `no difference`. And against itself with 5 % more
multiply-accumulates (a convolution of 1×1 beside the others, whose result is multiplied by zero): `slower`.

    python benchmarks/bench_null.py --runs 20                  # kd's own NIN, random weights
    python benchmarks/bench_null.py --runs 20 student.onnx

Of 20 runs each, at least 19 should say so. Run it on an idle machine.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import onnx
import torch
import typer
from onnx import TensorProto, helper, numpy_helper

from kdcli import models
from kdcli.base.config import BenchConfig
from kdcli.data.preprocess import fit
from kdcli.deploy.bench import bench
from kdcli.deploy.onnx_model import count_model
from kdcli.deploy.onnx_model.translate import file_bytes, to_onnx


def own_network(name: str, folder: Path) -> Path:
    """A network of kd's with random weights as an ONNX file."""
    torch.manual_seed(0)
    classifier = models.Classifier(
        models.build(name, classes=10, input_size=(32, 32, 3)),
        fit("none", np.zeros((1, 32, 32, 3), np.uint8)),
        arch=name,
        arch_args={},
        classes=tuple("0123456789"),
        input_size=(32, 32, 3),
    ).eval()
    path = folder / f"{name}.onnx"
    path.write_bytes(file_bytes(to_onnx(classifier, opset=18, with_preprocessing=False), {}))
    return path


def with_added_work(source: Path, share: float, target: Path) -> float:
    """Write a model that does `share` more work and gives the same; returns the share that was added in MACs."""
    model = onnx.shape_inference.infer_shapes(onnx.load(source))
    before = count_model(model).macs
    assert before, "its work is not known"
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    name, place = next(
        (node.output[0], index)
        for index, node in enumerate(model.graph.node)
        if node.op_type in ("Relu", "MaxPool", "AveragePool", "Conv")
        and len(shapes.get(node.output[0], ())) == 4
        and shapes[node.output[0]][1].dim_value >= 32
    )
    _, channels, height, width = (dim.dim_value for dim in shapes[name])
    filters = max(1, round(share * before / (channels * height * width)))
    weights = np.random.default_rng(0).normal(size=(filters, channels, 1, 1)).astype(np.float32)
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["kd_plain" if one == output else one for one in node.output]
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(weights, "kd_weights"),
            numpy_helper.from_array(np.zeros(1, np.float32), "kd_zero"),
            numpy_helper.from_array(np.array([1, 2, 3]), "kd_axes"),
        ]
    )
    added = [
        helper.make_node("Conv", [name, "kd_weights"], ["kd_more"], "kd_more"),
        helper.make_node("ReduceMax", ["kd_more", "kd_axes"], ["kd_one"], "kd_one", keepdims=0),
        helper.make_node("Mul", ["kd_one", "kd_zero"], ["kd_none"], "kd_none"),
        helper.make_node("Unsqueeze", ["kd_none", "kd_last"], ["kd_column"], "kd_column"),
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "kd_last"))
    for offset, node in enumerate(added):
        model.graph.node.insert(place + 1 + offset, node)
    model.graph.node.append(helper.make_node("Add", ["kd_plain", "kd_column"], [output], "kd_sum"))
    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    assert all(node.data_type != TensorProto.UNDEFINED for node in model.graph.initializer)
    onnx.save(model, target)
    return filters * channels * height * width / before


def main(
    model: Annotated[Path | None, typer.Argument(help="An ONNX classifier; by default --network.")] = None,
    network: str = "nin",
    runs: int = 20,
    share: float = 0.05,
    rounds: int = BenchConfig.model_fields["rounds"].default,
    threads: int = 0,
) -> None:
    """Print the verdicts of kd bench on a model beside its copy, and beside itself with more work."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model or own_network(network, folder)
        (folder / "copy.onnx").write_bytes(model.read_bytes())
        added = with_added_work(model, share, folder / "more.onnx")
        config = BenchConfig(batch=(1,), rounds=rounds, threads=threads, no_memory=True)
        found: dict[str, list[tuple[str, float]]] = {"copy": [], "more": []}
        for number in range(runs):
            for other, verdicts in found.items():
                row = bench([model, folder / f"{other}.onnx"], config).rows[1]
                assert row.speed is not None and row.speedup is not None and row.speedup_interval is not None
                low, high = row.speedup_interval
                verdicts.append((row.speed, row.speedup))
                values = f"{low:.3f} … {row.speedup:.3f} … {high:.3f} {row.speed}"
                print(f"{number + 1:3} {other}: {values}", flush=True)
    for other, wanted in (("copy", "no difference"), ("more", "slower")):
        counts = Counter(speed for speed, _ in found[other])
        ratio = median(speedup for _, speedup in found[other])
        what = "a copy of itself" if other == "copy" else f"itself with {100 * added:.1f} % more MACs"
        print(f"{what}: {counts[wanted]} of {runs} say `{wanted}` ({dict(counts)}); median ratio {ratio:.3f}")


if __name__ == "__main__":
    typer.run(main)
