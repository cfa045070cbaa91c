"""Plotting primitives: colours, style, and a figure that is written whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.base.files import atomic_path
from kdcli.base.text import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, INK, GRID, FRONT = "#0072b2", "#d55e00", "#009e73", "#333333", "#d9d9d9", "#8c8c8c"
_LONGEST_NAME = 22
_STYLE = {
    "svg.hashsalt": "kd",  # element ids would be random
    "svg.fonttype": "none",  # text stays text: any script, searchable
    "text.parse_math": False,  # a class may be called $x_1
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.facecolor": "white",
}


Target = Path | BytesIO  # a .png or .svg file, or a buffer for an SVG


@contextmanager
def drawn_to(target: Target, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches that is written to `target` when the block ends."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = "svg" if isinstance(target, BytesIO) else target.suffix.lower().removeprefix(".")
    with warnings.catch_warnings(), mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        warnings.simplefilter("ignore")  # glyphs the font lacks; the viewer of an SVG has its own
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
        with nullcontext(target) if isinstance(target, BytesIO) else atomic_path(target) as place:
            figure.savefig(place, format=kind, dpi=150, metadata=metadata)


def shown(name: str) -> str:
    """A class name as one short line of printable characters."""
    return one_line(name, _LONGEST_NAME) or "(no name)"
