"""`kd bench`: load models, measure them, compare them with the first.

All models run in one process, in rounds of random order: what slows the machine for a while slows all. In each of
several sessions they are loaded anew. Ratios are of times within a round, on the same engine, with an interval.
Times are of the network on prepared input; only a file with its preprocessing inside is timed with it. Memory and
start-up are measured in a process for each model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcli import data, models
from kdcli.base import metrics, runtime
from kdcli.base.config import BenchConfig
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress, ignore
from kdcli.data import ImageSet, Splits, incompatibility
from kdcli.deploy.bench.candidates import Candidate, Model, candidates_of
from kdcli.deploy.bench.latency import compare, measure
from kdcli.deploy.bench.measurements import BenchResult, Row, check_budget
from kdcli.deploy.onnx_model import OnnxClassifier

_BUSY = 1.5  # load average ÷ cores; the measurement itself adds about 1


def bench(
    paths: Sequence[Path],
    config: BenchConfig,
    images: Splits | None = None,
    on_event: OnEvent = ignore,
    *,
    skip: bool = False,
) -> BenchResult:
    """Measure models, `.pt` and `.onnx` files, against the first of them, the teacher.

    Args:
        images: data whose test split gives accuracy and agreement; by default what `config.data` names.
        skip: skip unreadable files with a note, except the teacher.

    Raises:
        KdError: no models, or a file that cannot be read or run.
    """
    if not paths:
        raise KdError("no models to measure", "Pass some: kd bench weights/teacher.pt runs/*/student.pt")
    names = _names(paths)
    threads = config.threads or runtime.available_cores()
    with _torch_threads(threads):
        # 1. Load the models and the test images.
        loaded, candidates, notes = _load_all(names, config, threads, on_event, skip=skip)
        if images is None and config.data is not None:
            images = data.load(
                config.data,
                data_dir=config.data_dir,
                cache_dir=config.cache_dir,
                fit_to=loaded[paths[0]].input_size,
                skip_broken=config.skip_broken,
                on_event=on_event,
            )

        # 2. Accuracy, then times.
        accuracy = _measure_accuracy(loaded, names, images.test if images else None, on_event)
        if not candidates:
            raise KdError("no model could be run", " ".join(notes))
        timings = measure(candidates, config, on_event)
        environment = runtime.environment()

    # 3. Memory and start-up; ratios and verdicts.
    rows = [candidate.row.extend(**timings.figures(index)) for index, candidate in enumerate(candidates)]
    if not config.no_memory:
        rows = _add_footprints(rows, candidates, on_event)
    rows = [row.extend(**accuracy.get(row.path, {})) for row in compare(rows, timings)]
    budget = config.budget_ms, config.max_drop
    return BenchResult(
        rows=tuple(rows),
        teacher=names[paths[0]],
        batches=config.batches,
        rounds=timings.rounds,
        sessions=len(timings.single),
        threads=threads,
        data_label=images.label if images else None,
        test_images=len(images.test) if images else 0,
        environment=environment,
        notes=(*notes, *_load_warning(environment)),
        budget=None if budget == (None, None) else check_budget(rows, *budget),
    )


def default_models(
    config: BenchConfig, runs_dir: Path = Path("runs"), exports_dir: Path = Path("exports")
) -> list[Path]:
    """The teacher, every finished student and every export; a file is listed once.

    Raises:
        KdError: there is no teacher, or nothing to compare it with.
    """
    found = [*sorted(runs_dir.glob("*/student.pt")), *sorted(exports_dir.glob("*.onnx"))]
    if not config.teacher.is_file():
        listed = f" Found: {', '.join(path.as_posix() for path in found[:5])}." if found else ""
        raise KdError(
            f"no teacher at {config.teacher}",
            f"Pass it with --teacher, or pass the models: kd bench TEACHER STUDENT ….{listed}",
        )
    rest = [path for path in found if path.resolve() != config.teacher.resolve()]
    if not rest:
        raise KdError(
            f"nothing to compare {config.teacher} with",
            "kd train makes runs/*/student.pt, kd export makes exports/*.onnx.",
        )
    return [config.teacher, *rest]


def _load_all(
    names: dict[Path, str], config: BenchConfig, threads: int, on_event: OnEvent, *, skip: bool
) -> tuple[dict[Path, Model], list[Candidate], list[str]]:
    """Models by path, their candidates, and notes on files and engines that were skipped."""
    loaded: dict[Path, Model] = {}
    candidates: list[Candidate] = []
    notes: list[str] = []
    size: tuple[int, int, int] | None = None  # the teacher's, for ONNX files that leave it open
    for index, (path, name) in enumerate(names.items()):
        on_event(Progress("preparing", index, len(names), "models"))
        try:
            model: Model = (
                OnnxClassifier.load(path, threads, size, external=True)
                if path.suffix.lower() == ".onnx"
                else models.load(path)
            )
            found, problems = candidates_of(path, name, model, config, threads, is_teacher=index == 0)
        except KdError as error:
            if not skip or index == 0:
                raise
            notes.append(f"left out: {error.message}")
            continue
        size = size or model.input_size
        loaded[path] = model
        candidates += found
        notes += problems
    on_event(Progress("preparing", len(names), len(names), "models"))
    return loaded, candidates, notes


def _measure_accuracy(
    loaded: Mapping[Path, Model], names: Mapping[Path, str], test: ImageSet | None, on_event: OnEvent
) -> dict[Path, dict[str, Any]]:
    """Values of `Row` for each file: measured, recorded in the file without test images, or a note."""
    found: dict[Path, dict[str, Any]] = {}
    teacher_logits: Tensor | None = None
    for index, (path, model) in enumerate(loaded.items()):
        if test is None:
            value = model.provenance.get("test_accuracy")
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[path] = {"accuracy": float(value), "accuracy_source": "recorded"}
            continue
        problem = model.why_not_runnable if isinstance(model, OnnxClassifier) else None
        mismatch = incompatibility(model.classes, model.input_size, test)
        if problem := problem or (mismatch and f"it {mismatch}"):
            found[path] = {"notes": (f"accuracy not measured: {problem}",)}
            continue
        logits = models.predict_logits(model, test.images, task=f"testing {names[path]}", on_event=on_event)
        labels = torch.from_numpy(np.asarray(test.labels))
        found[path] = {
            "accuracy": metrics.accuracy(logits, labels),
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
    for number, (row, candidate) in enumerate(zip(rows, candidates, strict=True)):
        on_event(Progress("memory and start-up", number, len(rows), "models"))
        footprint = candidate.footprint()
        notes = [f"memory not measured: {footprint.problem}"] if footprint.problem else []
        measured.append(row.extend(footprint=footprint, notes=notes))
    on_event(Progress("memory and start-up", len(rows), len(rows), "models"))
    return measured


def _load_warning(environment: dict[str, Any]) -> tuple[str, ...]:
    load, cores = environment["load_average_1min"], environment["cpu"]["cores"]
    if load is None or load <= _BUSY * cores:
        return ()
    return (f"this machine is busy (load {load:.1f} on {cores} cores): times are longer than they could be",)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
