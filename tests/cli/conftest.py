"""Fixtures of the command line's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kdcli import cli
from kdcli.cli import app as application
from kdcli.cli import output
from tests.cli.helpers import ENVIRONMENT, Kd, Outcome


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
        out, err = capfd.readouterr()
        return Outcome(int(left.value.code or 0), out, err)

    return run
