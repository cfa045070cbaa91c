"""Running models side by side and timing them."""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcli import models
from kdcli.base.config import BenchConfig
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress
from kdcli.deploy import export, onnx_model
from kdcli.deploy.bench import stats
from kdcli.deploy.bench.isolated import Alone, alone
from kdcli.deploy.bench.rows import SAME, Row, in_words
from kdcli.deploy.onnx_model import OnnxClassifier
from kdcli.models import Classifier
from kdcli.models.layer_summary import count_macs

TORCH, COMPILED, ORT = "torch", "compiled", "onnxruntime"
ENGINES = {"both": (TORCH, ORT), "all": (TORCH, COMPILED, ORT)}
SITTINGS = 16
_FEWEST = 8  # sittings, before it is looked at whether they are enough
_CALLS = 5  # timed single-image calls of a model in a round
_PRECISE = 0.01  # half an interval's width: enough
_BATCH_ROUNDS = 15
_WARM_S, _LONGEST_WARM_S = 0.02, 1.0  # of a look at whether a model still gets faster; of all looks

Runner = Callable[[int], Any]  # runs the network on that many images


@dataclass
class Contender:
    """A row and how to run it.

    Attributes:
        row: what is known before it is timed.
        make: loads it anew: where its weights then lie in memory differs, and with that its speed, by a per cent.
        alone: measures it in a process of its own.
        singles: seconds of calls for one image: by sitting, by round.
        batches: seconds of a call by batch size, by round.
    """

    row: Row
    make: Callable[[], Runner]
    alone: Callable[[], Alone] = Alone
    singles: list[list[list[float]]] = field(default_factory=list)
    batches: dict[int, list[float]] = field(default_factory=dict)


def contenders_of(
    path: Path,
    name: str,
    model: Classifier | OnnxClassifier,
    config: BenchConfig,
    threads: int,
    *,
    is_teacher: bool,
) -> tuple[list[Contender], list[str]]:
    """A contender for each engine, and why there is none for one."""
    height, width, channels = model.input_size
    largest = max(config.batches)
    raw = np.random.default_rng(0).integers(0, 256, (largest, height, width, channels), dtype=np.uint8)
    if isinstance(model, OnnxClassifier):
        return [_onnx_contender(path, name, model, torch.from_numpy(raw), threads, is_teacher)], []
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
    engines = ENGINES.get(config.engine, (config.engine,))
    network = model.network.to(memory_format=torch.channels_last)
    shape = tuple(prepared.shape[1:])
    found: list[Contender] = []
    notes: list[str] = []
    for engine in engines:
        if engine == ORT:
            content = export.to_onnx(model, opset=18, with_preprocessing=False).SerializeToString()
            found.append(_translated(row, content, prepared, network, threads))
        elif engine == TORCH:
            found.append(
                Contender(
                    row,
                    lambda: _eager(copy.deepcopy(network), prepared),
                    _apart(row, shape, threads, largest),
                )
            )
        else:
            try:
                runner = _compiled(network, prepared, config.batches)
            except Exception as error:  # the compiler, and the C++ compiler it wants, raise many kinds
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
                notes.append(f"{name} is not compiled here: {reason}")
                continue
            made = replace(row, engine=COMPILED)
            found.append(Contender(made, lambda runner=runner: runner, _apart(made, shape, threads, largest)))  # type: ignore[misc]
    return found, notes


def _eager(network: torch.nn.Module, prepared: Tensor) -> Runner:
    return lambda count: network(prepared[:count])


def _compiled(network: torch.nn.Module, prepared: Tensor, batches: Sequence[int]) -> Runner:
    compiled = torch.compile(copy.deepcopy(network), dynamic=False)
    with torch.inference_mode():
        for count in {1, *batches}:  # each is compiled for itself
            compiled(prepared[:count])
    return lambda count: compiled(prepared[:count])


def _translated(
    row: Row, content: bytes, prepared: Tensor, network: torch.nn.Module, threads: int
) -> Contender:
    inputs = np.ascontiguousarray(prepared.numpy())
    runner = onnx_model.session(content, threads, str(row.path))
    with torch.inference_mode():
        difference = np.abs(runner.run(None, {"input": inputs})[0] - network(prepared).numpy()).max()
    notes = () if difference < 1e-2 else (f"its ONNX form differs from the checkpoint by {difference:.2g}",)

    def make() -> Runner:
        session = onnx_model.session(content, threads, str(row.path))
        return lambda count: session.run(None, {"input": inputs[:count]})

    made = replace(row, engine=ORT, notes=notes)
    return Contender(made, make, _apart(made, inputs.shape[1:], threads, len(inputs), content))


