"""Class folders without a split: some images of each class become test images, by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kdcli import data
from kdcli.base.config import ExportConfig, make
from kdcli.base.errors import KdError
from kdcli.data.images import ImageSet, Splits
from tests.data.helpers import WRITERS, Files, png, small_tree, write_folder

COUNT = 40


def class_folders(prefix: str = "", count: int = COUNT) -> Files:
    """Three classes; the first channel is the number of an image, the second that of its class."""
    return {
        f"{prefix}{name}/{number}.png": png((number, label, 0))
        for label, name in enumerate(("ape", "bee", "cat"))
        for number in range(count)
    }


def is_test(number: int, label: int, fraction: float = 0.2) -> bool:
    """Whether the SHA-256 of an image's shape and pixels lies below this share of its range."""
    content = repr((4, 6, 3)).encode() + bytes((number, label, 0)) * 24
    return int(hashlib.sha256(content).hexdigest(), 16) / 2**256 < fraction


def members(part: ImageSet) -> set[tuple[int, int]]:
    found = part.images[:, 0, 0, :2].tolist()
    assert [label for _, label in found] == part.labels.tolist()
    return set(map(tuple, found))


@pytest.mark.parametrize("kind", WRITERS)
def test_split_depends_on_content_alone(kind: str, tmp_path: Path, read: Callable[..., Splits]) -> None:
    plain = read(write_folder(tmp_path / "photos", class_folders()))
    turned = dict(reversed(class_folders("My pictures/2026/").items()))
    turned |= {"My pictures/README.md": b"text", "My pictures/2026/ape/.DS_Store": b"junk"}
    other = read(WRITERS[kind](tmp_path / kind, turned), image_size=9)
    assert plain.train.classes == ("ape", "bee", "cat")
    assert members(plain.test) == members(other.test) and members(plain.train) == members(other.train)
    assert len(plain.train) + len(plain.test) == 3 * COUNT and plain.overlap == 0
    expected = {(number, label) for number in range(COUNT) for label in range(3) if is_test(number, label)}
    assert members(plain.test) == expected and plain.test_fraction == 0.2
    assert np.bincount(plain.test.labels).tolist() == [5, 7, 5]
    [note] = plain.notes
    assert note.startswith("photos has no split: 17 of 120 images are test images")
    assert "--test-fraction 0.2" in note


def test_further_images_move_none(tmp_path: Path, read: Callable[..., Splits]) -> None:
    files = class_folders()
    before = read(write_folder(tmp_path / "photos", class_folders(count=20)))
    after = read(write_folder(tmp_path / "photos", files))
    for part in ("train", "test"):
        assert members(getattr(before, part)) == {
            image for image in members(getattr(after, part)) if image[0] < 20
        }


def test_copies_are_on_one_side(tmp_path: Path, read: Callable[..., Splits]) -> None:
    copies = {f"ape/copy {number}.png": png((number, 0, 0)) for number in range(COUNT)}
    found = read(write_folder(tmp_path / "photos", {**class_folders(), **copies}))
    assert found.overlap == 0
    assert np.bincount(found.test.labels).tolist() == [10, 7, 5]
    half = read(tmp_path / "photos", test_fraction=0.5)
    assert members_of_all(found.test) < members_of_all(half.test) and half.test_fraction == 0.5


def members_of_all(part: ImageSet) -> set[tuple[int, int]]:
    return set(map(tuple, part.images[:, 0, 0, :2].tolist()))


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_class_of_two_has_an_image_on_both_sides(
    fraction: float, tmp_path: Path, read: Callable[..., Splits]
) -> None:
    files = {**class_folders(count=2), "dog/0.png": png((0, 3, 0)), "dog/1.png": png((0, 3, 0))}
    found = read(write_folder(tmp_path / "photos", files), test_fraction=fraction)
    assert sorted(found.test.labels) == [0, 1, 2]
    assert sorted(found.train.labels) == [0, 1, 2, 3, 3]  # the two dogs are one picture
    assert "No test images of dog." in found.notes


def test_what_is_no_class_folder(tmp_path: Path, read: Callable[..., Splits]) -> None:
    files = {**class_folders(), "cover.png": png(), "cat/summer/1.png": png((99, 2, 0)), "bee/list.txt": b"a"}
    found = read(write_folder(tmp_path / "photos", files))
    assert len(found.train) + len(found.test) == 3 * COUNT + 1
    assert "Skipped 1 files that are not images (bee/list.txt)." in found.notes
    flat = {
        f"{split}/{number}.png": png((number, 0, 0)) for split in ("train", "test") for number in range(3)
    }
    for number, wrong in enumerate(
        (flat, {"ape/1.png": png(), "ape/2.png": png((1, 0, 0))}, {"1.png": png()})
    ):
        with pytest.raises(KdError, match="no train images") as caught:
            read(write_folder(tmp_path / str(number), wrong))
        assert "without a split" in caught.value.hint
    broken = {**class_folders(), **{f"dog/{number}.png": b"" for number in range(2)}}
    with pytest.raises(KdError, match=r"all images of dog in .* are broken, as dog/0.png"):
        read(write_folder(tmp_path / "broken", broken), skip_broken=True)


def test_the_split_of_a_model_is_used_with_it(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos", class_folders())
    split = write_folder(tmp_path / "split", small_tree())
    recorded = {"data": {"spec": str(photos), "test_fraction": 0.5, "skip_broken": True}}
    model = SimpleNamespace(path=tmp_path / "m.pt", provenance=recorded, input_size=(8, 8, 3), resize=0)
    for options, fraction in (
        ({}, 0.5),
        ({"data": str(photos)}, 0.5),
        ({"test_fraction": 0.3}, 0.3),
        ({"data": str(split)}, None),
    ):
        config = make(ExportConfig, {"cache_dir": tmp_path / "cache", **options})
        source = data.source_for(model, config)
        assert data.load(**source).test_fraction == fraction
        assert source["skip_broken"] == ("data" not in options)
