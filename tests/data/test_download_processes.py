"""Several processes at one file, and processes that are stopped: by kill -9, Ctrl-C and SIGTERM."""

from __future__ import annotations

import hashlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdcli.base.files import locked
from tests.helpers import ROOT
from tests.loopback import CONTENT, Loopback, honest, serving

HALF = 500_000
KEPT = 1_000  # less than a file's buffer
PATIENCE_S = 20.0  # less than the silence after which a client asks again
SHA256 = hashlib.sha256(CONTENT).hexdigest()
Start = Callable[..., subprocess.Popen[str]]
FETCH = """
import sys
from pathlib import Path
from kdcli.data import download
from kdcli.data.catalog import RemoteFile
from kdcli.base.events import Note
file = RemoteFile("x.bin", "data", (sys.argv[1],), sys.argv[2], size_bytes=1_024_000)
tell = lambda event: print("note", event.text, flush=True) if isinstance(event, Note) else None
print("end", download.fetch(file, Path("x.bin"), on_event=tell), flush=True)
"""
KD = """
import signal, sys
from kdcli import cli
from kdcli.data import catalog
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
catalog.DOWNLOADS["mnist"] = (
    catalog.RemoteFile("mnist/x.bin", "data", (sys.argv.pop(1),), sys.argv.pop(1), size_bytes=1_024_000),
)
cli.main()
"""


@pytest.fixture
def server() -> Iterator[Loopback]:
    with serving() as loopback:
        yield loopback


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts Python on a script in `tmp_path`; what is left at the end is killed."""
    started: list[subprocess.Popen[str]] = []
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}

    def run(script: str, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *words],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def arrived(part: Path, size: int) -> None:
    """Wait until so many bytes are in a file."""
    end = time.monotonic() + PATIENCE_S
    while not part.exists() or part.stat().st_size < size:
        assert time.monotonic() < end, f"{part} does not get {size} bytes"
        time.sleep(0.01)


def test_three_processes_at_one_file(server: Loopback, tmp_path: Path, start: Start) -> None:
    """One asks the server; the other two say that they wait, and find the file."""
    url = server.serve("/x", honest(hold=HALF))
    lines: queue.Queue[str] = queue.Queue()

    def listen(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.strip())

    processes = [start(FETCH, url, SHA256) for _ in range(3)]
    listeners = [threading.Thread(target=listen, args=(process,)) for process in processes]
    for listener in listeners:
        listener.start()
    notes = [lines.get(timeout=PATIENCE_S) for _ in range(2)]  # the gate is shut: nobody can be done
    assert notes == ["note Another process is fetching x.bin; waiting for it."] * 2
    assert server.waiting.wait(PATIENCE_S)
    server.gate.set()
    ends = [lines.get(timeout=PATIENCE_S) for _ in range(3)]
    assert sorted(ends) == ["end downloaded", "end present", "end present"]
    for listener in listeners:
        listener.join(PATIENCE_S)
    assert [process.wait(PATIENCE_S) for process in processes] == [0] * 3
    assert len(server.requests) == 1
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.bin.lock", "x.bin"]


@pytest.mark.parametrize("another_waits", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kill_9_in_the_middle_then_again(
    server: Loopback, tmp_path: Path, start: Start, another_waits: bool
) -> None:
    """What had arrived is there, the dead one's lock is in nobody's way, and only the rest is asked for."""
    url = server.serve("/x", honest(hold=KEPT), honest())
    killed = start(FETCH, url, SHA256)
    assert server.waiting.wait(PATIENCE_S)
    arrived(tmp_path / ".x.bin.partial", KEPT)
    if another_waits:
        other = start(FETCH, url, SHA256)
        assert other.stdout is not None and "waiting for it" in other.stdout.readline()
    killed.kill()
    assert killed.wait(PATIENCE_S) == -signal.SIGKILL
    assert not (tmp_path / "x.bin").exists()
    if not another_waits:
        other = start(FETCH, url, SHA256)
    assert other.communicate(timeout=PATIENCE_S)[0] == "end downloaded\n" and other.returncode == 0
    [_, second] = server.ranges()
    assert second == f"bytes={KEPT}-"
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_stopped_command_resumes_when_rerun(
    server: Loopback, tmp_path: Path, start: Start, number: int, code: int
) -> None:
    url = server.serve("/x", honest(hold=HALF), honest())
    words = (KD, url, SHA256, "download", "mnist", "--data-dir", "my data")
    process = start(*words)
    assert server.waiting.wait(PATIENCE_S)
    arrived(tmp_path / "my data/mnist/.x.bin.partial", HALF)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code and out == ""
    assert err.splitlines()[-2:] == ["error: stopped", "hint: Rerun the same command to continue."]
    again = start(*words)
    out, _ = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0 and "downloaded, hash verified" in out
    assert server.ranges() == [None, "bytes=500000-"]


def test_a_lock_is_announced_and_free_when_its_holder_is_dead(tmp_path: Path, start: Start) -> None:
    holder = start(
        "import time\nfrom pathlib import Path\nfrom kdcli.base.files import locked\n"
        "with locked(Path('below/x.lock'), lambda: None) as waited:\n"
        "    print(waited, flush=True)\n    time.sleep(600)"
    )
    assert holder.stdout.readline() == "False\n"
    waits: list[str] = []

    def on_wait() -> None:
        waits.append("waits")
        holder.kill()

    with locked(tmp_path / "below/x.lock", on_wait) as waited:
        assert waited and waits == ["waits"]
    with locked(tmp_path / "below/x.lock", on_wait) as waited:
        assert not waited and waits == ["waits"]
