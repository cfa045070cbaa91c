"""Figures: whole, deterministic, and safe with any class name."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcli import report
from kdcli.base.errors import KdError
from kdcli.deploy.bench import Row

HOSTILE = ["$x_1$ costs", r"$\frac{$", "a" * 300, "鳥", "cat\x00\n\x1b[31m", "<b>&amp;", "", "x"]


def texts(svg: Path) -> list[str]:
    root = ElementTree.fromstring(svg.read_bytes())
    return ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]


def metrics_file(folder: Path) -> Path:
    def line(epoch: int, loss: float, terms: dict[str, float], val_accuracy: float | None) -> dict[str, Any]:
        rest = {"kind": "epoch", "step": epoch, "lr": 0.1, "images_per_s": 9.0, "seconds": 1.0}
        return {"epoch": epoch, "loss": loss, "terms": terms, "val_accuracy": val_accuracy, **rest}

    lines = [
        line(1, 2.0, {"ce": 1.5, "kd": 0.5}, None),
        line(2, 1.5, {}, 81.25),
        line(3, 1.0, {"ce": 0.7, "kd": 0.3}, 79.0),
    ]
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 4, "lo')
    return path


def rows() -> list[Row]:
    base = Row("nin", Path("nin.pt"), "torch", True, 9, 4_000_000, 0, 1, 1, latency_ms=8.0, accuracy=80.0)
    return [
        base,
        replace(base, name="slow and bad", is_teacher=False, latency_ms=9.0, accuracy=50.0),
        replace(base, name="fast", is_teacher=False, latency_ms=1.0, accuracy=75.0, network_bytes=100),
        replace(base, name="unknown", accuracy=None),
        replace(base, name="kernels", engine="compiled", is_teacher=False, latency_ms=5.0, accuracy=78.0),
    ]


@pytest.mark.parametrize("kind", ["svg", pytest.param("png", marks=pytest.mark.slow)])
def test_same_figures_same_bytes(kind: str, tmp_path: Path) -> None:
    source = metrics_file(tmp_path)
    for number in (1, 2):
        report.curves(source, tmp_path / f"curves{number}.{kind}")
        report.confusion(np.eye(len(HOSTILE)), HOSTILE, tmp_path / f"confusion{number}.{kind}")
        report.pareto(rows(), tmp_path / f"pareto{number}.{kind}")
    for name in ("curves", "confusion", "pareto"):
        first, second = (tmp_path / f"{name}{number}.{kind}" for number in (1, 2))
        assert first.read_bytes() == second.read_bytes()
        assert len(first.read_bytes()) > 2000


def test_curves_title_has_best_and_last_accuracy(tmp_path: Path) -> None:
    report.curves(metrics_file(tmp_path), tmp_path / "c.svg")
    shown = texts(tmp_path / "c.svg")
    assert "best 81.25 % at epoch 2, last 79.00 %" in shown
    assert {"total", "ce", "kd", "epoch", "training loss", "validation accuracy, %"} <= set(shown)


def test_confusion_shows_row_shares_and_any_name(tmp_path: Path) -> None:
    matrix = np.zeros((8, 8), int)
    matrix[0] = [3, 1, 0, 0, 0, 0, 0, 0]
    report.confusion(tuple(map(tuple, matrix)), HOSTILE, tmp_path / "c.svg")
    shown = texts(tmp_path / "c.svg")
    assert {"75", "25", "$x_1$ costs", "鳥", "<b>&amp;", "(no name)", r"$\frac{$"} <= set(shown)
    assert "a" * 21 + "…" in shown
    assert not any(len(text) > 30 for text in shown)


@pytest.mark.parametrize("count", [25, pytest.param(100, marks=pytest.mark.slow)])
def test_many_classes_are_all_named(count: int, tmp_path: Path) -> None:
    names = [f"class number {index}" for index in range(count)]
    report.confusion(np.eye(count), names, tmp_path / "c.svg")
    shown = texts(tmp_path / "c.svg")
    assert all(shown.count(name) == 2 for name in names)


def test_pareto_names_models_and_finds_the_front(tmp_path: Path) -> None:
    report.pareto(rows(), tmp_path / "p.svg")
    shown = texts(tmp_path / "p.svg")
    assert {"nin", "fast", "slow and bad", "kernels", "torch", "compiled"} <= set(shown)
    assert "unknown" not in shown
    assert [row.name for row in report.pareto_front(rows()[:3])] == ["fast", "nin"]


def test_pareto_draws_the_intervals_there_are(tmp_path: Path) -> None:
    first, *others = rows()[:3]
    report.pareto([first, *others], tmp_path / "p.svg")
    known = [
        replace(row, accuracy_interval=(40.0, 99.0), speedup=2.0, speedup_interval=(1.0, 4.0))
        for row in others
    ]
    report.pareto([first, *known], tmp_path / "q.svg")
    without, given = (path.read_text().count("LineCollection") for path in sorted(tmp_path.glob("*.svg")))
    assert given - without == 4
    assert "40" in texts(tmp_path / "q.svg") and "40" not in texts(tmp_path / "p.svg")


def test_figures_that_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(KdError, match="no model's accuracy"):
        report.pareto(rows()[3:4], tmp_path / "p.svg")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(KdError, match="no finished epoch"):
        report.curves(tmp_path / "empty.jsonl", tmp_path / "c.svg")
    with pytest.raises(KdError, match="cannot read"):
        report.curves(tmp_path / "none.jsonl", tmp_path / "c.svg")
    assert not list(tmp_path.glob("*.svg"))
