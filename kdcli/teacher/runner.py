"""Selection of the fastest engine, precision and batch size for a teacher, with the same top-1 classes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcli.base import metrics
from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent
from kdcli.base.timing import interleaved
from kdcli.models import Classifier

_MEASURED_FROM_S = 15.0  # shorter passes run without measurements
_TRANSLATED_FROM_S = 60.0  # shorter passes are not worth a translation to ONNX, which takes some seconds
_LEAST_AGREEMENT = 99.9  # per cent equal top-1 with float32
_SAMPLE = 1024  # images on which agreement is checked
_BATCHES = {"cpu": (32, 64, 128, 256), "other": (256, 1024, 4096)}
_ROUNDS = 2
BATCH = 64

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Engine:
    """An engine that runs a teacher.

    Attributes:
        name: `torch`, or `onnxruntime` for a checkpoint translated to ONNX, or `file` for an ONNX file as it is.
        precision: `32` or `bf16`.
        agreement: per cent of sample images with the top-1 class of float32; None for float32 in torch.
        images_per_s: as measured; None if it was not.
    """

    name: str
    precision: str = "32"
    batch_size: int = BATCH
    agreement: float | None = None
    images_per_s: float | None = None


def forward_of(model: Any, engine: Engine, threads: int = 0) -> Forward:
    """A function from uint8 (B, H, W, C) to logits float32 (B, classes).

    Raises:
        KdError: the network cannot be translated to ONNX.
    """
    if engine.name == "onnxruntime":
        return _onnxruntime_forward(model, threads)
    if engine.precision == "32":
        return lambda images: model(images).float()

    def in_bf16(images: Tensor) -> Tensor:
        prepared = model.prepare(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            logits: Tensor = model.network(prepared)
        return logits.float()

    return in_bf16


def _onnxruntime_forward(model: Classifier, threads: int) -> Forward:
    """The network in onnxruntime; its preprocessing stays in torch."""
    from kdcli.deploy.onnx_model import OnnxRunner
    from kdcli.deploy.onnx_model.translate import to_onnx

    translated = to_onnx(model, opset=18, with_preprocessing=False)
    runner = OnnxRunner(translated.SerializeToString(), threads, "the teacher")
    return lambda images: torch.from_numpy(runner.call(model.prepare(images).contiguous().numpy()))


def choose_engine(
    model: Any,
    take: Callable[[int], Tensor],
    *,
    count: int,
    precision: str,
    threads: int = 0,
    on_event: OnEvent,
) -> Engine:
    """The fastest engine for a pass over `count` images whose top-1 classes agree with float32.

    Args:
        model: a frozen classifier, or an ONNX model.
        take: the first n images, or all if there are fewer, uint8 (≤ n, H, W, C), on the teacher's device.
        count: images of the pass: those of all views.
        precision: `auto`, `32` or `bf16`, which is taken without a check.
    """
    if not isinstance(model, Classifier):
        return Engine("file")
    plain = Engine("torch")
    if precision == "bf16":
        return Engine("torch", "bf16")
    with torch.inference_mode():
        # 1. Is the pass long enough for measurements to pay?
        images = take(min(BATCH, count))
        device = images.device.type
        forwards = {plain: forward_of(model, plain)}
        [seconds] = _fastest_times([forwards[plain]], [images], rounds=1)
        expected_s = seconds / len(images) * count
        if expected_s < _MEASURED_FROM_S:
            return plain if device == "cpu" else replace(plain, batch_size=_BATCHES["other"][0])
        # 2. Time the engines.
        for engine in _alternatives(device, precision, expected_s):
            try:
                forwards[engine] = forward_of(model, engine, threads)
            except KdError:
                continue  # not every network can be translated
        times = dict(
            zip(forwards, _fastest_times(list(forwards.values()), [images] * len(forwards)), strict=True)
        )
        # 3. Take the fastest that agrees with float32.
        chosen, forward = _fastest_exact(forwards, times, lambda: take(min(_SAMPLE, count)))
        # 4. Time batch sizes.
        sizes = _BATCHES.get(device, _BATCHES["other"])
        batches = [take(min(size, count)) for size in sizes]
        seconds_by_size = _fastest_times([forward] * len(sizes), batches)
        rates = {
            size: len(batch) / seconds
            for size, batch, seconds in zip(sizes, batches, seconds_by_size, strict=True)
        }
        best = max(rates, key=lambda size: rates[size])
    on_event(
        Note(
            f"the teacher runs in {chosen.name}, {'float32' if chosen.precision == '32' else chosen.precision}, "
            f"{best} images at a time: {rates[best]:,.0f} images/s"
        )
    )
    return replace(chosen, batch_size=best, images_per_s=rates[best])


def _alternatives(device: str, precision: str, expected_s: float) -> list[Engine]:
    """Engines beside float32 in torch."""
    bf16 = [Engine("torch", "bf16")] if precision == "auto" else []
    translated = device == "cpu" and expected_s >= _TRANSLATED_FROM_S
    return bf16 + ([Engine("onnxruntime")] if translated else [])


def _fastest_times(forwards: list[Forward], batches: list[Tensor], rounds: int = _ROUNDS) -> list[float]:
    """Seconds of the fastest call of each function on its batch."""

    def timed(forward: Forward, images: Tensor) -> Callable[[], Any]:
        return lambda: forward(images).sum().item()  # waits for the device

    calls = [timed(forward, images) for forward, images in zip(forwards, batches, strict=True)]
    return [float(seconds) for seconds in interleaved(calls, rounds=rounds).min(axis=(0, 2))]


def _fastest_exact(
    forwards: dict[Engine, Forward], times: dict[Engine, float], sample: Callable[[], Tensor]
) -> tuple[Engine, Forward]:
    """The fastest engine whose top-1 classes agree with those of the first, which is float32 in torch."""
    plain = next(iter(forwards))
    expected: Tensor | None = None
    for engine in sorted(times, key=lambda engine: times[engine]):
        if engine == plain:
            break
        parts = torch.split(sample(), BATCH)
        if expected is None:
            expected = torch.cat([forwards[plain](part) for part in parts])
        found = torch.cat([forwards[engine](part) for part in parts])
        agreement = metrics.agreement(found, expected)
        if agreement >= _LEAST_AGREEMENT:
            return replace(engine, agreement=agreement), forwards[engine]
    return plain, forwards[plain]
