"""`kd report`: one self-contained HTML page.

Texts may come from files of unknown origin: Jinja2 escapes all of them, only kd's own style sheet and script are
inserted as markup, and the page's content security policy allows that one script, by its hash, and no requests.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import resources
from itertools import groupby
from pathlib import Path
from shlex import join
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kdcli import __version__
from kdcli.base import units
from kdcli.base.config import ReportConfig
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, ignore
from kdcli.base.files import atomic_path, sha256_file
from kdcli.base.text import reason
from kdcli.deploy.bench import Row
from kdcli.report import figures, filters, page_figures
from kdcli.report.details import Section, details_of, missing, path_argument
from kdcli.report.examine import Examined, examine, recorded_teacher
from kdcli.report.gather import COMPARISON, Run, gather
from kdcli.report.page_figures import embed
from kdcli.report.speed import Speed, deployed, from_file, measure
from kdcli.studies.compare import Comparison
from kdcli.studies.compare import read as read_comparison
from kdcli.studies.compare.tables import cells, statistics_note

MAX_SECTIONS = 20  # runs with a section of their own
MAX_EPOCHS = 200  # rows of the table of epochs
MAX_COMPARISONS = 20
MAX_METHODS = 60  # rows of a comparison


@dataclass(frozen=True)
class Report:
    """A page and a summary of it.

    Attributes:
        html: the page.
        runs: figures of each run, plain values.
        left_out: (name, reason) of runs and comparisons that are not on it.
        notes: what is missing and why, one line each.
        comparisons: folders of those that have a section.
    """

    html: str
    runs: tuple[dict[str, Any], ...]
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    comparisons: tuple[str, ...] = ()


def make_report(
    folders: Sequence[Path],
    config: ReportConfig,
    *,
    others: Sequence[Path] = (),
    comparisons: Sequence[Path] = (),
    speed: Speed | None = None,
    on_event: OnEvent = ignore,
) -> Report:
    """Read runs, measure models, and make the page.

    Args:
        folders: of runs.
        others: further models to time beside the students, as exported files.
        comparisons: folders of kd compare, for a section each.
        speed: a benchmark that has been made already.

    Raises:
        KdError: no run is finished, or the file named by `config.bench` is no benchmark.
    """
    # 1. Records of the runs; their models on test images
    runs, left_out = gather(folders)
    if speed is None and config.bench is not None:
        speed = from_file(config.bench)
    examined = examine(runs, config, on_event)
    # 2. Latencies
    if speed is None and config.no_bench:
        speed = Speed(unavailable="Latencies were left out (--no-bench).")
    elif speed is None:
        teacher = _teacher_file(runs, examined, config)
        speed = measure([run.student for run in runs], teacher, others, config, on_event)
    speed = replace(speed, rows=_with_accuracy(speed.rows, runs, examined))
    rows = {_real(row.path): row for row in deployed(speed.rows)}
    # 3. A teacher's own run and the copy that others learned from are one file: one row of figures
    teachers = {found.teacher.sha256: found.teacher for found in examined if found.teacher is not None}
    separate = dict(teachers)
    for run, found in zip(runs, examined, strict=True):
        teacher_figures = separate.pop(sha256_file(run.student), None) if found.is_teacher else None
        if teacher_figures is not None and _real(teacher_figures.path) in rows:
            rows[_real(run.student)] = rows[_real(teacher_figures.path)]
    # 4. Sections
    sections = []
    for number, (run, found) in enumerate(zip(runs, examined, strict=True), 1):
        evaluation = found.evaluation or run.result.evaluation
        sections.append(Section(f"run-{number}", run, found, evaluation, rows.get(_real(run.student))))
    compared, unread = _read_comparisons(comparisons)
    html = _render(
        sections=sections,
        detailed=[details_of(section) for section in sections[:MAX_SECTIONS]],
        teachers=[(found, rows.get(_real(found.path)), sha in separate) for sha, found in teachers.items()],
        labels=sorted({found.label for found in examined if found.label}),
        best=_best(sections),
        left_out=reason_groups(left_out + unread),
        comparisons=[_comparison(f"comparison-{n}", *pair) for n, pair in enumerate(compared, 1)],
        command=_command(sections, [path for path, _ in compared], config.output),
        no_images=config.no_images,
        **_epochs(sections),
        **_latencies(speed),
    )
    notes = [f"{section.run.name}: {text}" for section in sections for text in missing(section)]
    return Report(
        html,
        tuple(_plain(section) for section in sections),
        tuple(left_out + unread),
        (*notes, speed.unavailable) if speed.unavailable else tuple(notes),
        tuple(path.as_posix() for path, _ in compared),
    )


def write_report(report: Report, target: Path) -> None:
    """Write the page atomically.

    Raises:
        KdError: it cannot be written.
    """
    try:
        with atomic_path(target) as temporary:
            temporary.write_text(report.html, encoding="utf-8")
    except OSError as error:
        raise KdError(f"cannot write {target}: {reason(error)}", "Choose another path with -o.") from error


def reason_groups(left_out: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """(name, reason) pairs as (reason, names)."""
    ordered = sorted(left_out, key=lambda pair: pair[1])
    return [(why, [name for name, _ in group]) for why, group in groupby(ordered, lambda pair: pair[1])]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kdcli.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": filters.plain,
        "number": filters.number,
        "signed": filters.signed,
        "ms": filters.milliseconds,
        "data_uri": filters.data_uri,
        "size": units.size,
        "count": units.count,
    }
    return environment


def _render(**values: Any) -> str:
    script = _asset("report.js")
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            css=Markup(_asset("report.css")),  # noqa: S704 — kd's own files
            script=Markup(script),  # noqa: S704
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=__version__,
            **values,
        )
    )


def _asset(name: str) -> str:
    return resources.files("kdcli.report").joinpath("assets", name).read_text(encoding="utf-8")


def _epochs(sections: Sequence[Section]) -> dict[str, Any]:
    """Template values of validation accuracy over epochs: figure, and table with epochs down and runs across."""
    validated = [section for section in sections if section.run.validation]
    lines = sorted(validated, key=lambda section: -section.run.validation[-1][1])[: page_figures.MAX_LINES]
    lines = [section for section in sections if section in lines]
    figure = None
    if lines:
        figure = embed(
            partial(page_figures.epochs, [section.run for section in lines]),
            "Validation accuracy over epochs. The table below has the same figures.",
        )
    columns = [dict(section.run.validation) for section in lines]
    numbers = sorted({epoch for column in columns for epoch in column})
    step = -(-len(numbers) // MAX_EPOCHS) or 1
    return {
        "lines": lines,
        "validated_count": len(validated),
        "unvalidated": [section.run.name for section in sections if not section.run.validation],
        "epochs_figure": figure,
        "epoch_rows": [(number, [column.get(number) for column in columns]) for number in numbers[::step]],
        "epoch_step": step,
    }


def _latencies(speed: Speed) -> dict[str, Any]:
    """Template values of accuracy against latency."""
    rows = deployed(speed.rows)
    known = [row for row in rows if row.accuracy is not None]
    figure = None
    if known:
        figure = embed(
            lambda target: figures.pareto(known, target, (5.0, 4.0)),
            "Accuracy over latency: a disc for each model, its area the size of the network, and the Pareto front. "
            "The table below has the same figures.",
        )
    return {
        "speed": speed,
        "speed_rows": rows,
        "front": [row.path for row in figures.pareto_front(known)],
        "front_figure": figure,
    }


def _read_comparisons(
    folders: Sequence[Path],
) -> tuple[list[tuple[Path, Comparison]], list[tuple[str, str]]]:
    """Comparisons by folder, and (name, reason) of those that are left out."""
    found: list[tuple[Path, Comparison]] = []
    left_out: list[tuple[str, str]] = []
    for path in folders[:MAX_COMPARISONS]:
        try:
            found.append((path, read_comparison(path / COMPARISON)))
        except KdError as error:
            left_out.append((path.name or path.as_posix(), error.message))
    left_out += [(path.name, "more comparisons than a page shows") for path in folders[MAX_COMPARISONS:]]
    return found, left_out


def _comparison(key: str, path: Path, found: Comparison) -> dict[str, Any]:
    """Template values of a comparison's section."""
    rows = found.standings[:MAX_METHODS]
    figure = None
    if any(row.count for row in rows):
        figure = embed(
            lambda target: figures.comparison(
                found.model_copy(update={"standings": rows}), target, width=7.0
            ),
            "Test accuracy of each method and its difference to the baseline: a dot for each run, a diamond for the "
            "mean, a line for its 95 % interval over seeds. The table has the same figures.",
        )
    return {
        "key": key,
        "name": path.name or path.resolve().name,
        "found": found,
        "rows": [(row, cells(row)) for row in rows],
        "statistics": statistics_note(found),
        "figure": figure,
    }


