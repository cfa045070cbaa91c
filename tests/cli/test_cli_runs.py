"""`kd runs` and `kd clean`."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from kdcli.base import files
from kdcli.cli.arguments import existing_model
from tests.cli.helpers import Kd
from tests.helpers import digits_student

ENTRY = "0123456789abcdef" * 2


@pytest.fixture
def project(workplace: Path) -> Path:
    """A finished and an interrupted run, a link to a run elsewhere, and a cache; sizes are powers of ten."""
    outside = workplace / "outside"
    for number, run in enumerate(("runs/done", "runs/cut", "outside")):
        Path(run).mkdir(parents=True)
        Path(run, "config.toml").write_text('method = "kd"\nstudent = "lenet"\ndata = "digits"\n')
        Path(run, "last.pt").write_bytes(bytes(1_000))
        for file in Path(run).iterdir():
            os.utime(file, (number, number))
    for run in ("runs/done", "outside"):
        Path(run, "result.json").write_text('{"test": {"accuracy": 91.5}}')
        os.utime(Path(run, "result.json"), (0, 0))
    Path("runs/done/last-000000005.pt").write_bytes(bytes(100))
    os.utime("runs/done/last-000000005.pt", (0, 0))
    Path("runs/done/student.pt").write_bytes(bytes(10_000))
    os.utime("runs/done/student.pt", (0, 0))
    Path("runs/link").symlink_to(outside)
    for kind in ("teacher", "data"):
        Path("cache", kind, ENTRY).mkdir(parents=True)
        Path("cache", kind, ENTRY, "view-0000.npy").write_bytes(bytes(100_000))
    Path("cache/data", ENTRY, "link").symlink_to(outside)
    Path("cache/data/notes.txt").touch()
    Path("cache/preprocess").symlink_to(outside)
    Path(outside, f"{ENTRY}.pt").touch()
    return workplace


def state_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_runs_are_listed_the_newest_last(kd: Kd, project: Path) -> None:
    outcome = kd("runs")
    assert outcome.code == 0
    head, done, cut, following = (line.split() for line in outcome.out.splitlines())
    assert head == ["run", "method", "student", "data", "test", "%", "state", "size"]
    size = 10_000 + 1_000 + 100 + Path("runs/done/config.toml").stat().st_size + 28
    assert done == ["done", "kd", "lenet", "digits", "91.50", "finished", f"{size / 1000:.1f}", "kB"]
    assert cut[:6] == ["cut", "kd", "lenet", "digits", "—", "interrupted"]
    assert " ".join(following) == "next: kd train --resume"
    with files.locked(Path("runs/cut/lock"), lambda: None):
        listed = json.loads(kd("runs", "--json").out)["runs"]
    assert [run["state"] for run in listed] == ["finished", "running"]
    assert (listed[0]["accuracy"], listed[1]["accuracy"], listed[0]["bytes"]) == (91.5, None, size)
    for damaged in ("", "[", "[]", '{"test": 3}'):
        Path("runs/done/result.json").write_text(damaged)
        assert json.loads(kd("runs", "--json").out)["runs"][-1]["accuracy"] is None
    assert kd("runs", "nothing").out == "no runs in nothing\n"


def test_a_run_that_is_not_finished_is_no_model(kd: Kd, project: Path) -> None:
    said = "error: runs/cut is not finished\nhint: Finish it: kd train --resume runs/cut\n"
    for name in ("cut", "runs/cut", "runs/cut/student.pt"):
        assert kd("test", name)[::2] == (1, said)


def test_clean_takes_runs_and_comparisons_only(kd: Kd, project: Path) -> None:
    Path("weights").mkdir()
    Path("weights/last.pt").touch()
    for name in ("weights", "runs", "cache", "."):
        refused = kd("clean", name, "--yes")
        assert (refused.code, f"not a run or comparison: {name}" in refused.err) == (2, True)
    assert Path("weights/last.pt").exists()


def test_a_finished_run_without_states_is_not_trained_again(kd: Kd, project: Path) -> None:
    assert kd("clean", "done", "--yes").code == 0
    refused = kd("train", "--resume", "done")
    assert refused.code == 2
    assert refused.err.splitlines()[-1] == "hint: Its student: kd test runs/done/student.pt"


def test_a_cleaned_link_continues_its_chain(kd: Kd, workplace: Path) -> None:
    digits_student(Path("t.pt"))
    words = (
        "--student",
        "convnet-tiny",
        "--generations",
        "2",
        "--epochs",
        "1",
        "--threads",
        "1",
        "--name",
        "x",
    )
    made = kd("train", "--teacher", "t.pt", "--data", "digits", *words)
    assert made.code == 0, made
    shutil.rmtree("runs/x")
    assert kd("clean", "x-generation-1", "--yes").code == 0
    assert kd("train", "--resume", "x-generation-1").code == 0
    assert Path("runs/x/result.json").is_file()


def test_name_of_a_run_may_be_that_of_a_folder(project: Path) -> None:
    Path("done").mkdir()
    assert existing_model(Path("done")) == Path("runs/done/student.pt")


def test_clean_deletes_caches_and_states_of_finished_runs_once_confirmed(
    kd: Kd, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(project)
    listed = json.loads(kd("clean", "--dry-run", "--json").out)
    assert (listed["folders"]["runs/done"], listed["folders"]["cache/teacher"]) == (1_100, 100_000)
    assert set(listed["folders"]) == {"runs/done", "cache/teacher", "cache/data"}
    refused = kd("clean")  # no terminal to ask on
    assert (refused.code, ": kd clean --yes" in refused.err) == (2, True)
    terminal = io.StringIO("n\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "[y/N]" in kd("clean").out
    ended = kd("clean")  # no more input
    assert (ended.code, "\nerror: not confirmed" in ended.err) == (2, True)
    with files.locked(Path("runs/cut/lock"), lambda: None):
        assert list(json.loads(kd("clean", "--dry-run", "--json").out)["folders"]) == ["runs/done"]
        assert kd("clean", "cut", "--yes").code == 2
    assert state_of(project) - {"runs/cut/lock"} == before
    assert kd("clean", "--yes").code == 0
    gone = {"runs/done/last.pt", "runs/done/last-000000005.pt"}
    gone |= {f"cache/{kind}/{ENTRY}/view-0000.npy" for kind in ("teacher", "data")}
    assert before - state_of(project) == gone
    assert json.loads(kd("clean", "cut", "--yes", "--json").out)["folders"] == {"runs/cut": 1_000}
    assert before - state_of(project) == gone | {"runs/cut/last.pt"}
    compared = Path("comparisons/c/runs/kd-seed0")
    compared.mkdir(parents=True)
    Path("comparisons/c/comparison.toml").touch()
    (compared / "config.toml").touch()
    (compared / "last.pt").write_bytes(bytes(10))
    assert json.loads(kd("clean", "c", "--yes", "--json").out)["folders"] == {compared.as_posix(): 10}
    assert not (compared / "last.pt").exists()
