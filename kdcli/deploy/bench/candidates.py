"""Models of a benchmark, each on the engines that run it."""

import copy
from collections.abc import Callable
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
from kdcli.models.layers import count_macs

TORCH, COMPILED, ORT = "torch", "compiled", "onnxruntime"
ENGINES = {"both": (TORCH, ORT), "all": (TORCH, COMPILED, ORT)}

Model = Classifier | OnnxClassifier
Runner = Callable[[int], Any]  # runs the network on that many images


@dataclass(frozen=True)
class Candidate:
    """A model on one engine."""

    row: Row  # its figures so far
    load: Callable[[], Runner]  # loads it anew: the place of weights in memory changes speeds by 1 %
    footprint: Callable[[], Footprint] = Footprint  # measures it in a separate process


def candidates_of(
    path: Path, name: str, model: Model, config: BenchConfig, threads: int, *, is_teacher: bool
) -> tuple[list[Candidate], list[str]]:
    """A candidate for each engine, and notes on engines that cannot run the model."""
    size = (max(config.batches), *model.input_size)
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    make_row = partial(Row, name=name, path=path, is_teacher=is_teacher)
    if isinstance(model, OnnxClassifier):
        return [_onnx_candidate(model, raw, make_row, threads)], []
    network = model.network.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        prepared = model.prepare(raw).contiguous(memory_format=torch.channels_last)
    row = make_row(
        engine=TORCH,
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
        try:
            load = _torch_loader(engine, network, prepared, config.batches)
        except Exception as error:  # torch's compiler and the C++ compiler raise many kinds
            notes.append(f"{name} is not compiled here: {first_line(error, 120)}")
            continue
        shape = tuple(prepared.shape[1:])
        footprint = partial(measure_footprint, path, engine, threads, shape, len(prepared))
        candidates.append(Candidate(row.extend(engine=engine), load, footprint))
    return candidates, notes


def _state_bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def _torch_loader(
    engine: str, network: nn.Module, prepared: Tensor, batches: tuple[int, ...]
) -> Callable[[], Runner]:
    """A function that loads the network anew; a compiled one is compiled once, which takes half a minute."""

    def load() -> Runner:
        loaded = copy.deepcopy(network)
        return lambda count: loaded(prepared[:count])

    if engine == TORCH:
        return load
    compiled = torch.compile(copy.deepcopy(network), dynamic=False)
    with torch.inference_mode():
        for count in {1, *batches}:  # each is compiled separately
            compiled(prepared[:count])
    return lambda: lambda count: compiled(prepared[:count])


def _onnx_candidate(
    model: OnnxClassifier, raw: Tensor, make_row: Callable[..., Row], threads: int
) -> Candidate:
    notes = []
    inputs = model.to_layout(raw.numpy() / 255) if model.why_not_runnable else model.prepare(raw)
    if model.takes_pixels:
        notes.append("timed with its preprocessing, which is inside")
    batch = _batch_that_runs(model, inputs)
    if batch == 1:
        notes.append("its batch is fixed at 1; images of a batch are run singly")
    elif batch is not None:
        notes.append(f"its batch is fixed at {batch}; one image takes as long as {batch}")
    counts = count_model(model.model, model.input_size)
    operators = {node.op_type for node in model.model.graph.node}
    quantised = any("Quantize" in operator or "QLinear" in operator for operator in operators)
    row = make_row(
        engine=ORT,
        file_bytes=model.file_bytes,
        network_bytes=counts.network_bytes,
        preprocessing_bytes=counts.preprocessing_bytes,
        parameters=counts.parameters,
        macs=counts.macs,
        precision="int8" if quantised else "fp32",
        notes=tuple(notes),
    )
    return _ort_candidate(row, serialize(model.path, model.model), inputs, threads, batch)


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
