"""Test images that are also training images: counted when the data is read, reported with each accuracy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcli.base.events import Event, Note
from kdcli.cli import compare, report, test, train
from kdcli.data import datasets, load, overlap_warning
from kdcli.data.datasets import Content, LabelledImages
from kdcli.engine import read_result
from tests.helpers import command_line, image_folder, image_set


@pytest.fixture
def leaky(workplace: Path) -> Path:
    """30 test images; two are training images, one of these under another class and in another format."""
    image_folder(workplace / "data")
    shutil.copy("data/train/class-0/7.png", "data/test/class-0/3.png")
    Image.open("data/train/class-2/0.png").save("data/test/class-1/3.bmp")
    Path("data/test/class-1/3.png").unlink()
    return workplace / "data"


def notes_of(path: Path) -> list[str]:
    seen: list[Event] = []
    load(str(path), on_event=seen.append)
    return [event.text for event in seen if isinstance(event, Note)]


def test_test_images_that_are_train_images_are_counted_by_their_pixels(leaky: Path) -> None:
    for _ in range(2):  # packed, and from the cache
        assert load(str(leaky)).overlap == 2
        assert notes_of(leaky) == ["2 of 30 test images are among the training images, pixel by pixel."]
    for copy in ("test/class-0/3.png", "test/class-1/3.bmp"):
        (leaky / copy).unlink()
    assert load(str(leaky)).overlap == 0 and notes_of(leaky) == []


def test_the_count_of_a_set_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    train_images, test_images = image_set(30).images, image_set(10, seed=1).images.copy()
    test_images[[2, 5, 7]] = train_images[[0, 0, 29]]
    parts = [
        LabelledImages(np.asarray(images), np.arange(len(images)) % 3)
        for images in (train_images, test_images)
    ]
    made = datasets.Dataset("toy", "toy", (8, 8, 1), (), None, (), lambda _: Content(*parts, ("a", "b", "c")))
    monkeypatch.setitem(datasets.DATASETS, "toy", made)
    assert load("toy").overlap == 3


@pytest.mark.parametrize(
    ("overlap", "count", "warned"), [(0, 10, False), (1, 100, False), (2, 100, True), (1, 99, True)]
)
def test_the_warning_begins_above_one_per_cent(overlap: int, count: int, warned: bool) -> None:
    assert (overlap_warning(overlap, count) is not None) is warned


WARNING = "2 of 30 test images are also training images: the accuracy overestimates that on new images"
TOY = ("--data", "data", "--student", "convnet-tiny", "--epochs", "1")
SMALL = (*TOY, "--threads", "1", "--precision", "32")


def test_the_accuracy_of_a_run_comes_with_the_warning(leaky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kd = command_line(monkeypatch, train, test)
    assert WARNING in kd("train", "--method", "ce", "--name", "run", *SMALL).stderr
    written = json.loads(Path("runs/run/result.json").read_text())
    assert (written["test_in_train"], written["warning"]) == (2, WARNING)
    assert read_result(Path("runs/run/result.json")).warning == WARNING
    assert WARNING in kd("test", "runs/run/student.pt").stderr


@pytest.mark.slow
def test_comparison_and_report_have_the_warning(leaky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kd = command_line(monkeypatch, compare, report)
    done = kd("compare", "--methods", "ce", "--seeds", "1", "--name", "c", *SMALL)
    assert WARNING in done.stderr
    assert WARNING in json.loads(Path("comparisons/c/comparison.json").read_text())["notes"]
    kd("report", "comparisons/c/runs/ce-seed0", "--no-bench", "--thumbnails", "0")
    assert WARNING in Path("report.html").read_text()
