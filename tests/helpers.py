"""Data sets, command lines and paths shared by the tests."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from kdcli.cli import _ui
from kdcli.cli._bare import spell_out
from kdcli.data import ImageSet, Splits
from kdcli.data.images import fingerprint_of

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
        monkeypatch.setattr(_ui.settings, name, False)
    app = typer.Typer()
    for command in commands:
        command.register(app)

    def call(*words: str) -> Any:
        result = CliRunner().invoke(app, spell_out(words))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call
