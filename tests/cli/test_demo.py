"""`kd demo`, shortened: the same chain with fewer epochs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdcli.base.errors import Interrupted
from kdcli.base.events import Progress
from kdcli.cli import demo, output
from tests.cli.helpers import Kd, is_clean

METHODS = ("ce", "logits", "noisy", "kd")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.TEACHER, "epochs", 2)
    monkeypatch.setitem(demo.TEACHER, "student", "convnet-small")
    monkeypatch.setitem(demo.STUDENT, "epochs", 2)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_demo_prints_table_and_writes_files(kd: Kd) -> None:
    outcome = kd("demo", "-o", "my demo")
    assert outcome.code == 0, outcome
    assert is_clean(outcome.out + outcome.err)
    lines = outcome.out.splitlines()
    [header] = [line for line in lines if line.startswith("method")]
    for column in ("test %", "agree %", "params", "size", "latency", "speed-up"):
        assert column in header
    assert max(map(len, lines[: lines.index(header) + 8])) <= 80
    named = [line.split()[0] for line in lines[lines.index(header) + 1 :] if line.strip()][:7]
    assert named[:5] == ["teacher", *METHODS]
    assert named[5].endswith(".onnx")
    assert named[6].endswith("-int8.onnx")
    folder = Path("my demo")
    for name in ["weights/teacher.pt", f"exports/{named[5]}", f"exports/{named[6]}"]:
        assert (folder / name).is_file()
    for method in METHODS:
        figures = json.loads((folder / f"runs/{method}/result.json").read_text())
        assert f"{figures['test']['accuracy']:.2f}" in outcome.out
    results = [json.loads((folder / f"runs/{name}/result.json").read_text()) for name in METHODS]
    best = max(results, key=lambda result: result["val_accuracy"])
    assert named[5] == f"{best['method']}.onnx"  # chosen on the validation split
    assert (
        sum(result["teacher_passes"] for result in results) == 2
    )  # one view of the training images, the test images
    assert not Path("runs").exists()
    again = kd("demo", "-o", "my demo", "--json")
    assert again.code == 0, again
    assert json.loads(again.out)["best"] == best["method"]


def test_demo_refuses_foreign_folder(kd: Kd) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    outcome = kd("demo", "-o", "mine")
    assert outcome.code == 2
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


def test_demo_interrupted(kd: Kd, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(config: object, on_event: object) -> None:
        raise Interrupted(
            "stopped at epoch 1", "kd train --resume runs/kd", exit_code=3
        )  # 143 would end the session

    monkeypatch.setattr(demo, "_run", stopped)
    outcome = kd("demo")
    assert outcome.code == 3
    assert outcome.err.splitlines() == [
        "error: kd demo was stopped",
        "hint: Rerun it: it starts from the beginning.",
    ]


def test_progress_lines_off_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    for run in range(2):
        tell = demo._titled(f"run {run}", output.on_event)
        for epoch in range(4):
            now += 1.0
            tell(Progress(f"epoch {epoch + 1}/6", epoch, 6, values={"val_accuracy": 50}, group="training"))
    line = output.activity.line()
    assert line.startswith("run 1: epoch 4/6  50 %  val 50.0 %")
    assert "ETA 0:03" in line  # counted over the run's epochs, not from each anew
