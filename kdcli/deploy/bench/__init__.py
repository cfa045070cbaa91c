"""Was it worth it? Size, latency, throughput, memory and accuracy of models against their teacher, on this CPU.

All models run in one process, in rounds of random order: what slows the machine for a while slows all. In each of
several sittings they are loaded anew. Ratios are of times within a round, on the same engine, with an interval.
Times are of the network on prepared input; only a file that has its preprocessing inside is timed with it. Memory
and start-up are of a process for each model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdcli import data
from kdcli.base import runtime
from kdcli.base.config import BenchConfig
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress, ignore
from kdcli.data import Splits
from kdcli.deploy.bench.contenders import Contender, compared, contenders_of, measure, timing
from kdcli.deploy.bench.quality import Quality, quality_of
from kdcli.deploy.bench.rows import BenchResult, Row, Wanted, keeping
from kdcli.deploy.load import load_model
from kdcli.deploy.onnx_model import OnnxClassifier
from kdcli.models import Classifier

__all__ = ["BenchResult", "Row", "Wanted", "bench", "default_models"]


def bench(
    paths: Sequence[Path],
    config: BenchConfig,
    images: Splits | None = None,
    on_event: OnEvent = ignore,
    *,
    skip: bool = False,
) -> BenchResult:
    """Measure models against the first of them.

    Args:
        paths: `.pt` and `.onnx` files; the first is the teacher.
        config: how to measure.
        images: data whose test split gives accuracy and agreement; by default what `config.data` names.
        on_event: told of progress.
        skip: leave out files that cannot be read, with a note; never the teacher.

    Raises:
        KdError: nothing to measure, or a file that cannot be read or run.
    """
    if not paths:
        raise KdError("no models to measure", "Name some: kd bench weights/teacher.pt runs/*/student.pt")
    threads = config.threads or runtime.available_cores()
    with _threads(threads):
        names = dict(zip(paths, _names(paths), strict=True))
        loaded: dict[Path, Classifier | OnnxClassifier] = {}
        contenders: list[Contender] = []
        skipped: list[str] = []
        for index, path in enumerate(paths):
            on_event(Progress("preparing", index, len(paths), "models"))
            try:
                model = _load(path, threads, loaded[paths[0]].input_size if loaded else None)
                made, problems = contenders_of(
                    path, names[path], model, config, threads, is_teacher=index == 0
                )
            except KdError as error:
                if not skip or index == 0:
                    raise
                skipped.append(f"left out: {error.message}")
            else:
                loaded[path] = model
                contenders += made
                skipped += problems
        on_event(Progress("preparing", len(paths), len(paths), "models"))
        if images is None and config.data is not None:
            images = data.load(
                config.data,
                data_dir=config.data_dir,
                cache_dir=config.cache_dir,
                fit_to=loaded[paths[0]].input_size,
                skip_broken=config.skip_broken,
                on_event=on_event,
            )
        quality = quality_of(
            [names[path] for path in loaded], list(loaded.values()), images.test if images else None, on_event
        )
        if not contenders:
            raise KdError("no model could be run", " ".join(skipped))
        rounds = measure(contenders, config, on_event)
        environment = runtime.environment()
    rows = [replace(contender.row, **timing(contender)) for contender in contenders]
    if not config.no_memory:
        rows = [
            _with_memory(row, contender)
            for row, contender in zip(rows, _told(contenders, on_event), strict=True)
        ]
    rows = [
        compared(row, contender, contenders, rows) for row, contender in zip(rows, contenders, strict=True)
    ]
    of_path = dict(zip(loaded, quality, strict=True))
    rows = [_with_quality(row, of_path[row.path]) for row in rows]
    return BenchResult(
        rows=tuple(rows),
        teacher=names[paths[0]],
        batches=config.batches,
        rounds=rounds,
        sittings=len(contenders[0].singles),
        threads=threads,
        data_label=images.label if images else None,
        test_images=len(images.test) if images else 0,
        environment=environment,
        notes=(*skipped, *_busy(environment)),
        wanted=keeping(rows, config.budget_ms, config.max_drop)
        if config.budget_ms is not None or config.max_drop is not None
        else None,
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
            f"Name it with --teacher, or name the models: kd bench TEACHER STUDENT ….{listed}",
        )
    rest = [path for path in found if path.resolve() != config.teacher.resolve()]
    if not rest:
        raise KdError(
            f"nothing to compare {config.teacher} with",
            "kd train makes runs/*/student.pt, kd export makes exports/*.onnx.",
        )
    return [config.teacher, *rest]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _busy(environment: dict[str, Any]) -> tuple[str, ...]:
    load, cores = environment["load_average_1min"], environment["cpu"]["cores"]
    if load is None or load <= 1.5 * cores:  # the measurement itself makes a load of about `cores`
        return ()
    return (f"this machine is busy (load {load:.1f} on {cores} cores): times are longer than they could be",)


def _load(path: Path, threads: int, size: tuple[int, int, int] | None) -> Classifier | OnnxClassifier:
    """A model; an ONNX file that leaves the image size open takes `size`, the teacher's."""
    if path.suffix.lower() == ".onnx":
        return OnnxClassifier.load(path, threads, size, external=True)
    return load_model(path, threads)


def _names(paths: Sequence[Path]) -> list[str]:
    """The run of `runs/<run>/student.pt`, else the file name; the whole path where two are the same."""
    names = []
    for path in paths:
        if path.suffix.lower() == ".onnx":
            names.append(path.name)
        else:
            names.append(
                path.parent.name if path.stem in ("student", "last") and path.parent.name else path.stem
            )
    return [
        name if names.count(name) == 1 else path.as_posix() for name, path in zip(names, paths, strict=True)
    ]


def _told(contenders: list[Contender], on_event: OnEvent) -> Iterator[Contender]:
    for number, contender in enumerate(contenders):
        on_event(Progress("memory and start-up", number, len(contenders), "models"))
        yield contender
    on_event(Progress("memory and start-up", len(contenders), len(contenders), "models"))


def _with_memory(row: Row, contender: Contender) -> Row:
    found = contender.alone()
    notes = (f"memory not measured: {found.problem}",) if found.problem else ()
    return replace(row, alone=found, notes=(*row.notes, *notes))


def _with_quality(row: Row, quality: Quality) -> Row:
    return replace(
        row,
        accuracy=quality.accuracy,
        accuracy_source=quality.source,
        agreement=quality.agreement,
        kl=quality.kl,
        ece=quality.ece,
        notes=(*row.notes, *quality.notes),
    )