def _apart(
    row: Row,
    shape: tuple[int, ...],
    threads: int,
    batch: int,
    content: bytes | None = None,
    dtype: str = "float32",
) -> Callable[[], Alone]:
    """How to measure it in a process of its own; `content` is an ONNX model that lies in no file."""

    def run() -> Alone:
        if content is None:
            return alone(row.path, row.engine, threads, shape, dtype, batch)
        with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(content)
            return alone(path, row.engine, threads, shape, dtype, batch)

    return run


def _onnx_contender(
    path: Path, name: str, model: OnnxClassifier, raw: Tensor, threads: int, is_teacher: bool
) -> Contender:
    notes = []
    known = model.why_not_runnable is None
    inputs = model.prepare(raw) if known else model.laid_out(raw.numpy() / 255)
    if model.takes_pixels:
        notes.append("timed with its preprocessing, which is inside")
    model.run(inputs[:1])
    if len(inputs) > 1 and model.batch is None:
        try:
            model.run(inputs)
        except KdError:  # it says that it takes any batch, and has a 1 in it somewhere
            model = replace(model, batch=1)
    if model.batch == 1:
        notes.append("its batch is fixed at 1; images of a batch are run singly")
    elif model.batch is not None:
        notes.append(f"its batch is fixed at {model.batch}; one image takes as long as {model.batch}")
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
        precision="int8" if _is_quantised(model) else "fp32",
        notes=tuple(notes),
    )
    content = onnx_model.serialized(path, model.model)
    name_in = model.session.get_inputs()[0].name

    def make() -> Runner:
        session = onnx_model.session(content, threads, str(path))
        if (
            model.batch is None
        ):  # as a checkpoint's translation is run: what kd does beside it is not the model's
            return lambda count: session.run(None, {name_in: inputs[:count]})
        fresh = replace(model, session=session)
        return lambda count: fresh.run(inputs[:count])

    most = model.batch or len(inputs)
    return Contender(row, make, _apart(row, inputs.shape[1:], threads, most, content, str(inputs.dtype)))


def _is_quantised(model: OnnxClassifier) -> bool:
    return any("Quantize" in node.op_type or "QLinear" in node.op_type for node in model.model.graph.node)


