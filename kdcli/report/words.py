"""How a page writes values that may come from anywhere."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt

_THUMBNAIL = 96  # pixels of a side, at most


def text_of(value: object, longest: int = 300) -> str:
    """One line of printable characters: no marks that turn the direction of text, no control characters."""
    raw = str(value)[: 2 * longest]
    clean = " ".join("".join(mark if mark.isprintable() else " " for mark in raw).split()) or "(no name)"
    return clean if len(clean) <= longest else clean[: longest - 1] + "…"


def number(value: float | None, digits: int = 2) -> str:
    return "—" if value is None else f"{value:,.{digits}f}"


def signed(value: float, digits: int) -> str:
    return f"{value:+,.{digits}f}".replace("-", "−")


def ms(value: float) -> str:
    """Three figures, zeros at the end included."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}"


def picture(pixels: npt.NDArray[np.uint8]) -> str:
    """A PNG as a data address; pixels (H, W, C) of one or three channels, made smaller if need be."""
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3])
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
