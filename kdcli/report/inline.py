"""Figures inside a page: SVG that takes its colours from the page's style sheet, light or dark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from kdcli.base.plotting import FRONT, GRID, INK, drawn_to, shown
from kdcli.deploy.bench import Row
from kdcli.report.examine import Bin
from kdcli.report.figures import comparison as draw_comparison
from kdcli.report.figures import pareto
from kdcli.report.gather import Run
from kdcli.studies.compare import Comparison

MOST_LINES = 14
_SURE = 10  # images that make a share worth joining to the next
_MOST_POINTS = 1_000
# as drawn → the style sheet's name; told apart by dash and mark, too
SERIES = ("#0072b2", "#d55e00", "#009e73", "#a8437f", "#8a6d00", "#5b5ea6", "#5a5a5a")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)))
_MARKS = "osD^vPX"
_VARIABLES = {
    **{colour: f"var(--c{number})" for number, colour in enumerate(SERIES, 1)},
    INK: "var(--ink)",
    GRID: "var(--grid)",
    FRONT: "var(--soft)",
    "#000000": "var(--ink)",
    "#ffffff": "var(--paper)",
}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


def epochs(runs: Sequence[Run], key: str) -> Markup:
    """Validation accuracy over epochs, a line a run; only runs that have one."""
    from matplotlib.ticker import MaxNLocator

    buffer = BytesIO()
    with drawn_to(buffer, 5.0, 3.3 + 0.17 * ((len(runs) + 2) // 3)) as figure:
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            points = [(line.epoch, line.val_accuracy) for line in run.epochs if line.val_accuracy is not None]
            points = points[:: -(-len(points) // _MOST_POINTS)]
            axes.plot(
                [epoch for epoch, _ in points],
                [value for _, value in points],
                color=SERIES[number % len(SERIES)],
                linestyle=_DASHES[number % len(_DASHES)],
                marker=_MARKS[number % len(_MARKS)],
                markevery=max(1, len(points) // 8),
                markersize=4.5,
                linewidth=1.6,
                label=shown(run.name).lstrip("_") or "_",
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=GRID, linewidth=0.6)
        handles, _ = axes.get_legend_handles_labels()
        figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return _inlined(buffer, key, "Validation accuracy over epochs", "The table below has the same figures.")


def front(rows: Sequence[Row], key: str) -> Markup:
    """Accuracy against latency, with the Pareto front."""
    buffer = BytesIO()
    pareto(rows, buffer, (5.0, 4.0))
    return _inlined(
        buffer,
        key,
        "Accuracy against latency",
        "Each disc is a model, its area the size of the network. A line joins the models that no other beats in "
        "both. The table below has the same figures.",
    )


def comparison(found: Comparison, key: str) -> Markup:
    """Each run of a comparison, and the differences to its baseline."""
    buffer = BytesIO()
    draw_comparison(found, buffer, 7.0)
    return _inlined(
        buffer,
        key,
        "Test accuracy of each method and its difference to the baseline",
        "A row for each method: a dot is a run, the diamond the mean, the line its 95 % interval over seeds. "
        "The table has the same figures.",
    )


def calibration(student: Sequence[Bin], teacher: Sequence[Bin], key: str, name: str) -> Markup:
    """Accuracy by confidence of a student and, if known, its teacher."""
    buffer = BytesIO()
    with drawn_to(buffer, 4.4, 3.7) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.9, linestyle=(0, (1, 2)), label="calibrated")
        for bins, colour, mark, dash, label in (
            (teacher, SERIES[1], "s", (0, (5, 2)), "teacher"),
            (student, SERIES[0], "o", "-", "student"),
        ):
            sure = [part for part in bins if part.count >= _SURE]
            axes.plot(
                [part.confidence for part in sure],
                [part.accuracy for part in sure],
                color=colour,
                marker=mark,
                markersize=4.5,
                linestyle=dash,
                linewidth=1.6,
                label=label if bins else None,
                clip_on=False,
            )
            few = [part for part in bins if part.count < _SURE]
            axes.plot(
                [part.confidence for part in few],
                [part.accuracy for part in few],
                color=colour,
                marker=mark,
                markersize=4.5,
                markerfacecolor="none",
                linestyle="none",
                clip_on=False,
            )
        axes.set_xlim(0, 101)
        axes.set_ylim(0, 101)
        axes.set_xlabel("confidence, %")
        axes.set_ylabel("accuracy, %")
        axes.grid(color=GRID, linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return _inlined(
        buffer,
        key,
        f"Reliability diagram of {shown(name)}",
        "Accuracy of the images by how sure the model is; on the diagonal it is as often right as it claims. "
        f"Hollow marks: fewer than {_SURE} images.",
    )


def heatmap(confusion: Sequence[Sequence[int]], classes: Sequence[str], key: str, name: str) -> Markup:
    """A confusion matrix of many classes; cells are shares of their row."""
    counts = np.asarray(confusion, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    count = len(classes)
    cells = np.zeros((count, count, 4))
    right = np.eye(count, dtype=bool)
    cells[right, :3] = 0x00, 0x72 / 255, 0xB2 / 255
    cells[~right, :3] = 0xD5 / 255, 0x5E / 255, 0x00
    cells[..., 3] = np.sqrt(
        shares
    )  # clear where there is nothing: right on any page; the root shows 2 % beside 90 %
    buffer = BytesIO()
    side = 3.6 + 0.05 * count
    with drawn_to(buffer, side, side) as figure:
        axes = figure.add_subplot()
        axes.imshow(cells, interpolation="nearest")
        names = [shown(text) for text in classes]
        size = max(3.0, min(8.0, 72 * 0.75 * side / count))
        axes.set_xticks(range(count), names, rotation=90, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
    return _inlined(
        buffer,
        key,
        f"Confusion matrix of {shown(name)}",
        "Rows are true classes, columns predicted ones. The list beside it names the most frequent confusions.",
    )


def _inlined(buffer: BytesIO, key: str, title: str, about: str) -> Markup:
    """What matplotlib wrote, as part of a page: ids of its own, no style sheet, colours by name, a title to read.

    ElementTree drops comments, in which matplotlib repeats every text, and escapes what it writes.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 — see above
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            element.set(name, _attribute(name, value, key))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    for place, (tag, text) in enumerate((("title", title), ("desc", about))):
        part = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{key}-{tag}"})
        part.text = text
        root.insert(place, part)
    root.set("role", "img")
    root.set("aria-labelledby", f"{key}-title")
    root.set("aria-describedby", f"{key}-desc")
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704 — see above


def _attribute(name: str, value: str, key: str) -> str:
    if name == "id":
        return f"{key}-{value}"
    if name == f"{{{_XLINK}}}href" and value.startswith("#"):
        return f"#{key}-{value[1:]}"
    value = re.sub(r"url\(#", f"url(#{key}-", value)
    if name == "style":
        return re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), value)
    return value
