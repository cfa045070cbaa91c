"""Figures of the page: SVG images in data URIs, each with a text alternative.

An image cannot run scripts or load anything, so that names from files need no escaping beyond matplotlib's. Its
background is white; the style sheet shows it as a light card in both colour schemes.
"""

import base64
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

from kdcli.base.plotting import GRID, INK, drawn_to, shown
from kdcli.report.examine import ConfidenceBin
from kdcli.report.gather import Run

MAX_LINES = 14
_MIN_COUNT = 10  # images of a confidence bin that is joined to the next
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a8437f", "#8a6d00", "#5b5ea6", "#5a5a5a")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)))
_MARKS = "osD^vPX"


def embed(draw: Callable[[BytesIO], None], alt: str) -> dict[str, str]:
    """The SVG that `draw` writes, as a data URI, with its text alternative."""
    buffer = BytesIO()
    draw(buffer)
    uri = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"uri": uri, "alt": alt}


def epochs(runs: Sequence[Run], target: BytesIO) -> None:
    """Draw validation accuracy over epochs, one line for each run."""
    from matplotlib.ticker import MaxNLocator

    with drawn_to(target, 5.0, 3.3 + 0.17 * ((len(runs) + 2) // 3)) as figure:
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            points = run.validation
            axes.plot(
                [epoch for epoch, _ in points],
                [accuracy for _, accuracy in points],
                color=_COLOURS[number % len(_COLOURS)],
                linestyle=_DASHES[number % len(_DASHES)],
                marker=_MARKS[number % len(_MARKS)],
                markevery=max(1, len(points) // 8),
                markersize=4.5,
                linewidth=1.6,
                label=shown(run.name).lstrip("_") or "_",  # matplotlib hides labels with a leading underscore
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=GRID, linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)


def reliability(student: Sequence[ConfidenceBin], teacher: Sequence[ConfidenceBin], target: BytesIO) -> None:
    """Draw accuracy over confidence of a student and, if known, its teacher; hollow marks for bins of few images."""
    with drawn_to(target, 4.4, 3.7) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.9, linestyle=(0, (1, 2)), label="calibrated")
        for bins, colour, mark, dash, label in (
            (teacher, _COLOURS[1], "s", _DASHES[1], "teacher"),
            (student, _COLOURS[0], "o", _DASHES[0], "student"),
        ):
            if not bins:
                continue
            for few, style in ((False, {"linestyle": dash, "label": label}), (True, {"linestyle": "none"})):
                part = [one for one in bins if (one.count < _MIN_COUNT) == few]
                axes.plot(
                    [one.confidence for one in part],
                    [one.accuracy for one in part],
                    color=colour,
                    marker=mark,
                    markersize=4.5,
                    markerfacecolor="none" if few else colour,
                    linewidth=1.6,
                    clip_on=False,
                    **style,
                )
        axes.set_xlim(0, 101)
        axes.set_ylim(0, 101)
        axes.set_xlabel("confidence, %")
        axes.set_ylabel("accuracy, %")
        axes.grid(color=GRID, linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