def _command(sections: Sequence[Section], compared: Sequence[Path], output: Path) -> str:
    """The command that makes this page; a comparison stands for its runs."""
    parents = {path.resolve() for path in compared}
    runs = [
        section.run.folder for section in sections if parents.isdisjoint(section.run.folder.resolve().parents)
    ]
    return join(["kd", "report", *map(path_argument, (*compared, *runs)), "-o", path_argument(output)])


def _best(sections: Sequence[Section]) -> Section | None:
    """The student with the highest validation accuracy: test data selects nothing."""
    known = [
        section
        for section in sections
        if section.run.result.val_accuracy is not None and not section.examined.is_teacher
    ]
    return max(known, key=lambda section: section.run.result.val_accuracy or 0.0) if known else None


def _teacher_file(runs: Sequence[Run], examined: Sequence[Examined], config: ReportConfig) -> Path | None:
    """The teacher that ratios refer to: --teacher, else that of most runs, if its file is unchanged."""
    if config.teacher is not None and config.teacher.is_file():
        return config.teacher
    used = [found.teacher.path for found in examined if found.teacher is not None]
    if not used:
        recorded = [recorded_teacher(run) for run in runs]
        used = [
            path for path, sha in recorded if path is not None and path.is_file() and sha256_file(path) == sha
        ]
    return max(used, key=used.count) if used else None


