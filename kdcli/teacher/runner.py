"""Selection of the fastest engine, precision and batch size for a teacher, with the same top-1 classes."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.base import metrics
from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent
from kdcli.base.timing import interleaved
from kdcli.models import Classifier

_MEASURED_FROM_S = 15.0  # shorter passes run without measurements
_LONG_S = 60.0  # shorter passes on a CPU: no translation to ONNX, no runs at several batch sizes
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
        agreement: per cent of sample images with the top-1 class of float32; None for float32 in torch.
    """

    name: str
    precision: str = "32"  # `32` or `bf16`
    batch_size: int = BATCH
    agreement: float | None = field(default=None, compare=False)
    images_per_s: float | None = None  # as measured; None if it was not


def forward_of(model: Any, engine: Engine, threads: int = 0) -> Forward:
    """A function from uint8 (B, H, W, C) to logits float32 (B, classes); a KdError if ONNX lacks an operation."""
    if engine.name == "file":
        return lambda images: model(images.cpu()).float().to(images.device)
    if engine.name == "onnxruntime":  # the network alone: its preprocessing stays in torch
        from kdcli.deploy.onnx_model import OnnxRunner
        from kdcli.deploy.onnx_model.translate import to_onnx

        translated = to_onnx(model, opset=18, with_preprocessing=False)
        runner = OnnxRunner(translated.SerializeToString(), threads, "the teacher")
        call = runner.call
        return lambda images: model.to_classes(
            torch.from_numpy(call(model.prepare(images).contiguous().numpy()))
        )
    run = run_in_torch(model, model.network, engine.precision)
    return lambda images: model.to_classes(run(images).float())


def run_in_torch(model: Classifier, network: nn.Module, precision: str) -> Callable[[Tensor], Any]:
    """A function that preprocesses in float32 and runs the network, or a module around it, in this precision."""

    def run(images: Tensor) -> Any:
        prepared = model.prepare(images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return network(prepared)

    return run


def choose_engine(
    model: Any,
    take: Callable[[int], Tensor],
    *,
    count: int,
    precision: str,
    threads: int = 0,
    on_event: OnEvent,
) -> Engine:
    """The fastest engine for a pass over `count` images, of all views, whose top-1 classes agree with float32.

    `take` gives the first n images, or all if there are fewer, uint8 (≤ n, H, W, C), on the teacher's device;
    `precision` is `auto`, `32` or `bf16`, which is taken without a check.
    """
    if not isinstance(model, Classifier):
        return Engine("file")
    if precision == "bf16":
        return Engine("torch", "bf16")
    plain = Engine("torch")
    forwards = {plain: forward_of(model, plain)}
    with torch.inference_mode():
        # 1. Is the pass long enough for measurements to pay?
        images = take(BATCH)
        device = images.device.type
        [seconds] = _fastest_times(forwards.values(), [images], rounds=1)
        expected_s = seconds / len(images) * count
        if expected_s < _MEASURED_FROM_S:
            return plain if device == "cpu" else replace(plain, batch_size=_BATCHES["other"][0])
        # 2. Time the engines
        others = [Engine("torch", "bf16")] if precision == "auto" else []
        others += [Engine("onnxruntime")] if device == "cpu" and expected_s >= _LONG_S else []
        for engine in others:
            with suppress(KdError):  # not every network can be translated
                forwards[engine] = forward_of(model, engine, threads)
        times = _fastest_times(forwards.values(), [images] * len(forwards))
        # 3. Take the fastest that agrees with float32
        chosen = _fastest_exact(forwards, times, take)
        # 4. Time batch sizes
        sizes = _BATCHES.get(device, _BATCHES["other"])
        if device == "cpu" and expected_s < _LONG_S:
            sizes = (BATCH,)
        batches = [take(size) for size in sizes]
        times = _fastest_times([forwards[chosen]] * len(sizes), batches)
        rates = [len(batch) / seconds for batch, seconds in zip(batches, times, strict=True)]
        rate, size = max(zip(rates, sizes, strict=True), key=lambda pair: pair[0])
    named = "float32" if chosen.precision == "32" else chosen.precision
    on_event(
        Note(f"the teacher runs in {chosen.name}, {named}, {size} images at a time: {rate:,.0f} images/s")
    )
    return replace(chosen, batch_size=size, images_per_s=rate)


def _fastest_times(
    forwards: Iterable[Forward], batches: Sequence[Tensor], rounds: int = _ROUNDS
) -> list[float]:
    """Seconds of the fastest call of each function on its batch."""

    def timed(forward: Forward, images: Tensor) -> Callable[[], Any]:
        return lambda: forward(images).sum().item()  # waits for the device

    calls = [timed(forward, images) for forward, images in zip(forwards, batches, strict=True)]
    return [float(seconds) for seconds in interleaved(calls, rounds=rounds).min(axis=(0, 2))]


def _fastest_exact(
    forwards: dict[Engine, Forward], times: Sequence[float], take: Callable[[int], Tensor]
) -> Engine:
    """The fastest engine whose top-1 classes agree with those of the first, which is float32 in torch."""
    plain, *_ = forwards
    for _, engine in sorted(zip(times, forwards, strict=True), key=lambda pair: pair[0]):
        if engine == plain:
            break
        parts = torch.split(take(_SAMPLE), BATCH)
        found, expected = (torch.cat([forwards[each](part) for part in parts]) for each in (engine, plain))
        agreement = metrics.agreement(found, expected)
        if agreement >= _LEAST_AGREEMENT:
            return replace(engine, agreement=agreement)
    return plain
