"""`kd bench`: load models on the engines that run them, measure them, compare them with the first.

All models run in one process, in rounds of random order: what slows the machine for a while slows all. In each of
several sessions they are loaded anew. Ratios are of times within a round, on the same engine, with an interval.
Times are of the network on prepared input; only a file with its preprocessing inside is timed with it. Memory and
start-up are measured in a process for each model.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcli import data, models
from kdcli.base import metrics, runtime
from kdcli.base.config import BenchConfig
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import OnEvent, Progress, ignore
from kdcli.base.text import first_line
from kdcli.data import ImageSet, Splits
from kdcli.deploy.bench.footprint import measure_footprint
from kdcli.deploy.bench.latency import Candidate, Runner, compare, measure
from kdcli.deploy.bench.measurements import BenchResult, Row, rows_within
from kdcli.deploy.load import fitted, kind_of, load_model, teachers_of
from kdcli.deploy.onnx_model import OnnxClassifier, OnnxRunner
from kdcli.deploy.onnx_model.translate import to_onnx
from kdcli.models import Classifier

TORCH, COMPILED, ORT = "torch", "compiled", "onnxruntime"
ENGINES = {"both": (TORCH, ORT), "all": (TORCH, COMPILED, ORT)}
_BUSY = 1.5  # load average ÷ cores; the measurement itself adds about 1

Model = Classifier | OnnxClassifier


def bench(
    paths: Sequence[Path],
    config: BenchConfig,
    images: Splits | None = None,
    on_event: OnEvent = ignore,
    *,
    skip: bool = False,
) -> BenchResult:
    """Measure models, `.pt` and `.onnx` files, against the first, the teacher; a KdError if one cannot be run.

    Args:
        images: data whose test split gives accuracy and agreement; by default what `config.data` names.
        skip: skip unreadable files with a note, except the teacher.
    """
    if not paths:
        raise KdError("no models to measure", "Pass the paths of some.")
    names = _names(paths)
    threads = runtime.set_threads(config.threads)
    # 1. Load the models and the test images.
    loaded, candidates, notes = _load_all(names, config, threads, on_event, skip=skip)
    if images is None and config.data is not None:
        images = data.load(**data.source_for(_sized(loaded), config), on_event=on_event)
    # 2. Accuracy, then times.
    accuracy = _measure_accuracy(loaded, names, images.test if images else None, on_event)
    timings = measure(candidates, config, on_event)
    environment = runtime.environment()
    # 3. Memory and start-up; ratios and verdicts.
    rows = [candidate.row.extend(**timings.figures(index)) for index, candidate in enumerate(candidates)]
    rows = [compare(index, rows, timings).extend(**accuracy[row.path]) for index, row in enumerate(rows)]
    if not config.no_memory:
        rows = _add_footprints(rows, candidates, on_event)
    load, cores = environment["load_average_1min"], environment["cpu"]["cores"]
    if load is not None and load > _BUSY * cores:
        notes.append(f"this machine is busy (load {load:.1f}, {cores} cores): times are too long")
    limits = config.budget_ms, config.max_drop
    within = [(row.name, row.engine) for row in rows_within(rows, *limits)]
    return BenchResult(
        rows=tuple(rows),
        teacher=names[paths[0]],
        batches=config.batch,
        rounds=timings.rounds,
        sessions=len(timings.single),
        threads=threads,
        data_label=images.label if images else None,
        test_images=len(images.test) if images else 0,
        environment=environment,
        notes=tuple(notes),
        within_limits=None if limits == (None, None) else tuple(within),
    )


def _load_all(
    names: dict[Path, str], config: BenchConfig, threads: int, on_event: OnEvent, *, skip: bool
) -> tuple[dict[Path, Model], list[Candidate], list[str]]:
    """Models by path, their candidates, and notes on files and engines that were skipped."""
    first = next(iter(names))
    loaded: dict[Path, Model] = {}
    found: dict[Path, list[Candidate]] = {}
    notes: list[str] = []
    # checkpoints first: they have the size of images that ONNX files may leave open
    for path in sorted(names, key=lambda path: kind_of(path) == "onnx"):
        on_event(Progress("preparing", len(loaded), len(names), "models"))
        try:
            size = _sized(loaded).input_size if loaded else None
            model = load_model(path, threads, config, size, several=True)
            found[path], problems = candidates_of(
                path, names[path], model, config, threads, is_teacher=path == first
            )
        except KdError as error:
            if not skip or path == first:
                raise
            notes.append(f"left out: {error.message}")
            continue
        loaded[path] = model
        notes += problems
    loaded = {path: loaded[path] for path in names if path in loaded}
    candidates = [each for path in loaded for each in found[path]]
    if config.given and not any(model.is_foreign for model in loaded.values()):
        flags = ", ".join(map(config.flag, config.given))
        raise UsageError("all models record their own input and classes", f"Leave out {flags}.")
    on_event(Progress("preparing", len(names), len(names), "models"))
    return loaded, candidates, notes


def _sized(loaded: Mapping[Path, Model]) -> Model:
    """The model whose size the images get: the first that does not resize them itself, else that of the largest."""
    return min(loaded.values(), key=lambda each: -each.input_size[0] if each.any_size else -math.inf)


def candidates_of(
    path: Path, name: str, model: Model, config: BenchConfig, threads: int, *, is_teacher: bool
) -> tuple[list[Candidate], list[str]]:
    """A candidate for each engine, and notes on engines that cannot run the model."""
    size = (max(config.batch), *model.input_size)
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    counts = {key: value for key, value in vars(model.counts()).items() if key != "layers"}
    row = Row(name, path, engine=ORT, is_teacher=is_teacher, file_bytes=model.file_bytes, **counts)
    if isinstance(model, OnnxClassifier):
        return [_onnx_candidate(row, model, raw, threads)], []
    network = model.network.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        prepared = model.prepare(raw).contiguous(memory_format=torch.channels_last)
    candidates: list[Candidate] = []
    notes: list[str] = []
    for engine in ENGINES.get(config.engine, (config.engine,)):
        try:
            if engine == ORT:
                content = to_onnx(model, opset=18, with_preprocessing=False).SerializeToString()
                inputs = np.ascontiguousarray(prepared.numpy())
                candidates.append(_ort_candidate(row, content, inputs, threads))
                continue
            load = _torch_loader(engine, network, prepared, config.batch)
        except Exception as error:  # torch's compiler and the C++ compiler raise many kinds
            notes.append(f"{name} is not run as {engine}: {first_line(error, 120)}")
            continue
        shape = tuple(prepared.shape[1:])
        footprint = partial(measure_footprint, path, engine, threads, shape, len(prepared))
        candidates.append(Candidate(row.extend(engine=engine), load, footprint))
    if not candidates:
        raise KdError(f"{name} could not be run", " ".join(notes))
    return candidates, notes


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


def _onnx_candidate(row: Row, model: OnnxClassifier, raw: Tensor, threads: int) -> Candidate:
    notes = []
    inputs = model.to_layout(raw.numpy() / 255) if model.why_not_runnable else model.prepare(raw)
    if model.takes_pixels:
        notes.append("timed with its preprocessing, which is inside")
    batch = model.runner.batch
    if batch == 1:
        notes.append("its batch is fixed at 1; images of a batch are run singly")
    elif batch is not None:
        notes.append(f"its batch is fixed at {batch}; one image takes as long as {batch}")
    content, output = model.model.SerializeToString(), model.runner.output
    return _ort_candidate(row.extend(notes=notes), content, inputs, threads, batch, output)


def _ort_candidate(
    row: Row,
    content: bytes,
    inputs: npt.NDArray[Any],
    threads: int,
    batch: int | None = None,
    output: str = "",
) -> Candidate:
    """An ONNX model and its input; `batch`: images per call, if fixed; `output`: by default the first."""

    def load() -> Runner:
        runner = OnnxRunner(content, threads, str(row.path), output=output)
        if batch is None:  # timed without kd's own overhead
            return lambda count: runner.call(inputs[:count])
        return lambda count: runner.run(inputs[:count], batch)

    form = inputs.shape[1:], batch or len(inputs), str(inputs.dtype)
    return Candidate(row, load, partial(measure_footprint, content, ORT, threads, *form))


def _measure_accuracy(
    loaded: Mapping[Path, Model], names: Mapping[Path, str], test: ImageSet | None, on_event: OnEvent
) -> dict[Path, dict[str, Any]]:
    """Values of `Row` for each file: measured, recorded in the file without test images, or a note."""
    found: dict[Path, dict[str, Any]] = {path: {} for path in loaded}
    teacher_logits: Tensor | None = None
    recorded = (each for model in loaded.values() for each in teachers_of(model.provenance, model.path))
    # of teachers, in their students' files
    maps = {each.sha256: file for each in recorded if (file := each.inputs.class_map) is not None}
    for index, (path, each) in enumerate(loaded.items()):
        if test is None:
            value = each.provenance.get("test_accuracy")
            if isinstance(value, float):
                found[path] = {"accuracy": value, "accuracy_source": "recorded"}
            continue
        try:
            model = fitted(each, test, maps.get(each.file_sha256))
            logits = models.predict_logits(
                model, test.images, task=f"testing {names[path]}", on_event=on_event
            )
        except KdError as error:
            found[path] = {"notes": (f"accuracy not measured: {error.message}",)}
            continue
        labels = torch.from_numpy(np.asarray(test.labels))
        accuracy = metrics.accuracy(logits, labels)
        found[path] = {
            "accuracy": accuracy,
            "accuracy_interval": metrics.wilson_interval(accuracy, len(labels)),
            "accuracy_source": "measured",
            "ece": metrics.calibration_error(logits, labels),
        }
        if teacher_logits is not None:
            found[path]["agreement"] = metrics.agreement(logits, teacher_logits)
            found[path]["kl"] = metrics.divergence(logits, teacher_logits)
        if index == 0:
            teacher_logits = logits
    return found


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """The run of `runs/<run>/student.pt`, else the file name; the whole path where two are the same."""

    def short(path: Path) -> str:
        if path.suffix.lower() == ".onnx":
            return path.name
        return path.parent.name if path.stem in ("student", "last") and path.parent.name else path.stem

    names = [short(path) for path in paths]
    return {
        path: name if names.count(name) == 1 else path.as_posix()
        for path, name in zip(paths, names, strict=True)
    }


def _add_footprints(rows: Sequence[Row], candidates: Sequence[Candidate], on_event: OnEvent) -> list[Row]:
    measured = []
    for number, (row, candidate) in enumerate(zip(rows, candidates, strict=True), 1):
        try:
            measured.append(row.extend(footprint=candidate.footprint()))
        except RuntimeError as error:
            measured.append(row.extend(notes=[f"memory not measured: {error}"]))
        on_event(Progress("memory and start-up", number, len(rows), "models"))
    return measured
