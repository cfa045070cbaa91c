"""How the teacher runs fastest here, at the same answers: engine, precision, batch size."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcli.base import metrics
from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent
from kdcli.models import Classifier

_WORTH_TRYING_S = 15.0  # a pass shorter than this is not measured first
_WORTH_TRANSLATING_S = (
    60.0  # nor is one shorter than this translated to ONNX, which takes some seconds itself
)
_LEAST_AGREEMENT = 99.9  # per cent equal top-1 with float32
_SAMPLE = 1024  # images on which agreement is checked
_BATCHES = {"cpu": (32, 64, 128, 256), "other": (256, 1024, 4096)}
BATCH = 64

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """What runs the teacher.

    Attributes:
        engine: `torch`, or `onnxruntime` for a checkpoint translated to ONNX, or `file` for an ONNX file as it is.
        precision: `32` or `bf16`.
        agreement: per cent of sample images whose first class is that of float32; None where that is what runs.
        images_per_s: as measured; None if it was not.
    """

    engine: str
    precision: str = "32"
    batch_size: int = BATCH
    agreement: float | None = None
    images_per_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For the cache's manifest."""
        return asdict(self)


class _InOnnxruntime:
    """A classifier whose network runs in onnxruntime; its preprocessing stays in torch."""

    def __init__(self, model: Classifier, threads: int) -> None:
        from kdcli.deploy import onnx_model
        from kdcli.deploy.onnx_model.translate import to_onnx

        translated = to_onnx(model, opset=18, with_preprocessing=False)
        self.model = model
        self.session = onnx_model.session(translated.SerializeToString(), threads, "the teacher")
        self.input = self.session.get_inputs()[0].name

    def __call__(self, images: Tensor) -> Tensor:
        prepared = self.model.prepare(images).contiguous().numpy()
        return torch.from_numpy(self.session.run(None, {self.input: prepared})[0])


def run_of(model: Any, plan: Plan, threads: int = 0) -> Run:
    """What a plan says, as a function from uint8 (B, H, W, C) to logits float32 (B, classes).

    Raises:
        KdError: the network cannot be translated to ONNX.
    """
    if plan.engine == "onnxruntime":
        return _InOnnxruntime(model, threads)
    if plan.precision == "32":
        return lambda images: model(images).float()

    def in_bf16(images: Tensor) -> Tensor:
        prepared = model.prepare(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            logits: Tensor = model.network(prepared)
        return logits.float()

    return in_bf16


def choose(
    model: Any,
    take: Callable[[int], Tensor],
    *,
    count: int,
    wanted: str,
    threads: int = 0,
    on_event: OnEvent,
) -> Plan:
    """The fastest way to run a teacher over `count` images that gives the answers of float32.

    Args:
        model: a classifier, frozen, or an ONNX file.
        take: the first n images, or all if there are fewer, uint8 (≤ n, H, W, C), on the teacher's device.
        count: images of the pass: those of all views.
        wanted: precision: `auto`, `32` or `bf16` (taken without a check: the user has said so).
    """
    if not isinstance(model, Classifier):
        return Plan("file")
    plain = Plan("torch")
    if wanted == "bf16":
        return Plan("torch", "bf16")
    with torch.inference_mode():
        images = take(min(BATCH, count))
        device = images.device.type
        first = run_of(model, plain)
        first(images)
        expected_s = _seconds(first, images) / len(images) * count
        if expected_s < _WORTH_TRYING_S:
            return plain if device == "cpu" else replace(plain, batch_size=_BATCHES["other"][0])
        candidates = {plain: first}
        for plan in _others(device, wanted, expected_s):
            try:
                candidates[plan] = run_of(model, plan, threads)
            except KdError:
                continue  # not every network can be translated
        plan = _fastest(candidates, images, lambda: take(min(_SAMPLE, count)))
        run = candidates[plan]
        rates = {}
        for size in _BATCHES.get(device, _BATCHES["other"]):
            batch = take(min(size, count))
            run(batch)
            rates[size] = len(batch) / min(_seconds(run, batch) for _ in range(2))
        best = max(rates, key=lambda size: rates[size])
        plan = replace(plan, batch_size=best, images_per_s=rates[best])
    on_event(
        Note(
            f"the teacher runs in {plan.engine}, {'float32' if plan.precision == '32' else plan.precision}, "
            f"{best} images at a time: {rates[best]:,.0f} images/s"
        )
    )
    return plan


def _others(device: str, wanted: str, expected_s: float) -> list[Plan]:
    plans = []
    if wanted == "auto":
        plans.append(Plan("torch", "bf16"))
    if device == "cpu" and expected_s >= _WORTH_TRANSLATING_S:
        plans.append(Plan("onnxruntime"))
    return plans


def _seconds(run: Run, images: Tensor) -> float:
    started = time.perf_counter()
    run(images).sum().item()  # waits for the device
    return time.perf_counter() - started


def _fastest(candidates: dict[Plan, Run], images: Tensor, sample: Callable[[], Tensor]) -> Plan:
    """By interleaved rounds; one that is not plain float32 must agree with it on the sample."""
    times = {plan: float("inf") for plan in candidates}
    for number in range(3):  # the first warms up
        for plan, run in candidates.items():
            seconds = _seconds(run, images)
            if number:
                times[plan] = min(times[plan], seconds)
    plain, exact = next(iter(candidates.items()))
    expected: Tensor | None = None
    for plan in sorted(times, key=lambda plan: times[plan]):
        if plan == plain:
            break
        pictures = sample()
        parts = list(torch.split(pictures, BATCH))
        if expected is None:
            expected = torch.cat([exact(part) for part in parts])
        found = torch.cat([candidates[plan](part) for part in parts])
        agreement = metrics.agreement(found, expected)
        if agreement >= _LEAST_AGREEMENT:
            candidates[replace(plan, agreement=agreement)] = candidates[plan]
            return replace(plan, agreement=agreement)
    return plain
