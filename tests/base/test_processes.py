"""Several processes, one run: the same losses as one process, and the same run however it is started."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from joblib import cpu_count

from kdcli.base import runtime
from kdcli.base.errors import UsageError
from kdcli.base.runtime import World
from kdcli.models import checkpoint
from kdcli.teacher.cache import PART
from tests.helpers import ROOT, digest_without_clocks

# a run's command line, with the teacher's pass cut into parts small enough that both processes get some
DRIVER = f"""
import sys
from kdcli.teacher import cache
assert cache.PART == {PART}
cache.PART = 256
from kdcli.cli import main
sys.argv[0] = __file__
main()
"""
DIGITS = (
    "--data",
    "digits",
    "--threads",
    "1",
    "--precision",
    "32",
    "--log-every",
    "1",
    "--epochs",
    "2",
    "--batch-size",
    "256",
    "-q",
)


def launch(folder: Path, *words: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    (folder / "driver.py").write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *before, "driver.py", "train", *DIGITS, *words],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def train(folder: Path, *words: str, before: tuple[str, ...] = ()) -> None:
    process = launch(folder, *words, before=before)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "test accuracy" in out  # -q silences notes, not the result
    if not before:
        assert err == ""


def test_more_processes_than_cores_are_refused() -> None:
    cores = cpu_count()
    with pytest.raises(UsageError, match=f"--devices {cores + 1}: .* available cores: {cores}") as caught:
        runtime.launch("cpu", cores + 1)
    assert caught.value.hint == f"Use --devices {cores} at most."


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()]


def digest(folder: Path, name: str) -> str:
    stored = checkpoint.load(folder / f"runs/{name}/last.pt")
    return digest_without_clocks([stored.state_dict, stored.training])


def assert_same_losses(folder: Path, first: str, second: str) -> None:
    one, two = lines(folder, first), lines(folder, second)
    assert len(one) == len(two) == 14  # 6 steps an epoch, and the epochs' own lines
    for left, right in zip(one, two, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
        assert right["val_accuracy"] == pytest.approx(left["val_accuracy"], abs=1e-9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher in it, and runs of one process to compare with. The last batch of an epoch is smaller and odd."""
    place = tmp_path_factory.mktemp("processes")
    train(place, "--method", "ce", "--student", "convnet-small", "--name", "teacher")
    return place


NOISY = shlex.split(
    "--method noisy --teacher runs/teacher/student.pt --student convnet-tiny --augment flip-crop-cutout "
    "--optimizer sgd --ema 0.9"
)
DROPOUT = shlex.split(
    "--method ce --student nin --image-size 16 --augment flip-crop-mixup --optimizer sgd --lr 1e-4"
)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(folder: Path) -> None:
    """Batch norm, noise, a teacher's pass divided in two; the cache of one serves the other."""
    train(folder, *NOISY, "--name", "two", "--devices", "2")
    made = json.loads(next((folder / "cache/teacher").glob("*/manifest.json")).read_text())
    assert made["views"]
    cached = {path: path.read_bytes() for path in (folder / "cache/teacher").rglob("view-*.npy")}
    train(folder, *NOISY, "--name", "one")
    assert {path: path.read_bytes() for path in (folder / "cache/teacher").rglob("view-*.npy")} == cached
    assert json.loads((folder / "runs/one/result.json").read_text())["teacher_passes"] == 0
    assert_same_losses(folder, "one", "two")
    one, two = (checkpoint.load(folder / f"runs/{name}/student.pt").state_dict for name in ("one", "two"))
    for name, value in one.items():  # averages, --ema
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    environment = json.loads((folder / "runs/two/environment.json").read_text())
    assert environment["processes"] == 2


@pytest.mark.slow
def test_torchrun_gives_the_bits_of_two_processes(folder: Path) -> None:
    train(folder, *NOISY, "--name", "launched", "--devices", "2")
    train(
        folder,
        *NOISY,
        "--name",
        "torchrun",
        before=("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"),
    )
    assert digest(folder, "torchrun") == digest(folder, "launched")


@pytest.mark.slow
def test_dropout_and_mixup_do_not_depend_on_the_number_of_processes(folder: Path) -> None:
    train(folder, *DROPOUT, "--name", "dropout-two", "--devices", "2")
    train(folder, *DROPOUT, "--name", "dropout-one")
    assert_same_losses(folder, "dropout-one", "dropout-two")


# what compares images with each other, what learns along, what remembers; dist and mlkd compare logits
FEATURES = shlex.split(
    "--method sp+rkd+pkt+crd+vid+dist+mlkd+reviewkd+fitnet+at --teacher runs/teacher/student.pt "
    "--student convnet-tiny --optimizer sgd --lr 1e-4 --augment flip-crop --crd-negatives 20 --batch-size 250 "
    "--weight sp=1 --weight pkt=10 --weight dist=0.1 --weight mlkd=0.1 --weight fitnet=1 --weight at=1"
)


@pytest.mark.slow
def test_methods_that_compare_images_see_the_whole_batch_in_each_process(folder: Path) -> None:
    train(folder, *FEATURES, "--name", "features-two", "--devices", "2")
    train(folder, *FEATURES, "--name", "features-one")
    one, two = lines(folder, "features-one"), lines(folder, "features-two")
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        for name, value in left["terms"].items():
            # differences of what is nearly equal: sp and pkt have fewer digits than the float32 they are made of
            assert right["terms"][name] == pytest.approx(value, rel=1e-4, abs=1e-8 if name == "pkt" else 0), (
                name
            )
    stored = [
        checkpoint.load(folder / f"runs/features-{name}/last.pt").training["adapters"]  # type: ignore[index]
        for name in ("one", "two")
    ]
    for name in ("student_bank", "teacher_bank", "student.weight"):
        torch.testing.assert_close(stored[1]["crd"][name], stored[0]["crd"][name], rtol=1e-4, atol=1e-5)
    weights = [
        checkpoint.load(folder / f"runs/features-{name}/student.pt").state_dict for name in ("one", "two")
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_stop_together_and_resume_exactly(folder: Path) -> None:
    settings = (*NOISY, "--devices", "2", "--save-every", "4steps")
    train(folder, *settings, "--name", "whole")
    process = launch(folder, *settings, "--name", "cut")
    file = folder / "runs/cut/metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (file.exists() and file.read_text().count("\n") >= 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # to the first process alone: the others must hear of it
    _, err = process.communicate(timeout=120)
    if process.returncode != 0:  # on a fast machine it may have ended before
        assert process.returncode == 143
        assert err.count("error:") == 1
        assert "kd train --resume runs/cut" in err
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "driver.py", "train", "--resume", "runs/cut", "-q"],
            cwd=folder,
            env=environment,
            check=True,
            timeout=300,
        )
    assert digest(folder, "cut") == digest(folder, "whole")


def test_shares_of_a_batch_make_the_whole() -> None:
    import numpy as np

    samples = np.arange(11)
    worlds = [World(torch.device("cpu"), rank, 3) for rank in range(3)]
    shares = [world.share(samples) for world in worlds]
    assert np.concatenate([part for part, _ in shares]).tolist() == list(range(11))
    mean = sum(weight * part.mean() for part, weight in shares) / 3
    assert mean == pytest.approx(samples.mean())
    for world in worlds:  # too few for all: everybody does them
        part, weight = world.share(samples[:2])
        assert (part.tolist(), weight) == ([0, 1], 1.0)
