"""`kd report`: one self-contained HTML page.

Texts may come from untrusted files: Jinja2 escapes all of them, and the page's content security policy
allows kd's own script, by its hash, and no requests.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kdcli import __version__
from kdcli.base import units
from kdcli.base.config import ReportConfig, shell_command
from kdcli.base.events import OnEvent, ignore
from kdcli.base.text import one_line
from kdcli.deploy.bench import deployed
from kdcli.deploy.load import kind_of
from kdcli.engine.records import Evaluation, read_record
from kdcli.methods import is_custom
from kdcli.report import figures
from kdcli.report.examine import Examined, choose, examine, recorded_teacher
from kdcli.report.gather import COMPARISON, gather, read_each
from kdcli.report.speed import Speed, from_file, measure, with_accuracies
from kdcli.studies.compare import Comparison
from kdcli.studies.compare.result import cells, statistics_note

MAX_SECTIONS = 20  # runs with a section of their own
MAX_LINES = 14  # runs in the figure of epochs
MAX_EPOCHS = 200  # rows of the table of epochs
MAX_CLASSES = 40  # rows of the table of classes
MAX_MATRIX = 100  # classes of a confusion matrix
MAX_PAIRS = 15  # rows of the table of confusions
_MAX_SIDE = 96  # pixels of a thumbnail


@dataclass(frozen=True)
class Report:
    """A page and a summary of it."""

    html: str  # the page
    runs: list[dict[str, Any]]  # figures of each run, plain values
    left_out: list[tuple[str, str]]  # (name, reason) of runs and comparisons that are not on it
    notes: list[str]  # missing parts and reasons, one line each
    comparisons: list[str]  # folders of those that have a section


def make_report(
    folders: Sequence[Path],
    config: ReportConfig,
    *,
    command: str = "kd report",
    others: Sequence[Path] = (),
    comparisons: Sequence[Path] = (),
    speed: Speed | None = None,
    on_event: OnEvent = ignore,
) -> Report:
    """Read runs, measure models, and make the page; a KdError if no run is finished.

    Args:
        command: command line that makes the page, printed on it.
        others: further models to time beside the students, as exported files.
        comparisons: folders of kd compare, for a section each.
        speed: a benchmark that has been made already.
    """
    # 1. Records of the runs and comparisons; their models on test images
    runs, left_out = gather(folders)
    compared, unread = read_each(comparisons, lambda path: (path, read_record(Comparison, path / COMPARISON)))
    left_out += unread
    if speed is None and config.bench is not None:
        speed = from_file(config.bench)
    examined = examine(runs, config, on_event)
    # 2. Latencies, one row for each model
    if speed is None:
        speed = measure(examined, others, config, on_event)
    timed = with_accuracies(deployed(speed.rows), examined)
    known = [row for row in timed if row.accuracy is not None]
    rows = {row.path.resolve(): row for row in timed}
    # 3. Sections; a teacher's own run and the copy that others learned from share a row
    teachers = {found.teacher.sha256: found.teacher for found in examined if found.teacher is not None}
    sections = []
    for number, found in enumerate(sorted(examined, key=lambda found: found.is_teacher), 1):
        copy = teachers[found.sha256].path if found.sha256 in teachers else found.run.student
        row = rows.get(copy.resolve()) or rows.get(found.run.student.resolve())
        sections.append(replace(found, key=f"run-{number}", row=row))
    html = render(
        sections=sections,
        detailed=[_details(section) for section in sections[:MAX_SECTIONS]],
        teachers=[(found, rows.get(found.path.resolve())) for found in teachers.values()],
        **choose(sections),
        left_out=reason_groups(left_out),
        comparisons=[_comparison(f"comparison-{n}", *pair) for n, pair in enumerate(compared, 1)],
        command=command,
        speed=speed,
        speed_rows=timed,
        front=[row.path for row in figures.pareto_front(known)],
        front_figure=data_uri("svg+xml", partial(figures.pareto, known, size=(5.0, 4.0))) if known else None,
        **_epochs(sections),
    )
    notes = [f"{section.run.name}: {text}" for section in sections for text in _missing(section)]
    notes += [speed.unavailable] if speed.unavailable else []
    named = [path.as_posix() for path, _ in compared]
    return Report(html, [_run_summary(section) for section in sections], left_out, notes, named)


def reason_groups(left_out: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """(name, reason) pairs as (reason, names)."""
    ordered = sorted(left_out, key=lambda pair: pair[1])
    return [(why, [name for name, _ in group]) for why, group in groupby(ordered, lambda pair: pair[1])]


def _epochs(sections: Sequence[Examined]) -> dict[str, Any]:
    """Template values of validation accuracy over epochs: figure, and table with epochs down and runs across."""
    validated = [section for section in sections if section.run.validation]
    best = sorted(validated, key=lambda section: -section.run.validation[-1][1])[:MAX_LINES]
    lines = [section for section in validated if section in best]
    draw = partial(figures.epochs, [section.run for section in lines])
    columns = [dict(section.run.validation) for section in lines]
    numbers = sorted({epoch for column in columns for epoch in column})
    step = -(-len(numbers) // MAX_EPOCHS) or 1
    return {
        "lines": lines,
        "validated_count": len(validated),
        "unvalidated": [section.run.name for section in sections if not section.run.validation],
        "epochs_figure": data_uri("svg+xml", draw) if lines else None,
        "epoch_rows": [(number, [column.get(number) for column in columns]) for number in numbers[::step]],
        "epoch_step": step,
    }


def _comparison(key: str, path: Path, found: Comparison) -> dict[str, Any]:
    """Template values of a comparison's section."""
    drawable = any(row.count for row in found.standings)
    return {
        "key": key,
        "name": path.name or path.resolve().name,
        "found": found,
        "rows": [(row, cells(row)) for row in found.standings],
        "statistics": statistics_note(found),
        "figure": data_uri("svg+xml", partial(figures.comparison, found, width=7.0)) if drawable else None,
    }


