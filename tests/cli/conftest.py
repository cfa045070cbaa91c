"""Fixtures of the command line's tests."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from kdcli import cli
from kdcli.base import code
from kdcli.cli import app as application
from kdcli.cli import output
from tests.cli.helpers import ENVIRONMENT, Kd, Outcome, printed_commands


@pytest.fixture
def kd(workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Kd:
    """Run the command line in this process, in an empty folder, with pipes for stdout and stderr."""
    for name in ("TERMINAL_WIDTH", "COLUMNS", "_TYPER_FORCE_DISABLE_TERMINAL"):
        monkeypatch.setenv(name, ENVIRONMENT[name])

    def run(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kd", *words])
        monkeypatch.setattr(output, "settings", output.OutputSettings())
        monkeypatch.setattr(application.app, "registered_commands", [])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        if left.value.code in (130, 143):
            pytest.exit("stopped by a signal", returncode=int(left.value.code))
        outcome = Outcome(int(left.value.code or 0), *capfd.readouterr())
        for command in printed_commands(outcome):
            check_options(command)
        return outcome

    return run


def check_options(command: str) -> None:
    """Check that a printed command has a name, options and values that kd takes."""
    command = command.removeprefix(code.assignment())
    program, *words = shlex.split(command.rpartition("&& ")[2].partition(" > ")[0])
    assert program == "kd", command
    application.app.registered_commands = []
    application._register(words)
    name, *rest = words
    found = typer.main.get_command(application.app).commands[name]  # type: ignore[attr-defined]
    rest = [
        application._with_value(*pair)
        for pair in zip(rest, [*rest[1:], ""], strict=False)
        if pair[0] not in ("--help", "--help-all")
    ]
    found.make_context(name, rest, resilient_parsing=not rest)


@pytest.fixture
def follow(kd: Kd, monkeypatch: pytest.MonkeyPatch) -> Callable[[Outcome], Outcome]:
    """Run the commands that a command printed, as printed, except for shorter trainings and measurements."""
    short = {
        "train": ["--epochs", "1", "--threads", "1"],
        "compare": ["--epochs", "1", "--threads", "1", "--seeds", "2"],
        "tune": ["--epochs", "1", "--threads", "1", "--trials", "2"],
        "bench": ["--rounds", "3", "--max-seconds", "1", "--no-memory", "--batch", "1"],
        "report": ["--no-bench", "--thumbnails", "0"],
        "download": ["--dry-run"],
    }

    def run(outcome: Outcome) -> Outcome:
        assert printed_commands(outcome), outcome
        for command in printed_commands(outcome):
            place, _, rest = command.rpartition("&& ")
            if place:
                monkeypatch.chdir(shlex.split(place)[1])
            rest, _, target = rest.partition(" > ")
            words = shlex.split(rest)[1:]
            outcome = kd(*words, *([] if "--resume" in words else short.get(words[0], [])))
            assert outcome.code == 0, (command, outcome)
            if target:
                Path(target).write_text(outcome.out)
        return outcome

    return run
