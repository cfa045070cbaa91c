"""`kd report`: one self-contained HTML page.

Texts may come from files of unknown origin: Jinja2 escapes all of them, and the page's content security policy
allows kd's own script, by its hash, and no requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from shlex import join
from typing import Any

from kdcli.base.config import ReportConfig
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, ignore
from kdcli.base.files import sha256_file
from kdcli.deploy.bench import Row
from kdcli.engine.records import read_record
from kdcli.report import figures, page_figures
from kdcli.report.details import Section, details_of, missing
from kdcli.report.examine import Examined, examine, recorded_teacher
from kdcli.report.gather import COMPARISON, Run, gather
from kdcli.report.page_figures import embed
from kdcli.report.render import render
from kdcli.report.speed import Speed, deployed, from_file, measure
from kdcli.studies.compare import Comparison
from kdcli.studies.compare.tables import cells, statistics_note

MAX_SECTIONS = 20  # runs with a section of their own
MAX_EPOCHS = 200  # rows of the table of epochs


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
    rows = {row.path.resolve(): row for row in deployed(speed.rows)}
    # 3. A teacher's own run and the copy that others learned from are one file: one row of figures
    teachers = {found.teacher.sha256: found.teacher for found in examined if found.teacher is not None}
    separate = dict(teachers)
    for run, found in zip(runs, examined, strict=True):
        teacher_figures = separate.pop(sha256_file(run.student), None) if found.is_teacher else None
        if teacher_figures is not None and teacher_figures.path.resolve() in rows:
            rows[run.student.resolve()] = rows[teacher_figures.path.resolve()]
    # 4. Sections
    sections = []
    for number, (run, found) in enumerate(zip(runs, examined, strict=True), 1):
        evaluation = found.evaluation or run.result.evaluation
        sections.append(Section(f"run-{number}", run, found, evaluation, rows.get(run.student.resolve())))
    compared, unread = _read_comparisons(comparisons)
    html = render(
        sections=sections,
        detailed=[details_of(section) for section in sections[:MAX_SECTIONS]],
        teachers=[
            (found, rows.get(found.path.resolve()), sha in separate) for sha, found in teachers.items()
        ],
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


def reason_groups(left_out: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """(name, reason) pairs as (reason, names)."""
    ordered = sorted(left_out, key=lambda pair: pair[1])
    return [(why, [name for name, _ in group]) for why, group in groupby(ordered, lambda pair: pair[1])]


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
            partial(figures.pareto, known, size=(5.0, 4.0)),
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
    for path in folders:
        try:
            found.append((path, read_record(Comparison, path / COMPARISON)))
        except KdError as error:
            left_out.append((path.name or path.as_posix(), error.message))
    return found, left_out


def _comparison(key: str, path: Path, found: Comparison) -> dict[str, Any]:
    """Template values of a comparison's section."""
    figure = None
    if any(row.count for row in found.standings):
        figure = embed(
            partial(figures.comparison, found, width=7.0),
            "Test accuracy of each method and its difference to the baseline: a dot for each run, a diamond for the "
            "mean, a line for its 95 % interval over seeds. The table has the same figures.",
        )
    return {
        "key": key,
        "name": path.name or path.resolve().name,
        "found": found,
        "rows": [(row, cells(row)) for row in found.standings],
        "statistics": statistics_note(found),
        "figure": figure,
    }


def _command(sections: Sequence[Section], compared: Sequence[Path], output: Path) -> str:
    """The command that makes this page; a comparison stands for its runs."""
    parents = {path.resolve() for path in compared}
    folders = [section.run.folder for section in sections]
    runs = [folder for folder in folders if parents.isdisjoint(folder.resolve().parents)]
    return join(["kd", "report", *(path.as_posix() for path in (*compared, *runs)), "-o", output.as_posix()])


def _best(sections: Sequence[Section]) -> Section | None:
    """The student with the highest validation accuracy: test data selects nothing."""
    students = [section for section in sections if not section.examined.is_teacher]
    known = [section for section in students if section.run.result.val_accuracy is not None]
    return max(known, key=lambda section: section.run.result.val_accuracy or 0.0) if known else None


def _teacher_file(runs: Sequence[Run], examined: Sequence[Examined], config: ReportConfig) -> Path | None:
    """The teacher that ratios refer to: --teacher, else that of most runs, if its file is unchanged."""
    if config.teacher is not None:
        return config.teacher
    used = [found.teacher.path for found in examined if found.teacher is not None]
    if not used:
        recorded = [(path, sha) for path, sha in map(recorded_teacher, runs) if path is not None]
        used = [path for path, sha in recorded if path.is_file() and sha256_file(path) == sha]
    return max(used, key=used.count) if used else None


def _with_accuracy(rows: Sequence[Row], runs: Sequence[Run], examined: Sequence[Examined]) -> tuple[Row, ...]:
    """Rows with the accuracies measured for this page in place of those recorded in files."""
    measured: dict[Path, float] = {}
    for run, found in zip(runs, examined, strict=True):
        if found.evaluation is not None:
            measured[run.student.resolve()] = found.evaluation.accuracy
        if found.teacher is not None:
            measured[found.teacher.path.resolve()] = found.teacher.evaluation.accuracy
    return tuple(
        replace(row, accuracy=measured[row.path.resolve()], accuracy_source="measured")
        if row.path.resolve() in measured
        else row
        for row in rows
    )


def _plain(section: Section) -> dict[str, Any]:
    """A run's figures for `--json`."""
    result, row, evaluation = section.run.result, section.row, section.evaluation
    settings = ("method", "student", "seed", "parameters", "val_accuracy")
    measured = ("accuracy_interval", "calibration_error", "agreement", "teacher_accuracy")
    timed = ("engine", "latency_ms", "speedup", "network_bytes", "size_ratio")
    return {
        "run": section.run.folder.as_posix(),
        **{name: getattr(result, name) for name in settings},
        "measured": section.examined.evaluation is not None,
        "test_images": evaluation.count,
        "test_accuracy": evaluation.accuracy,
        **{name: getattr(evaluation, name) for name in measured},
        "disagreements": section.examined.disagreements if section.examined.teacher else None,
        **{name: getattr(row, name) if row else None for name in timed},
    }
