"""Cores, precision, signals, whole files."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from kdcli.base import files, runtime
from tests.helpers import ROOT, slow


def test_precision_is_measured_and_leaves_network_and_chance_alone() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    before = [parameter.clone() for parameter in network.parameters()]
    example = torch.randn(4, 3, 2, 2)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    chosen, timings = runtime.choose_precision("auto", network, example)
    assert chosen in ("32", "bf16")
    assert set(timings) == {"32", "bf16"}
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert runtime.choose_precision("bf16", network, torch.zeros(1, 3, 2, 2)) == ("bf16", {})


class _SlowInBf16(nn.Module):
    """A network whose steps take seconds in bf16, as on a machine without such instructions; counts its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)
        self.steps: list[str] = []

    def __deepcopy__(self, memo: dict[int, object]) -> _SlowInBf16:
        return self  # the trial's steps are counted here

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bf16 = torch.is_autocast_enabled("cpu")
        self.steps.append("bf16" if bf16 else "32")
        time.sleep(0.75 if bf16 else 0.02)
        return self.layer(x.flatten(1))


def test_a_slow_precision_is_measured_once() -> None:
    network = _SlowInBf16()
    chosen, _ = runtime.choose_precision("auto", network, torch.zeros(1, 3, 2, 2))
    assert chosen == "32"
    assert network.steps == ["32", "32", "bf16"]


def test_first_signal_sets_the_flag_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with runtime.stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert stop.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_signal_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, time\nfrom kdcli.base import runtime\n"
        "with runtime.stop_on_signals():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 130


AFTER_A_COMMAND = """
import os, signal, sys, time
from kdcli import cli

def test_command():
    sys.argv = ["kd", "info", "missing.pt"]
    try:
        cli.main()
    except SystemExit as left:
        assert left.code

def test_stopped():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
IN_A_TRAINING = """
import pathlib, signal
from kdcli.engine import fit
from tests.helpers import StopAfter, config, make_splits

def test_training(workplace):
    fit(config(method="ce"), make_splits())
    fit(config(method="ce"), make_splits(), on_event=StopAfter(1, signal.SIGTERM))

def test_next():
    pathlib.Path("next").touch()
"""


@pytest.mark.parametrize(
    ("tests", "plugin", "code"),
    [(AFTER_A_COMMAND, "no:cacheprovider", -signal.SIGTERM), slow(IN_A_TRAINING, "tests.conftest", 143)],
)
def test_a_signal_ends_pytest(tmp_path: Path, tests: str, plugin: str, code: int) -> None:
    """After a command of this process, and within a training of it."""
    (tmp_path / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", plugin, "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout
    assert not (tmp_path / "next").exists()


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "x.txt"
    with pytest.raises(ZeroDivisionError), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert list(target.parent.iterdir()) == []
    files.write_text(target, "one")
    with pytest.raises(KeyboardInterrupt), files.atomic_path(target) as temporary:
        temporary.write_text("two")
        raise KeyboardInterrupt
    assert target.read_text() == "one"


def test_git_blob_hash_is_gits(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello\n")
    # `printf 'hello\n' | git hash-object --stdin`
    assert files.git_blob_sha1_file(tmp_path / "x") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_scratch_of_a_killed_process_is_cleared_and_of_a_living_one_kept(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    with files.atomic_path(target) as temporary:
        mine = temporary.name
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    of_dead = mine.replace(f".{os.getpid()}.", f".{dead.pid}.")
    of_other_host = re.sub(r"\.kd-[^.]*\.", ".kd-elsewhere.", of_dead)
    for name in (mine, of_dead, of_other_host, ".a.json.5.tmp", ".a.json"):
        (tmp_path / name).write_text("x")
    old = tmp_path / of_other_host.replace(".tmp", "old.tmp")
    old.write_text("x")
    os.utime(old, (1, 1))
    folder = tmp_path / of_dead.removeprefix(".a.json").replace(".tmp", "")
    (folder / "below").mkdir(parents=True)
    files.write_text(target, "whole")
    assert {path.name for path in tmp_path.iterdir()} == {
        mine,
        of_other_host,
        ".a.json.5.tmp",
        ".a.json",
        "a.json",
        folder.name,
    }
    files.scratch_folder(tmp_path)
    assert not folder.exists()
    assert target.read_text() == "whole"