def measure(contenders: Sequence[Contender], config: BenchConfig, on_event: OnEvent) -> int:
    """Time all of them, and fill in their times; returns the number of rounds.

    Latency first: in each of several sittings all models are loaded anew and warmed up, and take turns in rounds, in
    random order. It ends early where every ratio to the teacher is known to 1 %, which does not depend on what the
    ratios are. Then batches.
    """
    order = np.random.default_rng(0)
    done = 0
    with torch.inference_mode(), _uncollected():
        for sitting in range(min(SITTINGS, config.rounds)):
            runners = [contender.make() for contender in contenders]
            for runner in runners:
                _warm(runner, until_stable=sitting == 0)
            for contender in contenders:
                contender.singles.append([])
            begun = time.perf_counter()
            for _ in range(config.rounds // SITTINGS + (sitting < config.rounds % SITTINGS)):
                for index in order.permutation(len(contenders)):
                    runner = runners[index]
                    runner(1)  # untimed: the model before it has had the caches
                    contenders[index].singles[-1].append([_time(runner, 1) for _ in range(_CALLS)])
                done += 1
                on_event(Progress("measuring latency", done, config.rounds, "rounds"))
                if time.perf_counter() - begun > config.max_seconds / SITTINGS:
                    break
            gc.collect()
            if sitting + 1 >= _FEWEST and _precise(contenders):
                break
        on_event(Progress("measuring latency", config.rounds, config.rounds, "rounds"))
        _measure_batches(contenders, runners, config, order, on_event)
    return done


def _measure_batches(
    contenders: Sequence[Contender],
    runners: Sequence[Runner],
    config: BenchConfig,
    order: np.random.Generator,
    on_event: OnEvent,
) -> None:
    sizes = [size for size in config.batches if size > 1]
    rounds = min(_BATCH_ROUNDS, config.rounds)
    for runner in runners:
        for size in sizes:
            runner(size)
    begun = time.perf_counter()
    for number in range(rounds if sizes else 0):
        for index in order.permutation(len(contenders)):
            for size in sizes:
                seconds = _time(runners[index], size)
                contenders[index].batches.setdefault(size, []).append(seconds)
        gc.collect()
        on_event(Progress("measuring batches", number + 1, rounds, "rounds"))
        if number >= 2 and time.perf_counter() - begun > config.max_seconds:
            break
    on_event(Progress("measuring batches", rounds, rounds, "rounds"))


def _warm(runner: Runner, *, until_stable: bool) -> None:
    """Run for a while; at first until it gets no faster: libraries, threads and the clock warm up, too."""
    begun, before = time.perf_counter(), float("inf")
    while time.perf_counter() - begun < _LONGEST_WARM_S:
        started, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - started < _WARM_S:
            runner(1)
            calls += 1
        pace = (time.perf_counter() - started) / calls
        if not until_stable or pace > 0.95 * before:
            return
        before = pace


@contextmanager
def _uncollected() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _time(runner: Runner, count: int) -> float:
    begin = time.perf_counter()
    runner(count)
    return time.perf_counter() - begin


def _precise(contenders: Sequence[Contender]) -> bool:
    return all(
        stats.half_width(*stats.ratio_interval(ratios)) <= _PRECISE
        for own in contenders
        if not own.row.is_teacher and (ratios := _ratios(own, contenders)) is not None
    )


def _ratios(own: Contender, contenders: Sequence[Contender]) -> list[Any] | None:
    """Teacher's time ÷ its own, by sitting and round; None without the teacher on this engine."""
    teacher = next((c for c in contenders if c.row.is_teacher and c.row.engine == own.row.engine), None)
    if teacher is None:
        return None
    return [
        np.median(theirs, axis=1) / np.median(mine, axis=1)
        for theirs, mine in zip(teacher.singles, own.singles, strict=True)
        if mine
    ]


def timing(contender: Contender) -> dict[str, Any]:
    """The figures of its own times."""
    singles_ms = 1e3 * np.array([call for sitting in contender.singles for one in sitting for call in one])
    median = float(np.median(singles_ms))
    throughput = {1: 1e3 / median}
    throughput |= {size: float(size / np.median(times)) for size, times in contender.batches.items()}
    return {
        "latency_ms": median,
        "latency_p90_ms": stats.percentile(singles_ms, 90),
        "latency_p95_ms": stats.percentile(singles_ms, 95),
        "latency_p99_ms": stats.percentile(singles_ms, 99),
        "latency_n": len(singles_ms),
        "throughput": throughput,
        "images_per_s": throughput[max(throughput)],
    }


def compared(row: Row, own: Contender, contenders: Sequence[Contender], rows: Sequence[Row]) -> Row:
    """Ratios to the teacher on the same engine, and the verdict."""
    size_ratio = rows[0].network_bytes / row.network_bytes if row.network_bytes else None
    row = replace(row, size_ratio=size_ratio)
    size = in_words(size_ratio, "smaller", "bigger", "same size") if size_ratio else ""
    bigger = size_ratio is not None and size_ratio < 1 / SAME
    ratios = _ratios(own, contenders)
    if ratios is None:
        note = f"the teacher was not run on {row.engine}: no speed ratio"
        return replace(row, verdict=size, worse=bigger, notes=(*row.notes, note))
    if row.is_teacher:
        return replace(row, speedup=1.0, speedup_interval=(1.0, 1.0), throughput_ratio=1.0, verdict="teacher")
    low, ratio, high = stats.ratio_interval(ratios)
    teacher = next(c for c in contenders if c.row.is_teacher and c.row.engine == row.engine)
    largest = max(own.batches, default=1)
    row = replace(
        row,
        speedup=ratio,
        speedup_interval=(low, high),
        speed=stats.verdict(low, ratio, high),
        throughput_ratio=float(np.median(np.divide(teacher.batches[largest], own.batches[largest])))
        if largest > 1
        else ratio,
    )
    words = (
        f"{max(ratio, 1 / ratio):,.3g}× {row.speed}"
        if row.speed != "no difference"
        else "no difference in speed"
    )
    worse = bigger or row.speed == "slower"
    return replace(row, verdict=", ".join(filter(None, (words, size))), worse=worse)
