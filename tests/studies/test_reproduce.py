"""kd reproduce: the same bits, nearly the same figures, or something else; and never from other inputs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdcli import models
from kdcli.base.config import make
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Event, Note, Progress
from kdcli.cli import reproduce as command
from kdcli.cli import train
from kdcli.data import Splits, load
from kdcli.engine import RunDir, fit
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint
from kdcli.studies.reproduce import check_inputs, read_finished, reproduce
from tests.helpers import command_line, make_splits

COMMON: dict[str, Any] = {
    "data": "toy",
    "student": "convnet-tiny",
    "epochs": 2,
    "batch_size": 16,
    "lr": 1e-2,
    "precision": "32",
    "threads": 1,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Splits]:
    """A teacher and a student of it, that goes on from a file."""
    folder, splits = tmp_path_factory.mktemp("made"), make_splits()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit(make(TrainConfig, {**COMMON, "method": "ce", "student": "convnet-small", "name": "t"}), splits)
        fit(make(TrainConfig, {**COMMON, "method": "ce", "name": "first", "epochs": 1}), splits)
        shutil.copyfile("runs/first/student.pt", "first.pt")
        fit(make(TrainConfig, {**COMMON, "method": "ce", "name": "other", "epochs": 1, "seed": 9}), splits)
        values = {**COMMON, "method": "noisy", "teacher": "runs/t/student.pt", "student": "first.pt"}
        fit(make(TrainConfig, {**values, "augment": "flip", "seed": 3, "name": "s"}), splits)
    return folder, splits


@pytest.fixture
def splits(made: tuple[Path, Splits], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Splits:
    shutil.copytree(made[0], ".", dirs_exist_ok=True)
    monkeypatch.setitem(load.__globals__["DATASETS"], "toy", lambda request: made[1])
    return made[1]


def changed(accuracy: float, *, weights: bool = True) -> None:
    """The run as another machine would have recorded it."""
    run = Path("runs/s")
    result = json.loads((run / "result.json").read_text())
    result["test"]["accuracy"] += accuracy
    (run / "result.json").write_text(json.dumps(result))
    if weights:
        model = models.load(run / "student.pt")
        with torch.no_grad():
            next(model.network.parameters()).view(-1)[0] += 0.25
        model.save(run / "student.pt")


def test_reproduce_bit_identical(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    kd = command_line(monkeypatch, command, train)
    done = kd("reproduce", "runs/s", "--json")
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["verdict"] == "bit-identical"
    assert document["holds"] is True
    assert document["sha256"] == document["sha256_again"]
    assert document["sha256"] == checkpoint.digest(checkpoint.load(Path("runs/s/student.pt")).state_dict)
    assert (document["tensors_differ"], document["circumstances"]) == (0, [])
    assert document["again"] == "runs/s-reproduced-1"
    text = kd("reproduce", "runs/s").stdout
    assert "bit-identical: runs/s and runs/s-reproduced-2" in text


def test_reproduce_different_bits_judged_by_accuracy(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(-0.4)
    environment = json.loads(Path("runs/s/environment.json").read_text())
    environment["packages"]["torch"] = "1.0"
    environment["cpu"]["model"] = "another"
    Path("runs/s/environment.json").write_text(json.dumps(environment))
    kd = command_line(monkeypatch, command, train)
    done = kd("reproduce", "runs/s", "--json")
    document = json.loads(done.stdout)
    assert (done.exit_code, document["verdict"]) == (0, "within tolerance")
    assert document["tensors_differ"] == 1
    assert document["largest_difference"] == pytest.approx(0.25)
    assert [line.split(" was ")[0] for line in document["circumstances"]] == ["torch", "cpu"]
    with pytest.raises(KdError, match=r"was not reproduced.* more than 0\.3 points apart") as caught:
        kd("reproduce", "runs/s", "--tolerance", "0.3")
    assert caught.value.exit_code == 1


def test_reproduce_equal_weights_other_figures(splits: Splits) -> None:
    changed(2.0, weights=False)
    found = read_finished(Path("runs/s"))
    made = reproduce(found, check_inputs(found))
    assert (made.verdict, made.tensors_differ) == ("different", 0)
    assert made.accuracy - made.accuracy_again == pytest.approx(2.0)


def test_reproduce_refuses_changed_inputs(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    kd = command_line(monkeypatch, command, train)
    other = Path("runs/other/student.pt")
    for name, told in (
        ("runs/t/student.pt", "the teacher of runs/s changed"),
        ("first.pt", "the student of runs/s changed"),
    ):
        kept = Path(name).read_bytes()
        Path(name).unlink()
        with pytest.raises(KdError, match=name):
            kd("reproduce", "runs/s")
        shutil.copyfile(other, name)
        with pytest.raises(KdError, match=told) as caught:
            kd("reproduce", "runs/s")
        assert "Restore it" in caught.value.hint
        Path(name).write_bytes(kept)
    changed_data = make_splits(test=33)
    monkeypatch.setitem(load.__globals__["DATASETS"], "toy", lambda request: changed_data)
    with pytest.raises(KdError, match="the test images of runs/s changed"):
        kd("reproduce", "runs/s")
    assert not list(Path("runs").glob("*reproduced*"))


def test_read_finished_refuses_unfinished_and_damaged_runs(splits: Splits) -> None:
    for path, told in (("runs", "not a run folder"), ("nothing", "not a run folder")):
        with pytest.raises(KdError, match=told):
            read_finished(Path(path))
    for text in ("{", "[]", '{"test": {"accuracy": "x"}}', '{"test": {"accuracy": 5}}'):
        Path("runs/s/result.json").write_text(text)
        with pytest.raises(KdError, match=r"result\.json"):
            read_finished(Path("runs/s"))
    Path("runs/s/result.json").unlink()
    with pytest.raises(KdError, match="is not finished") as caught:
        read_finished(Path("runs/s"))
    assert caught.value.hint == "Finish it: kd train --resume runs/s"
    config = Path("runs/t/config.toml")
    config.write_text(config.read_text().replace("devices = 1", "devices = 2"))
    with pytest.raises(UsageError, match="several processes"):
        read_finished(Path("runs/t"))


def test_reproduce_continues_after_interruption(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.task == "epoch 2/2":
            os.kill(os.getpid(), signal.SIGINT)

    found = read_finished(Path("runs/s"))
    data = check_inputs(found)
    with pytest.raises(Interrupted) as caught:
        reproduce(found, data, on_event=stop)
    assert (caught.value.hint, caught.value.exit_code) == ("kd reproduce runs/s", 130)
    made = reproduce(found, data)
    assert (made.verdict, made.again) == ("bit-identical", "runs/s-reproduced-1")


def test_reproduce_concurrent_calls_use_separate_folders(
    splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_finished(Path("runs/s"))
    data = check_inputs(found)
    waits, made = threading.Event(), []
    second = threading.Thread(
        target=lambda: made.append(
            reproduce(found, data, on_event=lambda event: waits.set() if isinstance(event, Note) else None)
        )
    )
    begun: list[tuple[str, bool]] = []

    def trained(config: TrainConfig, *given: Any, resume: RunDir | None, **named: Any) -> Any:
        place = RunDir(config.runs_dir / config.name)
        begun.append((config.name, resume is not None))
        if len(begun) == 1:  # under way: its folder is there, its result is not
            RunDir.create(config, {}, (), None)
            second.start()
            assert waits.wait(20)
        shutil.copytree("runs/s", place.path, dirs_exist_ok=True)
        return SimpleNamespace(run=place)

    monkeypatch.setitem(reproduce.__globals__, "fit", trained)
    made.append(reproduce(found, data))
    second.join(20)
    assert begun == [("s-reproduced-1", False), ("s-reproduced-2", False)]
    assert sorted(one.again for one in made) == ["runs/s-reproduced-1", "runs/s-reproduced-2"]
