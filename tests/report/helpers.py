"""Files, settings and a parser for tests of the page."""

from __future__ import annotations

import json
import shutil
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
            "preprocessing_bytes": 0,
            "parameters": 2_000,
            "macs": None,
            "latency_ms": ms,
            "latency_n": 15,
            "speedup": 8 / ms,
            "size_ratio": 0.5,
            "accuracy": None,
        }
        for path, ms in names.items()
    ]
    path = folder / "bench.json"
    about = {"teacher": "t", "batches": [1], "rounds": 3, "sessions": 1, "threads": 2, "test_images": 0}
    about |= {"data_label": None, "environment": {"cpu": {"model": "<i>CPU"}}}
    path.write_text(json.dumps({"rows": rows, **about} | changes))
    return path


def settings(**values: Any) -> ReportConfig:
    return make(ReportConfig, {"threads": 1, "no_bench": "bench" not in values, **values})


def comparison_folder(folder: Path) -> Path:
    """A comparison of ce and kd over two seeds; its runs are copies of those of the project."""
    accuracies = {"ce": (50.0, 51.0), "kd": (51.0, 52.5)}
    runs = []
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            name = f"{method}-seed{seed}"
            shutil.copytree(f"runs/{method}-1", folder / "runs" / name)
            run = {"run": f"runs/{name}", "method": method, "seed": seed, "status": "finished"}
            runs.append({**run, "test_accuracy": accuracy})
    baseline = {
        "method": "ce", "is_baseline": True, "count": 2, "failed": 0, "test_mean": 50.5, "test_deviation": 0.71,
        "test_interval": [44.1, 56.9], "val_mean": 50.0, "difference": None, "verdict": "baseline",
    }  # fmt: skip
    difference = {
        "count": 2, "mean": 1.25, "by_seed": [[0, 1.0], [1, 1.5]], "deviation": 0.35, "interval": [0.5, 2.0],
        "p": 0.01, "p_holm": 0.03,
    }  # fmt: skip
    other = baseline | {
        "method": HOSTILE[0], "is_baseline": False, "test_mean": 51.75, "difference": difference,
        "verdict": "better",
    }  # fmt: skip
    document = {
        "schema_version": 1, "kd_version": "1", "folder": "c", "data": HOSTILE[3], "student": HOSTILE[1],
        "epochs": 1, "methods": ["ce", "kd"], "seeds": [0, 1], "baseline": "ce", "level": 0.95,
        "test_images": 80, "comparisons": 1, "teacher_passes": 0, "standings": [baseline, other], "runs": runs,
        "notes": [HOSTILE[1], "\u202e" + HOSTILE[3]],
    }  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps(document))
    return folder


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
