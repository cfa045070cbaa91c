"""Fixtures of all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two workers share the cores

from kdcli.base import code
from kdcli.base.errors import Interrupted
from tests.helpers import ROOT


def pytest_exception_interact(call: pytest.CallInfo[object]) -> None:
    """End the session if a signal stopped a training: a test that sends one catches it."""
    if call.excinfo is not None and isinstance(call.excinfo.value, Interrupted):
        pytest.exit("stopped by a signal", returncode=call.excinfo.value.exit_code)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real caffemodel and images; tests that need it are skipped elsewhere."""
    folder = Path(os.environ.get("KD_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "cifar10_nin.caffemodel").is_file():
        pytest.skip(f"real input is not at {folder}; set KD_SHARED_DATA")
    return folder.resolve()


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that one test allows does not run in the next."""
    monkeypatch.setenv(code.ALLOWED, "")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # user code adds the folder
    yield tmp_path
