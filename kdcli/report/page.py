"""`kd report`: one page that needs nothing beside itself.

Every text in it may come from a file of unknown origin. Jinja2 escapes all of it; what it takes as markup is made
here and in `inline` alone; and the page's own policy lets the browser run no script but the one whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kdcli import __version__
from kdcli.base import units
from kdcli.base.config import ReportConfig
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, ignore
from kdcli.base.files import atomic_path, sha256_file
from kdcli.deploy.bench import Row
from kdcli.report import inline, words
from kdcli.report.details import Section, command, details_of, missing, path_word
from kdcli.report.examine import Examined, TeacherFigures, examine, recorded_teacher
from kdcli.report.figures import pareto_front
from kdcli.report.gather import COMPARISON, Run, gather
from kdcli.report.speed import Speed, deployed, from_file, measured
from kdcli.studies.compare import Comparison
from kdcli.studies.compare import read as read_comparison
from kdcli.studies.compare.tables import cells, statistics_note

MOST_DETAILED = 20  # runs with a section of their own
MOST_EPOCHS = 200
MOST_COMPARISONS = 20
MOST_METHODS = 60  # rows of a comparison


@dataclass(frozen=True)
class Report:
    """A page, and what is in it.

    Attributes:
        html: the page.
        runs: its figures, plain values.
        comparisons: the folders of those that have a section.
        left_out: name and reason of runs that are not in it.
        notes: one line each on what is missing and why.
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
    """Read runs, measure what can be measured, and make the page.

    Args:
        folders: of runs.
        config: see `ReportConfig`.
        others: further models to time beside the students, as exported files.
        comparisons: folders of kd compare, for a section each.
        speed: a measurement that has been made already.
        on_event: told of progress.

    Raises:
        KdError: no run is finished, or the file named by `config.bench` is no benchmark.
    """
    runs, left_out = gather(folders)
    speed = from_file(config.bench) if speed is None and config.bench is not None else speed
    examined = examine(runs, config, on_event)
    if speed is None:
        if config.no_bench:
            speed = Speed(why_not="Latencies were left out (--no-bench).")
        else:
            teacher = _teacher_file(runs, examined, config)
            speed = measured([run.student for run in runs], teacher, others, config, on_event)
    speed = replace(speed, rows=_with_accuracy(speed.rows, runs, examined))
    by_path = {_resolved(row.path): row for row in deployed(speed.rows)}
    teachers = {found.teacher.sha256: found.teacher.path for found in examined if found.teacher is not None}
    for run, found in zip(runs, examined, strict=True):
        if (
            found.is_teacher
        ):  # one file under two names: a teacher's run, and the copy that others learned from
            copy = teachers.pop(sha256_file(run.student), run.student)
            if _resolved(copy) in by_path:
                by_path[_resolved(run.student)] = by_path[_resolved(copy)]
    sections = [
        Section(
            f"run-{number}",
            run,
            found,
            found.evaluation or run.recorded.test,
            by_path.get(_resolved(run.student)),
        )
        for number, (run, found) in enumerate(zip(runs, examined, strict=True), 1)
    ]
    compared, unread = _compared(comparisons)
    left_out += unread
    html = _render(sections, left_out, speed, config, set(teachers), compared)
    notes = [f"{section.run.name}: {text}" for section in sections for text in missing(section)]
    if speed.why_not:
        notes.append(speed.why_not)
    return Report(
        html,
        tuple(_plain(section) for section in sections),
        tuple(left_out),
        tuple(notes),
        tuple(path.as_posix() for path, _ in compared),
    )


def write_report(report: Report, target: Path) -> None:
    """Write the page whole or not at all.

    Raises:
        KdError: it cannot be written.
    """
    try:
        with atomic_path(target) as temporary:
            temporary.write_text(report.html, encoding="utf-8")
    except OSError as error:
        raise KdError(
            f"cannot write {target}: {error.strerror or error}", "Choose another place with -o."
        ) from error


