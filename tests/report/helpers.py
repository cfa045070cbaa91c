"""Files, settings and a parser for tests of the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from kdcli.base.config import ReportConfig, make

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}}{% raw %}",
    "</style></svg><b>bold",
    "a\u202eevil\u2066 \x1b[31m\x00",
    "long " * 200,
    "\u200b",
    "🦆 & $x_1$",
)
EVIL_NAME = "<img src=x onerror=alert(2)>"


def bench_file(folder: Path, **changes: Any) -> Path:
    names = {"weights/teacher.pt": 8.0, "runs/kd-1/student.pt": 2.0, "runs/ce-1/student.pt": 3.0}
    rows = [
        {
            "name": path,
            "path": path,
            "engine": "onnxruntime",
            "is_teacher": path.startswith("weights"),
            "file_bytes": 10_000,
            "network_bytes": 8_000,
            "latency_ms": ms,
            "latency_n": 15,
            "speedup": 8 / ms,
            "size_ratio": 0.5,
            "accuracy": None,
        }
        for path, ms in names.items()
    ]
    path = folder / "bench.json"
    path.write_text(
        json.dumps({"rows": rows, "threads": 2, "environment": {"cpu": {"model": "<i>CPU"}}} | changes)
    )
    return path


def settings(**values: Any) -> ReportConfig:
    return make(ReportConfig, {"threads": 1, "no_bench": "bench" not in values, **values})


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())