def _details(found: Examined) -> dict[str, Any]:
    """Template values of a run's section."""
    run, evaluation, teacher = found.run, found.evaluation, found.teacher
    count = len(run.classes)
    classes = _class_rows(run.classes, evaluation, teacher.evaluation if teacher else None)
    reliability = partial(figures.reliability, found.bins, teacher.bins if teacher else ())
    confusion = partial(figures.confusion, evaluation.matrix(), run.classes)
    most_frequent, pair_count = pairs(evaluation.confusion)
    return {
        "section": found,
        "classes": classes,
        "class_count": count,
        "max_difference": max((abs(row["difference"] or 0) for row in classes), default=0) or 1,
        "matrix": data_uri("svg+xml", confusion) if count <= MAX_MATRIX else None,
        "pairs": most_frequent,
        "pair_count": pair_count,
        "reliability": data_uri("svg+xml", reliability) if found.bins else None,
        "commands": _commands(found),
        "missing": _missing(found),
    }


def _class_rows(
    classes: Sequence[str], student: Evaluation, teacher: Evaluation | None
) -> list[dict[str, Any]]:
    """A row for each class; of many, those with the largest difference, or without a teacher the lowest accuracy."""
    counts = _class_counts(student.confusion)
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(classes):
        own, other = student.per_class[index], teacher.per_class[index] if teacher else None
        difference = own - other if own is not None and other is not None else None
        row = {"name": name, "count": counts[index]}
        rows.append({**row, "student": own, "teacher": other, "difference": difference})
    if len(rows) > MAX_CLASSES and teacher:
        rows.sort(key=lambda row: -abs(row["difference"] or 0))
    elif len(rows) > MAX_CLASSES:
        rows.sort(key=lambda row: 101 if row["student"] is None else row["student"])
    return rows[:MAX_CLASSES]


