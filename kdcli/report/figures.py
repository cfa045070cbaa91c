"""Figures of results as .png or .svg: the same bytes for the same results; any class name is drawn as text.

The background is white; the style sheet of the page shows it as a light card in both colour schemes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcli.base.errors import KdError
from kdcli.base.metrics import wilson_interval
from kdcli.base.plotting import BLUE, FRONT, GREEN, GRID, INK, ORANGE, Target, drawn_to, shown
from kdcli.deploy.bench import Row
from kdcli.engine.records import epoch_lines
from kdcli.studies.compare import Comparison
from kdcli.studies.compare.result import accuracies_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kdcli.report.examine import ConfidenceBin
    from kdcli.report.gather import Run

_COLOURS = (BLUE, ORANGE, GREEN, "#a8437f", "#8a6d00", "#5b5ea6", "#5a5a5a")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)))
_MARKS = "osD^vPX"


def curves(metrics_path: Path, target: Target) -> None:
    """Draw a run's loss and validation accuracy by epoch from its `metrics.jsonl`; a KdError if it has no epoch."""
    epochs = epoch_lines(metrics_path)
    if not epochs:
        raise KdError(f"{metrics_path} holds no finished epoch, so there is nothing to draw")
    validated = [line for line in epochs if line.val_accuracy is not None]
    with drawn_to(target, 7.2, 5.2) as figure:
        panels = list(figure.subplots(2 if validated else 1, 1, sharex=True, squeeze=False)[:, 0])
        numbers = [line.epoch for line in epochs]
        _line(panels[0], numbers, [line.loss for line in epochs], BLUE, "total")
        terms = sorted({name for line in epochs for name in line.terms})
        if len(terms) > 1:
            for name, colour in zip(terms, (ORANGE, GREEN, "#cc79a7", "#e69f00") * len(terms), strict=False):
                having = [line for line in epochs if name in line.terms]
                values = [line.terms[name] for line in having]
                _line(panels[0], [line.epoch for line in having], values, colour, shown(name))
            panels[0].legend(frameon=False, ncols=4, loc="upper right", fontsize=9)
        panels[0].set_ylabel("training loss")
        if validated:
            values = [line.val_accuracy or 0.0 for line in validated]
            _line(panels[1], [line.epoch for line in validated], values, GREEN, "validation")
            panels[1].set_ylabel("validation accuracy, %")
            best = validated[values.index(max(values))].epoch
            title = f"best {max(values):.2f} % at epoch {best}, last {values[-1]:.2f} %"
            panels[1].set_title(title, fontsize=9, loc="right")
        panels[-1].set_xlabel("epoch")
        panels[-1].xaxis.get_major_locator().set_params(integer=True)
        for panel in panels:
            panel.grid(color=GRID, linewidth=0.6)


def confusion(matrix: Any, classes: Sequence[str], target: Target) -> None:
    """Draw a confusion matrix of counts, row true, column predicted; cells are shares of their row."""
    from matplotlib.colors import PowerNorm

    counts = np.asarray(matrix, dtype=np.float64)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    count = len(classes)
    side = min(40.0, max(5.0, 0.55 * count if count <= 20 else 3 + 0.14 * count))
    names = [shown(name) for name in classes]
    with drawn_to(target, side + 1.6, side + 0.8) as figure:
        axes = figure.add_subplot()
        # The square root makes a confusion of 2 % visible beside a diagonal of 90 %
        drawn = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
        size = 10 if count <= 20 else max(3.5, min(8.0, 72 * 0.8 * side / count))
        axes.set_xticks(range(count), names, rotation=45 if count <= 20 else 90, fontsize=size)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right" if count <= 20 else "center")
            label.set_rotation_mode("anchor" if count <= 20 else "default")
        axes.set_yticks(range(count), names, fontsize=size)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        for spine in axes.spines.values():
            spine.set_visible(False)
        for row, column in np.argwhere(shares >= 0.5) if count <= 20 else ():
            share = shares[row, column]
            colour = "white" if share > 30 else INK
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
        bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.02)
        bar.set_label("% of the true class")
        bar.set_ticks([0, 1, 5, 10, 25, 50, 100])


