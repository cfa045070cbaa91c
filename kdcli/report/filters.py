"""Jinja2 filters: values of unknown origin as text of the page."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt

_MAX_SIDE = 96  # pixels of a thumbnail


def plain(value: object, length: int = 300) -> str:
    """One line of printable characters, without control characters and direction marks."""
    raw = str(value)[: 2 * length]
    clean = " ".join("".join(mark if mark.isprintable() else " " for mark in raw).split()) or "(no name)"
    return clean if len(clean) <= length else clean[: length - 1] + "…"


def number(value: float | None, digits: int = 2) -> str:
    """`1,234.50`; a dash for None."""
    return "—" if value is None else f"{value:,.{digits}f}"


def signed(value: float, digits: int) -> str:
    """`+0.67`, `−1.20`."""
    return f"{value:+,.{digits}f}".replace("-", "−")


def milliseconds(value: float) -> str:
    """Three significant figures, trailing zeros included."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}"


def data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """A PNG thumbnail of pixels (H, W, C), C of 1 or 3."""
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3])
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
