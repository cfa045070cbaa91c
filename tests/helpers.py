"""Data sets, command lines and paths shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from kdcli import data, models
from kdcli.base.config import make
from kdcli.base.events import Event, Progress
from kdcli.cli import output
from kdcli.cli.app import add_command
from kdcli.data import ImageSet, Splits, preprocess
from kdcli.data.images import fingerprint_of
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint

ROOT = Path(__file__).resolve().parent.parent


def image_set(
    count: int, size: tuple[int, int, int] = (8, 8, 1), classes: int = 3, seed: int = 0
) -> ImageSet:
    """Random images whose class shows in their brightness, so that a network can learn it."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % classes
    noise = random.integers(0, 60, (count, *size))
    images = np.clip(noise + (labels * (180 // max(1, classes - 1)))[:, None, None, None], 0, 255).astype(
        np.uint8
    )
    names = tuple(f"class {index}" for index in range(classes))
    return ImageSet(images, labels, names, fingerprint_of(images, labels, names))


def make_splits(
    train: int = 90, test: int = 30, size: tuple[int, int, int] = (8, 8, 1), classes: int = 3
) -> Splits:
    """A small data set that trains in no time."""
    return Splits("toy", "toy", image_set(train, size, classes), image_set(test, size, classes, seed=1))


def command_line(monkeypatch: pytest.MonkeyPatch, *commands: ModuleType) -> Any:
    """The named modules of `kdcli.cli` as an app to call with words; errors come out as KdError."""
    for name in ("json", "quiet", "debug"):
        monkeypatch.setattr(output.settings, name, False)
    app = typer.Typer()
    for command in commands:
        add_command(app, command)

    def call(*words: str) -> Any:
        result = CliRunner().invoke(app, list(words))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


def config(**changes: Any) -> TrainConfig:
    plain = {
        "student": "convnet-tiny",
        "epochs": 3,
        "batch_size": 16,
        "lr": 1e-2,
        "precision": "32",
        "threads": 1,
    }
    return make(TrainConfig, {**plain, **changes})


def digest_without_clocks(value: Any) -> str:
    """`checkpoint.digest` of a state, whose measured seconds do not count."""
    clocks = ("seconds", "epoch_seconds", "logged_seconds")

    def kept(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: kept(item) for key, item in part.items() if key not in clocks}
        return [kept(item) for item in part] if isinstance(part, list | tuple) else part

    return checkpoint.digest(kept(value))


def digest(path: Path) -> str:
    """SHA-256 over all tensors and plain values of a checkpoint."""
    stored = checkpoint.load(path)
    return digest_without_clocks([stored.state_dict, stored.training])


class StopAfter:
    """An `on_event` that sends this process a signal once training has got somewhere."""

    def __init__(self, images: int, number: int) -> None:
        self.images, self.number = images, number

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress) and event.task.startswith("epoch") and event.done >= self.images:
            self.images = 10**9
            os.kill(os.getpid(), self.number)


def disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The calls of fsync and of renames from here on, in order, with the name of the file or folder (new name)."""
    calls: list[tuple[str, str]] = []

    def recorded(name: str, real: Any, path_of: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append((name, Path(path_of(*arguments)).name))
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(
        os, "fsync", recorded("sync", os.fsync, lambda fd: Path(f"/proc/self/fd/{fd}").readlink())
    )
    monkeypatch.setattr(os, "rename", recorded("rename", os.rename, lambda _, target: target))
    monkeypatch.setattr(os, "replace", recorded("rename", os.replace, lambda _, target: target))
    return calls


def image_folder(folder: Path) -> None:
    """240 train and 30 test images of 16×16 in three classes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 80), ("test", 10)):
        for label in range(3):
            place = folder / split / f"class-{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(60 * label, 60 * label + 120, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")


def slow(*values: Any) -> Any:
    """A parameter set for `pytest.mark.parametrize` that only the slow tests cover."""
    return pytest.param(*values, marks=pytest.mark.slow)


def digits_student(
    path: Path, arch: str = "convnet-tiny", classes: tuple[str, ...] = tuple("0123456789"), **provenance: Any
) -> Path:
    """An untrained network for the digits, with the provenance that kd train writes."""
    torch.manual_seed(1)
    model = models.Classifier(
        models.build(arch, classes=10, input_size=(8, 8, 1)),
        preprocess.fit("mean-std", data.load("digits").train.images),
        arch=arch,
        arch_args={},
        classes=classes,
        input_size=(8, 8, 1),
        provenance={"data": {"spec": "digits", "label": "digits", "image_size": None}, **provenance},
    ).eval()
    model.save(path)
    return path
