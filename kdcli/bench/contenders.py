"""Running models side by side and timing them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcli import export, models, onnx_model
from kdcli.bench.rows import SAME, Row, in_words
from kdcli.config import BenchConfig
from kdcli.errors import KdError
from kdcli.events import OnEvent, Progress
from kdcli.models import Classifier
from kdcli.models.layers import count_macs
from kdcli.onnx_model import OnnxClassifier

TORCH, ORT = "torch", "onnxruntime"
_CALLS = 5  # timed single-image calls of a model in a round


@dataclass
class Contender:
    """A row and how to run it: `single` one image, `batch` a batch; times in seconds by round."""

    row: Row
    single: Callable[[], Any]
    batch: Callable[[], Any]
    single_s: list[list[float]] = field(default_factory=list)
    batch_s: list[float] = field(default_factory=list)


def contenders_of(
    path: Path,
    name: str,
    model: Classifier | OnnxClassifier,
    config: BenchConfig,
    threads: int,
    *,
    is_teacher: bool,
) -> list[Contender]:
    height, width, channels = model.input_size
    raw = np.random.default_rng(0).integers(0, 256, (config.batch, height, width, channels), dtype=np.uint8)
    if isinstance(model, OnnxClassifier):
        return [_onnx_contender(path, name, model, torch.from_numpy(raw), is_teacher)]
    with torch.inference_mode():
        prepared = model.prepare(torch.from_numpy(raw)).contiguous(memory_format=torch.channels_last)
    state = model.network.state_dict().values()
    row = Row(
        name=name,
        path=path,
        engine=TORCH,
        is_teacher=is_teacher,
        file_bytes=path.stat().st_size,
        network_bytes=sum(value.numel() * value.element_size() for value in state),
        preprocessing_bytes=sum(
            value.numel() * value.element_size() for value in model.preprocess.state_dict().values()
        ),
        parameters=models.parameter_count(model.network),
        macs=count_macs(model.network, prepared),
    )
    found: list[Contender] = []
    if config.engine in ("both", ORT):
        translated = export.to_onnx(model, opset=18, with_preprocessing=False)
        runner = onnx_model.session(translated.SerializeToString(), threads, str(path))
        inputs = np.ascontiguousarray(prepared.numpy())
        with torch.inference_mode():
            difference = np.abs(
                runner.run(None, {"input": inputs})[0] - model.network(prepared).numpy()
            ).max()
        notes = (
            () if difference < 1e-2 else (f"its ONNX form differs from the checkpoint by {difference:.2g}",)
        )
        found.append(
            Contender(
                replace(row, engine=ORT, notes=notes),
                lambda: runner.run(None, {"input": inputs[:1]}),
                lambda: runner.run(None, {"input": inputs}),
            )
        )
    if config.engine in ("both", TORCH):
        network = model.network.to(memory_format=torch.channels_last)
        found.insert(0, Contender(row, lambda: network(prepared[:1]), lambda: network(prepared)))
    return found


def _onnx_contender(path: Path, name: str, model: OnnxClassifier, raw: Tensor, is_teacher: bool) -> Contender:
    notes = []
    if model.why_not_runnable is None:
        inputs = model.prepare(raw)
    else:
        inputs = np.ascontiguousarray(raw.permute(0, 3, 1, 2).numpy().astype(np.float32) / 255)
    if model.layout == "NHWC":
        notes.append("timed with its preprocessing, which is inside")
    model.run(inputs[:1])
    if len(inputs) > 1 and not model.one_by_one:
        try:
            model.run(inputs)
        except KdError:  # it says that it takes any batch, and has a 1 in it somewhere
            model = replace(model, one_by_one=True)
    if model.one_by_one:
        notes.append("its batch is fixed at 1; images of a batch are run singly")
    facts = onnx_model.facts(model.model, model.input_size)
    row = Row(
        name=name,
        path=path,
        engine=ORT,
        is_teacher=is_teacher,
        file_bytes=model.file_bytes,
        network_bytes=facts.network_bytes,
        preprocessing_bytes=facts.preprocessing_bytes,
        parameters=facts.parameters,
        macs=facts.macs,
        notes=tuple(notes),
    )
    return Contender(row, lambda: model.run(inputs[:1]), lambda: model.run(inputs))


def measure(contenders: Sequence[Contender], rounds: int, on_event: OnEvent) -> None:
    order = np.random.default_rng(0)
    collecting = gc.isenabled()
    with torch.inference_mode():
        for contender in contenders:
            for _ in range(3):
                contender.single()
            contender.batch()
        gc.disable()
        try:
            for number in range(rounds):
                for index in order.permutation(len(contenders)):
                    contender = contenders[index]
                    contender.single()  # untimed: the model before it has had the caches
                    contender.single_s.append([_time(contender.single) for _ in range(_CALLS)])
                    contender.batch_s.append(_time(contender.batch))
                gc.collect()
                on_event(Progress("measuring", number + 1, rounds, "rounds"))
        finally:
            if collecting:
                gc.enable()


def _time(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def timing(contender: Contender, batch: int) -> dict[str, Any]:
    singles_ms = 1e3 * np.concatenate(contender.single_s)
    median, p90, p95 = (float(value) for value in np.percentile(singles_ms, [50, 90, 95]))
    return {
        "latency_ms": median,
        "latency_p90_ms": p90,
        "latency_p95_ms": p95,
        "latency_n": len(singles_ms),
        "images_per_s": float(batch / np.median(contender.batch_s)),
    }


def compared(row: Row, own: Contender, contenders: Sequence[Contender], rows: Sequence[Row]) -> Row:
    """Ratios to the teacher on the same engine, and the verdict."""
    size_ratio = rows[0].network_bytes / row.network_bytes if row.network_bytes else None
    row = replace(row, size_ratio=size_ratio)
    size = in_words(size_ratio, "smaller", "bigger", "same size") if size_ratio else ""
    bigger = size_ratio is not None and size_ratio < 1 / SAME
    teacher = next((c for c in contenders if c.row.is_teacher and c.row.engine == row.engine), None)
    if teacher is None:
        note = f"the teacher was not run on {row.engine}: no speed ratio"
        return replace(row, verdict=size, worse=bigger, notes=(*row.notes, note))
    ratios = np.median(teacher.single_s, axis=1) / np.median(own.single_s, axis=1)
    low, middle, high = (float(value) for value in np.percentile(ratios, [25, 50, 75]))
    row = replace(
        row,
        speedup=middle,
        speedup_quartiles=(low, high),
        throughput_ratio=float(np.median(np.divide(teacher.batch_s, own.batch_s))),
    )
    if row.is_teacher:
        return replace(row, verdict="teacher")
    speed = in_words(middle, "faster", "slower", "as fast")
    worse = bigger or middle < 1 / SAME
    return replace(row, verdict=", ".join(filter(None, (speed, size))), worse=worse)