def _commands(found: Examined) -> list[str]:
    teacher, student = recorded_teacher(found.run)[0], found.run.student
    if teacher is not None and kind_of(teacher) == "outputs":  # no model
        teacher = None
    method = found.run.result.method  # to be typed again if it is code
    again = {"config": found.run.folder / "config.toml", "method": method if is_custom(method) else None}
    return [
        shell_command("train", again),
        shell_command("test", {}, student),
        shell_command("export", {}, student),
        shell_command("bench", {}, teacher, student),
    ]


def _missing(found: Examined) -> list[str]:
    """Missing parts of a run's section, with reasons, one line each."""
    lines = [*found.run.problems, *filter(None, (found.run.result.warning,))]
    if found.unmeasured:
        lines.append(
            f"Not measured on test images now: {found.unmeasured}. "
            "The figures are those recorded when the run ended."
        )
    elif found.no_teacher:
        lines.append(f"No comparison with a teacher. {found.no_teacher}")
    return lines + list(found.notes)


def pairs(
    cells: Sequence[tuple[int, int, int]], limit: int = MAX_PAIRS
) -> tuple[list[tuple[int, int, int, float]], int]:
    """The most frequent confusions (true, predicted, count, per cent of the true class), and the number of all."""
    counts = _class_counts(cells)
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: (-cell[2], *cell))
    return [(*cell, 100 * cell[2] / counts[cell[0]]) for cell in wrong[:limit]], len(wrong)


def _class_counts(cells: Sequence[tuple[int, int, int]]) -> Counter[int]:
    """Number of images of each class."""
    counts: Counter[int] = Counter()
    for true, _, count in cells:
        counts[true] += count
    return counts


def _run_summary(section: Examined) -> dict[str, Any]:
    """A run's figures for `--json`."""
    result, row, evaluation = section.run.result, section.row, section.evaluation
    settings = ("method", "student", "seed", "parameters", "val_accuracy")
    measured = ("accuracy_interval", "calibration_error", "agreement", "teacher_accuracy")
    timed = ("engine", "latency_ms", "speedup", "network_bytes", "size_ratio")
    return {
        "run": section.run.folder.as_posix(),
        **{name: getattr(result, name) for name in settings},
        "measured": not section.unmeasured,
        "test_images": evaluation.count,
        "test_accuracy": evaluation.accuracy,
        "test_in_train": result.test_in_train,
        **{name: getattr(evaluation, name) for name in measured},
        "disagreements": section.disagreements if section.teacher else None,
        **{name: getattr(row, name) if row else None for name in timed},
    }


def render(**values: Any) -> str:
    """The page as HTML. All values are escaped; only kd's own style sheet and script are inserted as markup."""
    environment = Environment(
        loader=PackageLoader("kdcli.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": _plain,
        "number": _number,
        "ms": _milliseconds,
        "thumbnail": _thumbnail,
        "size": units.size,
        "count": units.count,
    }
    assets = resources.files("kdcli.report").joinpath("assets")
    css, script = (assets.joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return environment.get_template("report.html.jinja").render(
        css=Markup(css),  # noqa: S704 — kd's own files
        script=Markup(script),  # noqa: S704
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
        **values,
    )


def _plain(value: object, length: int = 300) -> str:
    return one_line(str(value), length) or "(no name)"


def _number(value: float | None, digits: int = 2) -> str:
    """`1,234.50`; a dash for None."""
    return "—" if value is None else f"{value:,.{digits}f}"


def _milliseconds(value: float) -> str:
    """Three significant figures, trailing zeros included."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}"


def _thumbnail(pixels: npt.NDArray[np.uint8]) -> str:
    """A data URI of pixels (H, W, C), C of 1 or 3."""
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    return data_uri("png", lambda target: image.save(target, "PNG", optimize=True))


def data_uri(kind: str, write: Callable[[BytesIO], None]) -> str:
    """Data URI of the `png` or `svg+xml` that `write` writes; browsers run no scripts of an image."""
    buffer = BytesIO()
    write(buffer)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
