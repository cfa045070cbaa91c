"""The page's template with its filters: values of unknown origin as text of the page."""

import base64
import hashlib
from collections.abc import Callable
from importlib import resources
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kdcli import __version__
from kdcli.base import units
from kdcli.base.text import printable

_MAX_SIDE = 96  # pixels of a thumbnail


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
    """One line of printable characters, without control characters and direction marks."""
    raw = str(value)[: 2 * length]
    clean = " ".join(printable(raw).split()) or "(no name)"
    return clean if len(clean) <= length else clean[: length - 1] + "…"


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
    """The image that `write` writes. As an image it can run no scripts and load nothing.

    Args:
        kind: `png` or `svg+xml`.
    """
    buffer = BytesIO()
    write(buffer)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