def epochs(runs: Sequence[Run], target: Target) -> None:
    """Draw validation accuracy over epochs, one line for each run."""
    with drawn_to(target, 5.0, 3.3 + 0.17 * ((len(runs) + 2) // 3)) as figure:
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            axes.plot(
                *zip(*run.validation, strict=True),
                color=_COLOURS[number % len(_COLOURS)],
                linestyle=_DASHES[number % len(_DASHES)],
                marker=_MARKS[number % len(_MARKS)],
                markevery=max(1, len(run.validation) // 8),
                markersize=4.5,
                linewidth=1.6,
                label=shown(run.name).lstrip("_") or "_",  # matplotlib hides labels with a leading underscore
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation accuracy, %")
        axes.locator_params(axis="x", integer=True)
        axes.grid(color=GRID, linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)


def reliability(student: Sequence[ConfidenceBin], teacher: Sequence[ConfidenceBin], target: Target) -> None:
    """Draw accuracy over confidence of a student and its teacher, with 95 % Wilson intervals."""
    with drawn_to(target, 4.4, 3.7) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.9, linestyle=(0, (1, 2)), label="calibrated")
        for number, label, bins in ((1, "teacher", teacher), (0, "student", student)):
            if not bins:
                continue
            axes.plot(
                [one.confidence for one in bins],
                [one.accuracy for one in bins],
                color=_COLOURS[number],
                linestyle=_DASHES[number],
                marker=_MARKS[number],
                markersize=4.5,
                linewidth=1.6,
                clip_on=False,
                label=label,
            )
            for one in bins:
                interval = wilson_interval(one.accuracy, one.count)
                axes.plot([one.confidence] * 2, interval, color=_COLOURS[number], linewidth=0.8, alpha=0.6)
        axes.set(xlim=(0, 101), ylim=(0, 101), xlabel="confidence, %", ylabel="accuracy, %")
        axes.grid(color=GRID, linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)


def pareto(rows: Sequence[Row], target: Target, size: tuple[float, float] = (7.2, 5.0)) -> None:
    """Draw accuracy over single-image latency; a disc's area is the size of the network, the line the Pareto front.

    Rows without an accuracy are left out; a KdError if no row has one. `size` is in inches.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    known = [row for row in rows if row.accuracy is not None and math.isfinite(row.latency_ms)]
    if not known:
        raise KdError(
            "no model's accuracy is known, so there is nothing to draw", "Pass test images with --data."
        )
    largest = max(row.network_bytes for row in known) or 1
    with drawn_to(target, *size) as figure:
        axes = figure.add_subplot()
        axes.set_xscale("log")
        front = pareto_front(known)
        axes.plot(*_coordinates(front), color=FRONT, linewidth=1.5, zorder=1)
        for engine, colour in (("torch", ORANGE), ("compiled", GREEN), ("onnxruntime", BLUE)):
            own = [row for row in known if row.engine == engine]
            if not own:
                continue
            axes.scatter(
                *_coordinates(own),
                s=[30 + 1200 * row.network_bytes / largest for row in own],
                color=colour,
                alpha=0.55,
                edgecolors=[INK if row.is_teacher else "white" for row in own],
                linewidths=1.2,
                label=engine,
            )
            for row in own:
                _error_bars(axes, row)
        # Limits with room for discs and names
        times, shares = _coordinates(known)
        shares += [end for row in known for end in row.accuracy_interval or ()]
        room = max(2.0, 0.2 * (max(shares) - min(shares)))
        axes.set_xlim(min(times) / 1.8, max(times) * 2.6)
        axes.set_ylim(min(shares) - room, min(max(shares) + room, 100 + room / 2))
        axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("latency of one image, ms (log scale)")
        sources = {row.accuracy_source for row in known}
        axes.set_ylabel("test accuracy, %" + (" (as recorded)" if sources == {"recorded"} else ""))
        axes.grid(color=GRID, linewidth=0.6)
        title = "area: size; outlined: teacher"
        legend = axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, title=title)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_sizes([60])  # type: ignore[attr-defined]
        figure.draw_without_rendering()  # places the axes, which the labels need
        _name_points(axes, known, front, largest)


def _error_bars(axes: Axes, row: Row) -> None:
    """Draw the 95 % intervals of a row's accuracy, and of its latency if the teacher's is taken as exact."""
    if row.accuracy_interval is not None:
        axes.vlines(row.latency_ms, *row.accuracy_interval, color=FRONT, linewidth=0.9)
    if row.speedup_interval is not None and not row.is_teacher:
        slowest, fastest = (row.latency_ms * (row.speedup or 1) / ratio for ratio in row.speedup_interval)
        axes.hlines(row.accuracy or 0.0, fastest, slowest, color=FRONT, linewidth=0.9)


def comparison(found: Comparison, target: Target, width: float = 8.4) -> None:
    """Draw each seed's accuracy, means with intervals, and differences to the baseline; a KdError without a run."""
    rows = [row for row in found.standings if row.test_mean is not None]
    if not rows:
        raise KdError("no run of the comparison is finished, so there is nothing to draw")
    with drawn_to(target, width, 1.5 + 0.5 * len(rows)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for place, row in enumerate(rows):
            own = list(accuracies_of(found.runs, row.method).values())
            colour = INK if row.is_baseline else BLUE
            _spread(left, place, own, row.test_mean or 0.0, row.test_interval, colour)
            if row.difference is not None:
                points = [value for _, value in row.difference.by_seed]
                colour = {"better": GREEN, "worse": ORANGE}.get(row.verdict, BLUE)
                _spread(right, place, points, row.difference.mean, row.difference.interval, colour)
        right.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        left.set_yticks(range(len(rows)), [shown(row.method) for row in rows])
        left.set_ylim(len(rows) - 0.5, -0.5)
        left.set_xlabel("test accuracy, %")
        right.set_xlabel(f"points more than {shown(found.baseline)}, same seed")
        for panel in (left, right):
            if panel.collections:  # the baseline alone has no differences
                _fit_points(panel)
            panel.grid(color=GRID, linewidth=0.6, axis="x")
            panel.tick_params(axis="y", length=0)


def _fit_points(axes: Axes) -> None:
    """Limit the axis to its points and to twice their range on each side: wider intervals leave the figure."""
    points = np.concatenate([dots.get_offsets()[:, 0] for dots in axes.collections])  # type: ignore[index]
    room = max(2.0 * np.ptp(points), 1.0)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, points.min() - room), min(high, points.max() + room))


def _spread(
    axes: Axes,
    place: int,
    values: Sequence[float],
    mean: float,
    interval: tuple[float, float] | None,
    colour: str,
) -> None:
    """Draw points of one row, and above them the mean with its 95 % interval, if there is one."""
    axes.scatter(values, [place + 0.16] * len(values), s=16, color=colour, alpha=0.55, linewidths=0)
    if interval is not None:
        axes.plot(interval, [place - 0.12] * 2, color=colour, linewidth=1.8)
    axes.plot([mean], [place - 0.12], color=colour, marker="D", markersize=5, linestyle="none")


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """Rows with no other that is both faster and more accurate, fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.latency_ms, -(row.accuracy or 0))):
        if not front or (row.accuracy or 0) > (front[-1].accuracy or 0):
            front.append(row)
    return front


def _line(axes: Axes, numbers: list[int], values: list[float], colour: str, label: str) -> None:
    marker = "o" if len(numbers) < 25 else None
    axes.plot(numbers, values, color=colour, linewidth=1.5, label=label, marker=marker, markersize=3)


def _coordinates(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row.latency_ms for row in rows], [row.accuracy or 0 for row in rows]


def _name_points(axes: Axes, rows: Sequence[Row], front: Sequence[Row], largest: float) -> None:
    """Write each model's name beside its disc, at the place that overlaps fewest discs, names and the front."""
    from matplotlib.path import Path as Line
    from matplotlib.transforms import Bbox

    to_points = 72 / axes.figure.dpi
    places = axes.transData.transform(np.transpose(_coordinates(rows))) * to_points
    line = Line(axes.transData.transform(np.transpose(_coordinates(front))) * to_points)
    radii = [math.sqrt((30 + 1200 * row.network_bytes / largest) / math.pi) for row in rows]
    discs = list(zip(rows, places, radii, strict=True))
    occupied = [Bbox.from_bounds(x - r, y - r, 2 * r, 2 * r) for _, (x, y), r in discs]
    for row, (x, y), radius in discs:
        name = shown(row.name)
        width, height, gap = 5.2 * len(name), 11.0, radius + 3
        offsets = (
            (gap, -height / 2),
            (-width / 2, gap),
            (-width / 2, -gap - height),
            (-gap - width, -height / 2),
            (gap * 0.7, gap * 0.7),
            (gap * 0.7, -gap * 0.7 - height),
        )
        boxes = [Bbox.from_bounds(x + left, y + low, width, height) for left, low in offsets]
        overlaps = [box.count_overlaps(occupied) + line.intersects_bbox(box, filled=False) for box in boxes]
        best = overlaps.index(min(overlaps))
        occupied.append(boxes[best])
        point, (left, low) = (row.latency_ms, row.accuracy or 0), offsets[best]
        axes.annotate(name, point, xytext=(left, low + 2), textcoords="offset points", fontsize=8.5)