def _with_accuracy(rows: Sequence[Row], runs: Sequence[Run], examined: Sequence[Examined]) -> tuple[Row, ...]:
    """Rows with the accuracies measured for this page in place of those recorded in files."""
    measured: dict[str, float] = {}
    for run, found in zip(runs, examined, strict=True):
        if found.evaluation is not None:
            measured[_real(run.student)] = found.evaluation.accuracy
        if found.teacher is not None:
            measured[_real(found.teacher.path)] = found.teacher.evaluation.accuracy
    return tuple(
        replace(row, accuracy=measured[_real(row.path)], accuracy_source="measured")
        if _real(row.path) in measured
        else row
        for row in rows
    )


def _real(path: Path) -> str:
    """Identity of a file that may not exist."""
    return os.path.realpath(path)


def _plain(section: Section) -> dict[str, Any]:
    """A run's figures for `--json`."""
    run, row, evaluation = section.run, section.row, section.evaluation
    result = run.result
    return {
        "run": run.folder.as_posix(),
        "method": result.method,
        "student": result.student,
        "seed": result.seed,
        "parameters": result.parameters,
        "val_accuracy": result.val_accuracy,
        "measured": section.examined.evaluation is not None,
        "test_images": evaluation.count,
        "test_accuracy": evaluation.accuracy,
        "accuracy_interval": list(evaluation.accuracy_interval),
        "calibration_error": evaluation.calibration_error,
        "agreement": evaluation.agreement,
        "teacher_accuracy": evaluation.teacher_accuracy,
        "disagreements": section.examined.disagreements if section.examined.teacher else None,
        "engine": row.engine if row else None,
        "latency_ms": row.latency_ms if row else None,
        "speedup": row.speedup if row else None,
        "network_bytes": row.network_bytes if row else None,
        "size_ratio": row.size_ratio if row else None,
    }
