"""Every kind of `next:` line, and the commands inside hints, run where they were printed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from kdcli import models
from kdcli.base import files
from kdcli.base.errors import Interrupted, KdError
from kdcli.cli import download
from kdcli.data import load
from kdcli.data.catalog import RemoteFile
from kdcli.engine import fit
from kdcli.studies.compare import run as comparison
from tests.caffe_files import INPUT, net, small, write
from tests.cli.helpers import Kd, Outcome, printed_commands
from tests.data.test_datasets import write_mnist
from tests.helpers import StopAfter, config, digits_student
from tests.loopback import Loopback, honest, serving

Follow = Callable[[Outcome], Outcome]
TINY = ("--data", "digits", "--student", "convnet-tiny", "--epochs", "1", "--threads", "1")


@pytest.fixture
def loopback() -> Iterator[Loopback]:
    with serving() as server:
        yield server


def save_pictures(folder: Path) -> None:
    for split in ("train", "test"):
        for label, name in enumerate("abcde"):
            (folder / split / name).mkdir(parents=True)
            for number in range(6):
                colour = (50 * label, 9 * number, len(split))
                Image.new("RGB", (12, 12), colour).save(folder / split / name / f"{number}.png")


def words_of(outcome: Outcome) -> list[str]:
    """First words of the printed commands."""
    return [command.split()[1] for command in printed_commands(outcome)]


@pytest.mark.slow
def test_from_a_caffe_file_to_a_student(kd: Kd, follow: Follow, workplace: Path) -> None:
    pytest.importorskip("cv2")
    save_pictures(Path("my pictures"))
    write(workplace, net(small(), v1=False, inputs=INPUT), "my net.caffemodel")
    first = kd("convert-caffe", "my net.caffemodel", "-o", "weights/my net.pt")
    assert words_of(first) == ["info"]  # no data to measure it on
    follow(first)
    converted = kd("convert-caffe", "my net.caffemodel", "--data", "my pictures")
    validated = follow(converted)
    assert "largest difference from OpenCV" in validated.out
    trained = follow(validated)
    assert words_of(trained) == ["export"]
    onnx = kd("convert-caffe", "my net.caffemodel", "-o", "exports/my net.onnx")
    assert "my net.onnx" in follow(onnx).out
    options = ("--data", "my pictures", "--against", "my net.caffemodel")
    refused = kd("validate", "--teacher", "exports/my net.onnx", *options)
    assert (refused.code, words_of(refused)) == (2, ["convert-caffe"])
    teacher = models.load(Path("weights/teacher.pt"))
    with torch.no_grad():
        teacher.network.get_parameter("ip.weight").mul_(1.1)
    teacher.save(Path("weights/teacher.pt"))
    differs = kd("validate", *options)
    assert (differs.code, words_of(differs)) == (1, ["convert-caffe"])
    follow(differs)
    follow(refused)


@pytest.mark.slow
def test_after_a_download(
    kd: Kd, follow: Follow, workplace: Path, loopback: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(workplace / "server/mnist")
    write(workplace / "server", net(small(), v1=False, inputs=INPUT), "cifar10_nin.caffemodel")
    write(workplace / "server", b"name: 'net'", "cifar10_nin_train_val.prototxt")

    def entry(path: Path, name: str, folder: str) -> RemoteFile:
        url = loopback.serve(f"/{path.name}", honest(path.read_bytes()))
        return RemoteFile(name, folder, (url,), hashlib.sha256(path.read_bytes()).hexdigest())

    caffe, mnist = (sorted((workplace / "server").glob(pattern)) for pattern in ("*.*", "mnist/*"))
    monkeypatch.setitem(
        download.DOWNLOADS, "mnist", tuple(entry(path, f"mnist/{path.name}", "data") for path in mnist)
    )
    monkeypatch.setitem(download.DOWNLOADS, "nin", tuple(entry(path, path.name, "weights") for path in caffe))
    fetched = kd("download", "mnist", "--data-dir", "my data")
    assert "on MNIST" in follow(fetched).out
    assert words_of(kd("train", "--method", "ce", "--data", "cifar10")) == ["download"]
    converted = kd("download", "nin", "--weights-dir", "my weights")
    assert words_of(converted) == ["convert-caffe"] and "next: kd info" in follow(converted).out
    only = kd("download", "nin", "--from", "server/cifar10_nin_train_val.prototxt", "--weights-dir", "w")
    assert only.code == 0 and words_of(only) == []


@pytest.mark.slow
def test_after_a_comparison_and_a_search(kd: Kd, follow: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KdError("no memory")

    words = ("compare", "--methods", "ce,kd", "--kd-weight", "0", "--seeds", "1", *TINY)
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "fit", fail)
        failed = kd(*words)  # without a teacher
    assert failed.code == 1 and words_of(failed) == ["compare"]
    done = follow(failed)
    assert words_of(done) == ["report"]
    follow(done)
    assert Path("report.html").is_file()
    pytest.importorskip("optuna")
    searched = kd("tune", "--tune", "lr=1e-4:1e-1:log", "--method", "ce", "--trials", "1", *TINY)
    assert words_of(searched) == ["train"]
    assert words_of(follow(searched)) == ["train"]


@pytest.mark.slow
def test_hints_about_runs(kd: Kd, follow: Follow, workplace: Path) -> None:
    with pytest.raises(Interrupted) as stopped:
        fit(config(method="ce", data="digits", name="my run"), load("digits"), on_event=StopAfter(300, 2))
    Path("runs").rename("kept")
    again = ("train", "--method", "ce", *TINY, "--name", "my run")
    outcomes = [Outcome(130, "", f"hint: {stopped.value.hint}")]
    for words in (("runs",), ("reproduce", "my run"), ("test", "my run/last.pt"), again):
        shutil.copytree("kept", "runs", dirs_exist_ok=True)
        outcomes.append(kd(*words))
    for outcome in outcomes:
        shutil.rmtree("runs")
        shutil.copytree("kept", "runs")
        assert words_of(outcome) == ["train"], outcome
        follow(outcome)
        assert Path("runs/my run/student.pt").is_file()
    follow(kd(*again))  # the run is finished
    digits_student(Path("runs/second/student.pt"))
    follow(kd("report", "--bench", "kept/my run/config.toml"))
    assert json.loads(Path("bench.json").read_text())["rows"]
    Path("runs/my run/environment.json").write_text('{"processes": 2}')
    shutil.move("runs/my run", "other")
    follow(kd("reproduce", "other"))


def test_hints_about_what_is_there(kd: Kd, follow: Follow, workplace: Path) -> None:
    run = digits_student(Path("runs/my run/student.pt")).parent
    Path(run, "config.toml").write_text('method = "ce"\n')
    Path(run, "last.pt").touch()
    shutil.copytree(run, "runs/second")
    for words in (("train", "--resume", "absent"), ("test", "--data", "mnist", "my run"), ("report",)):
        follow(kd(*words))
    follow(kd("clean", "my run", "--cache-dir", "my cache"))
    assert not Path(run, "last.pt").exists() and Path("runs/second/last.pt").exists()
    with files.locked(run / "lock", lambda: None):
        follow(kd("clean", "my run"))
        follow(kd("train", "--resume"))


def test_teacher_that_is_not_finite(kd: Kd, follow: Follow, workplace: Path) -> None:
    path = digits_student(Path("weights/my teacher.pt"))
    teacher = models.load(path)
    with torch.no_grad():
        next(teacher.network.parameters()).fill_(float("nan"))
    teacher.save(path)
    outcome = kd("train", *TINY)
    assert words_of(outcome) == ["validate"]
    follow(outcome)
