"""A data set is added by one new file in the package `kdcli.data.sets`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kdcli.base.errors import KdError, UsageError
from kdcli.data import load, sets
from kdcli.data.datasets import DATASETS, dataset, discover
from kdcli.engine import fit
from tests.helpers import config

NEW_FILE = '''
"""Bars: grey images with a bright half, the upper or the lower one."""

import numpy as np

from kdcli.data.datasets import Content, LabelledImages, dataset


@dataset("bars", label="Bars", input_size=(28, 28, 1), files=("bars/images.npy", "bars/labels.npy"))
def read_bars(paths):
    images, labels = (np.load(paths[name]) for name in ("images.npy", "labels.npy"))
    return Content(
        LabelledImages(images[:32], labels[:32]), LabelledImages(images[32:], labels[32:]), ("lower", "upper")
    )
'''


@pytest.fixture
def new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The new file, as if it were in the package, and the data's own files in `tmp_path/data`."""
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "bars_for_test.py").write_text(NEW_FILE)
    monkeypatch.setattr(sets, "__path__", [*sets.__path__, str(tmp_path / "sets")])
    labels = np.arange(40, dtype=np.int64) % 2
    images = np.random.default_rng(0).integers(0, 60, (40, 28, 28, 1)).astype(np.uint8)
    images[labels == 0, 14:] += 150
    images[labels == 1, :14] += 150
    (tmp_path / "data" / "bars").mkdir(parents=True)
    np.save(tmp_path / "data/bars/images.npy", images)
    np.save(tmp_path / "data/bars/labels.npy", labels)
    discover()
    yield
    del DATASETS["bars"], sys.modules["kdcli.data.sets.bars_for_test"]


def test_a_new_file_registers_a_data_set_to_train_on(new_file: None, tmp_path: Path, workplace: Path) -> None:
    folders = {"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    splits = load("bars", **folders)
    assert (splits.spec, splits.label, splits.notes) == ("bars", "Bars", ())
    assert splits.train.images.shape == (32, 28, 28, 1) and len(splits.test) == 8
    assert splits.train.classes == ("lower", "upper")
    images = np.load(tmp_path / "data/bars/images.npy")
    assert np.array_equal(splits.train.images, images[:32]) and np.array_equal(
        splits.test.images, images[32:]
    )
    assert load("bars", image_size=14, **folders).train.input_size == (14, 14, 1)
    result = fit(config(method="ce", epochs=1, batch_size=16), splits)  # two steps
    assert np.isfinite(result.history[0].loss)


def test_errors_name_the_registered_data_set(new_file: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as unknown:
        load("bar")
    assert "Did you mean bars?" in unknown.value.hint
    (tmp_path / "data/bars/labels.npy").unlink()
    with pytest.raises(KdError, match=r"Bars not found in .*: no labels\.npy"):
        load("bars", data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")


def test_a_damaged_file_is_one_error_line(new_file: None, tmp_path: Path, workplace: Path) -> None:
    for content in (b"no array", b"PK\3\4" + bytes(60)):  # the second begins like a .npz
        (tmp_path / "data/bars/labels.npy").write_bytes(content)
        with pytest.raises(KdError, match="Bars cannot be read"):
            load("bars", data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")


def test_a_data_set_names_its_files() -> None:
    with pytest.raises(ValueError, match="@dataset new: name its files"):
        dataset("new", label="New", input_size=(28, 28, 1))