def reason_groups(left_out: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Runs that are left out for the same reason, together."""
    ordered = sorted(left_out, key=lambda pair: pair[1])
    return [(reason, [name for name, _ in group]) for reason, group in groupby(ordered, lambda pair: pair[1])]


def _render(
    sections: Sequence[Section],
    left_out: Sequence[tuple[str, str]],
    speed: Speed,
    config: ReportConfig,
    listed: set[str],
    compared: Sequence[tuple[Path, Comparison]],
) -> str:
    environment = Environment(
        loader=PackageLoader("kdcli.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": words.text_of,
        "number": words.number,
        "size": units.size,
        "signed": words.signed,
        "ms": words.ms,
        "count": units.count,
        "data_uri": words.picture,
    }
    script = _asset("report.js")
    drawn = [section for section in sections if _validated(section.run)]
    drawn_first = sorted(drawn, key=lambda section: -(section.run.recorded.val_accuracy or 0))[
        : inline.MOST_LINES
    ]
    lines = [section for section in sections if section in drawn_first]
    shown_rows = deployed(speed.rows)
    known = [row for row in shown_rows if row.accuracy is not None]
    detailed = sections[:MOST_DETAILED]
    teachers: dict[str, TeacherFigures] = {
        section.examined.teacher.sha256: section.examined.teacher
        for section in sections
        if section.examined.teacher
    }
    rows_by_path = {_resolved(row.path): row for row in shown_rows}
    front_rows = pareto_front(known)
    return environment.get_template("report.html.jinja").render(
        css=Markup(_asset("report.css")),  # noqa: S704 — kd's own files
        script=Markup(script),  # noqa: S704
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
        sections=sections,
        detailed=[details_of(section) for section in detailed],
        teachers=[
            (figures, rows_by_path.get(_resolved(figures.path)), sha256 in listed)
            for sha256, figures in teachers.items()
        ],
        labels=sorted({section.examined.label for section in sections if section.examined.label}),
        best=_best(sections),
        left_out=reason_groups(left_out),
        lines=lines,
        drawn_count=len(drawn),
        unvalidated=[section.run.name for section in sections if not _validated(section.run)],
        epochs_figure=inline.epochs([section.run for section in lines], "epochs") if lines else None,
        epoch_rows=_epoch_rows(lines),
        speed=speed,
        speed_rows=shown_rows,
        front=[row.path for row in front_rows],
        front_figure=inline.front(known, "front") if known else None,
        comparisons=[
            _comparison(f"comparison-{number}", path, found)
            for number, (path, found) in enumerate(compared, 1)
        ],
        command=command(
            [
                "kd",
                "report",
                *_named(sections, [path for path, _ in compared]),
                "-o",
                path_word(config.output),
            ]
        ),
        no_images=config.no_images,
    )


def _compared(folders: Sequence[Path]) -> tuple[list[tuple[Path, Comparison]], list[tuple[str, str]]]:
    """The comparisons that can be read, and (name, reason) of the others."""
    found: list[tuple[Path, Comparison]] = []
    left_out: list[tuple[str, str]] = []
    for path in folders[:MOST_COMPARISONS]:
        try:
            found.append((path, read_comparison(path / COMPARISON)))
        except KdError as error:
            left_out.append((path.name or path.as_posix(), error.message))
    left_out += [(path.name, "more comparisons than a page shows") for path in folders[MOST_COMPARISONS:]]
    return found, left_out


def _comparison(key: str, path: Path, found: Comparison) -> dict[str, Any]:
    """What the page says of a comparison, ready to print."""
    rows = found.standings[:MOST_METHODS]
    drawn = found.model_copy(update={"standings": rows})
    return {
        "key": key,
        "name": path.name or path.resolve().name,
        "found": found,
        "rows": [(row, cells(row)) for row in rows],
        "explained": statistics_note(found),
        "figure": inline.comparison(drawn, key) if any(row.count for row in rows) else None,
    }


def _named(sections: Sequence[Section], compared: Sequence[Path]) -> list[str]:
    """The folders that make this page: a comparison stands for its runs."""
    own = {_resolved(path) for path in compared}
    runs = [
        section.run.folder for section in sections if not own & set(_resolved(section.run.folder).parents)
    ]
    return [path_word(path) for path in (*compared, *runs)]


def _best(sections: Sequence[Section]) -> Section | None:
    """The student with the highest validation accuracy: test data selects nothing."""
    known = [
        section
        for section in sections
        if section.run.recorded.val_accuracy is not None and not section.examined.is_teacher
    ]
    return max(known, key=lambda section: section.run.recorded.val_accuracy or 0.0) if known else None


def _validated(run: Run) -> bool:
    return any(line.val_accuracy is not None for line in run.epochs)


def _epoch_rows(sections: Sequence[Section]) -> dict[str, Any]:
    """Validation accuracies as a table: epochs down, runs across."""
    by_run = [{line.epoch: line.val_accuracy for line in section.run.epochs} for section in sections]
    numbers = sorted(set().union(*by_run)) if by_run else []
    step = -(-len(numbers) // MOST_EPOCHS) or 1
    chosen = numbers[::step]
    return {"rows": [(number, [values.get(number) for values in by_run]) for number in chosen], "step": step}


def _teacher_file(runs: Sequence[Run], examined: Sequence[Examined], config: ReportConfig) -> Path | None:
    """The teacher that ratios refer to: --teacher, else the one most runs learned from, if its file is there."""
    if config.teacher is not None and config.teacher.is_file():
        return config.teacher
    used = [found.teacher.path for found in examined if found.teacher is not None]
    for run in runs if not used else ():
        path, sha256 = recorded_teacher(run)
        if path is not None and path.is_file() and sha256_file(path) == sha256:
            used.append(path)
    return max(used, key=used.count) if used else None


def _with_accuracy(rows: Sequence[Row], runs: Sequence[Run], examined: Sequence[Examined]) -> tuple[Row, ...]:
    """Accuracies that were measured for this page take the place of those recorded in files."""
    known: dict[Path, float] = {}
    for run, found in zip(runs, examined, strict=True):
        if found.evaluation is not None:
            known[_resolved(run.student)] = found.evaluation.accuracy
        if found.teacher is not None:
            known[_resolved(found.teacher.path)] = found.teacher.evaluation.accuracy
    return tuple(
        replace(row, accuracy=known[_resolved(row.path)], accuracy_source="measured")
        if _resolved(row.path) in known
        else row
        for row in rows
    )


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # of a file of unknown origin: a NUL, a loop of links
        return path


def _plain(section: Section) -> dict[str, Any]:
    run, row, found = section.run, section.row, section.examined
    return {
        "run": run.folder.as_posix(),
        "method": run.recorded.method,
        "student": run.recorded.student,
        "seed": run.recorded.seed,
        "parameters": run.recorded.parameters,
        "val_accuracy": run.recorded.val_accuracy,
        "measured": found.evaluation is not None,
        "test_images": section.evaluation.count,
        "test_accuracy": section.evaluation.accuracy,
        "accuracy_interval": list(section.evaluation.accuracy_interval),
        "calibration_error": section.evaluation.calibration_error,
        "agreement": section.evaluation.agreement,
        "teacher_accuracy": section.evaluation.teacher_accuracy,
        "disagreements": found.disagreements if found.teacher else None,
        "engine": row.engine if row else None,
        "latency_ms": row.latency_ms if row else None,
        "speedup": row.speedup if row else None,
        "network_bytes": row.network_bytes if row else None,
        "size_ratio": row.size_ratio if row else None,
    }


def _asset(name: str) -> str:
    return resources.files("kdcli.report").joinpath("assets", name).read_text(encoding="utf-8")
