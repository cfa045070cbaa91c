"""Models of a benchmark, each on the engines that run it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcli import models
from kdcli.base.config import BenchConfig
from kdcli.base.errors import KdError
from kdcli.base.text import first_line
from kdcli.deploy.bench.footprint import Footprint, measure_footprint
from kdcli.deploy.bench.measurements import Row
from kdcli.deploy.onnx_model import OnnxClassifier, OnnxRunner, count_model, serialize
from kdcli.deploy.onnx_model.translate import to_onnx
from kdcli.models import Classifier
from kdcli.models.layer_summary import count_macs

TORCH, COMPILED, ORT = "torch", "compiled", "onnxruntime"
ENGINES = {"both": (TORCH, ORT), "all": (TORCH, COMPILED, ORT)}

Model = Classifier | OnnxClassifier
Runner = Callable[[int], Any]  # runs the network on that many images


@dataclass(frozen=True)
class Candidate:
    """A model on one engine.

    Attributes:
        row: its figures so far.
        load: loads it anew; its speed depends by one per cent on where its weights then lie in memory.
        footprint: measures it in a separate process.
    """

    row: Row
    load: Callable[[], Runner]
    footprint: Callable[[], Footprint] = Footprint


def candidates_of(
    path: Path, name: str, model: Model, config: BenchConfig, threads: int, *, is_teacher: bool
) -> tuple[list[Candidate], list[str]]:
    """A candidate for each engine, and notes on engines that cannot run the model."""
    largest = max(config.batches)
    pixels = np.random.default_rng(0).integers(0, 256, (largest, *model.input_size), dtype=np.uint8)
    raw = torch.from_numpy(pixels)
    if isinstance(model, OnnxClassifier):
        return [_onnx_candidate(path, name, model, raw, threads, is_teacher=is_teacher)], []
    return _checkpoint_candidates(path, name, model, raw, config, threads, is_teacher=is_teacher)


def _checkpoint_candidates(
    path: Path,
    name: str,
    model: Classifier,
    raw: Tensor,
    config: BenchConfig,
    threads: int,
    *,
    is_teacher: bool,
) -> tuple[list[Candidate], list[str]]:
    network = model.network.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        prepared = model.prepare(raw).contiguous(memory_format=torch.channels_last)
    row = Row(
        name=name,
        path=path,
        engine=TORCH,
        is_teacher=is_teacher,
        file_bytes=path.stat().st_size,
        network_bytes=_state_bytes(network),
        preprocessing_bytes=_state_bytes(model.preprocess),
        parameters=models.parameter_count(network),
        macs=count_macs(network, prepared),
    )
    candidates: list[Candidate] = []
    notes: list[str] = []
    for engine in ENGINES.get(config.engine, (config.engine,)):
        if engine == ORT:
            content = to_onnx(model, opset=18, with_preprocessing=False).SerializeToString()
            inputs = np.ascontiguousarray(prepared.numpy())
            candidates.append(_ort_candidate(row.extend(engine=ORT), content, inputs, threads))
            continue
        load: Callable[[], Runner] = partial(_eager, network, prepared)
        if engine == COMPILED:
            try:
                runner = _compiled(network, prepared, config.batches)
            except Exception as error:  # torch's compiler and the C++ compiler raise many kinds
                notes.append(f"{name} is not compiled here: {first_line(error, 120)}")
                continue
            load = partial(_identity, runner)  # compiled once, which takes half a minute
        footprint = partial(
            measure_footprint, path, engine, threads, tuple(prepared.shape[1:]), len(prepared)
        )
        candidates.append(Candidate(row.extend(engine=engine), load, footprint))
    return candidates, notes


def _state_bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def _eager(network: nn.Module, prepared: Tensor) -> Runner:
    loaded = copy.deepcopy(network)
    return lambda count: loaded(prepared[:count])


def _compiled(network: nn.Module, prepared: Tensor, batches: Sequence[int]) -> Runner:
    compiled = torch.compile(copy.deepcopy(network), dynamic=False)
    with torch.inference_mode():
        for count in {1, *batches}:  # each is compiled separately
            compiled(prepared[:count])
    return lambda count: compiled(prepared[:count])


def _identity(runner: Runner) -> Runner:
    return runner


def _ort_candidate(
    row: Row, content: bytes, inputs: npt.NDArray[Any], threads: int, batch: int | None = None
) -> Candidate:
    """An ONNX model and its input; `batch`: images per call, if fixed."""

    def load() -> Runner:
        runner = OnnxRunner(content, threads, str(row.path))
        if batch is None:  # timed without kd's own overhead
            return lambda count: runner.call(inputs[:count])
        return lambda count: runner.run(inputs[:count], batch)

    footprint = partial(
        measure_footprint, content, ORT, threads, inputs.shape[1:], batch or len(inputs), str(inputs.dtype)
    )
    return Candidate(row, load, footprint)


def _onnx_candidate(
    path: Path, name: str, model: OnnxClassifier, raw: Tensor, threads: int, *, is_teacher: bool
) -> Candidate:
    notes = []
    known = model.why_not_runnable is None
    inputs = model.prepare(raw) if known else model.to_layout(raw.numpy() / 255)
    if model.takes_pixels:
        notes.append("timed with its preprocessing, which is inside")
    batch = _batch_that_runs(model, inputs)
    if batch == 1:
        notes.append("its batch is fixed at 1; images of a batch are run singly")
    elif batch is not None:
        notes.append(f"its batch is fixed at {batch}; one image takes as long as {batch}")
    counts = count_model(model.model, model.input_size)
    quantised = any(
        "Quantize" in node.op_type or "QLinear" in node.op_type for node in model.model.graph.node
    )
    row = Row(
        name=name,
        path=path,
        engine=ORT,
        is_teacher=is_teacher,
        file_bytes=model.file_bytes,
        network_bytes=counts.network_bytes,
        preprocessing_bytes=counts.preprocessing_bytes,
        parameters=counts.parameters,
        macs=counts.macs,
        precision="int8" if quantised else "fp32",
        notes=tuple(notes),
    )
    return _ort_candidate(row, serialize(path, model.model), inputs, threads, batch)


def _batch_that_runs(model: OnnxClassifier, inputs: npt.NDArray[Any]) -> int | None:
    """Its fixed batch; 1 of a file that declares any batch and runs single images only.

    Raises:
        KdError: it runs no image.
    """
    model.run(inputs[:1])
    if len(inputs) > 1 and model.batch is None:
        try:
            model.run(inputs)
        except KdError:
            return 1
    return model.batch
