"""What the command line prints: progress, wrapped lines, errors as JSON, the word after Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import time

import pytest
from rich.console import Console
from rich.text import Text

from kdcli.base import runtime
from kdcli.base.events import Epoch, Progress
from kdcli.cli import output
from tests.cli.helpers import Kd

FIRST, REST = "No teacher was found, and this sentence is", "longer than the terminal is wide"
PROSE = f"{FIRST} {REST}"
COMMAND = "kd train --method kd --teacher weights/a_teacher_with_a_long_name.pt --data digits"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (PROSE, f"{FIRST}\n{REST}\n"),
        (COMMAND, f"{COMMAND}\n"),
        (f"hint: {COMMAND}", f"hint:\n{COMMAND}\n"),
        (f"next: KD_NETWORKS=a.b:c {COMMAND}", f"next:\nKD_NETWORKS=a.b:c {COMMAND}\n"),
        (f"{PROSE}: {COMMAND}", f"{FIRST}\n{REST}:\n{COMMAND}\n"),
        (f"wrote {50 * 'x'}", f"wrote\n{50 * 'x'}\n"),
        ("hint: kd train", "hint: kd train\n"),
    ],
)  # fmt: skip
def test_a_terminal_wraps_prose_at_words_and_commands_never(line: str, shown: str) -> None:
    terminal, file = io.StringIO(), io.StringIO()
    output._print(Console(file=terminal, force_terminal=True, color_system=None, width=44), Text(line))
    assert terminal.getvalue() == shown
    output._print(Console(file=file, width=44), Text(line))
    assert file.getvalue() == f"{line}\n"


def test_slow_rates_and_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    output.on_event(Progress("export", 0, 10, "models"))
    now += 5.0
    output.on_event(Progress("export", 2, 10, "models"))
    assert output.activity.line() == "export  20 %  2.5 s/model  ETA 0:20"
    output.on_event(Progress("export", 2, 10, "models", left_s=7.0))
    assert output.activity.line().endswith("ETA 0:07")
    output.on_event(Progress("classify", 5, 0))
    assert output.activity.line() == "classify  5 images"  # of an unknown number


@pytest.mark.parametrize(("epochs", "shown"), [(3, 3), (10, 10), (60, 10), (11, 6)])
def test_lines_of_epochs(epochs: int, shown: int, capsys: pytest.CaptureFixture[str]) -> None:
    for epoch in range(1, epochs + 1):
        output.on_event(Epoch(epoch, epochs, 0.25, 97.04))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == shown
    assert lines[-1] == f"epoch {epochs}/{epochs}  loss 0.2500  val 97.0 %"


@pytest.mark.parametrize(
    "words", [("info", "nothing.pt"), ("train", "--epochs", "0"), ("bench", "--no-such")]
)
def test_an_error_is_an_object_on_stdout_too(kd: Kd, words: tuple[str, ...]) -> None:
    plain, outcome = kd(*words), kd(*words, "--json")
    assert outcome.code == plain.code != 0
    document = json.loads(outcome.out)
    assert outcome.err.startswith(f"error: {document['error']}\nhint: {document['hint']}\n")
    assert document["hint"]
    assert plain.out == ""


def test_quiet_leaves_the_answer(kd: Kd) -> None:
    words = ("info", "lenet", "--scale", "2")
    loud, quiet = kd(*words), kd(*words, "-q")
    assert loud.out == quiet.out
    assert "--scale has no effect" in loud.err
    assert quiet.err == ""


def wait_for(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ""
    for _ in range(6_000):
        shown += capsys.readouterr().err
        if text in shown:
            return
        time.sleep(0.01)
    raise AssertionError(f"{text} is not in {shown}")


def test_a_signal_is_acknowledged_before_the_step_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with runtime.stop_on_signals() as stop, output.activity.running():
        os.kill(os.getpid(), signal.SIGINT)
        wait_for("stopping after this step", capsys)
    assert stop


def test_a_command_of_a_second_says_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "FIRST_LINE_S", 0.01)
    with output.activity.running():
        wait_for("loading libraries\n", capsys)
