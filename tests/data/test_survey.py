"""Near-duplicate images, by difference hashes, and the contact sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdcli.data import survey
from kdcli.data.read_images import Found, Place
from kdcli.data.sources import FolderSource
from tests.data.helpers import png, write_folder


def test_difference_hash() -> None:
    """Of an image of 9 × 8 pixels: each of the 64 bits is one comparison, row by row, the first the highest."""
    grey = np.random.default_rng(0).integers(0, 256, (8, 9)).astype(np.uint8)
    bits = "".join("01"[bool(row[x + 1] > row[x])] for row in grey.tolist() for x in range(8))
    assert survey.difference_hash(np.repeat(grey[..., None], 3, axis=2)) == int(bits, 2)
    assert survey.difference_hash(np.full((30, 40, 3), 99, np.uint8)) is None


def test_nearest_images_of_earlier_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a loop over all pairs; copies are left out, and images without a hash."""
    monkeypatch.setattr(survey, "_PAIRS", 100)  # several chunks
    random = np.random.default_rng(0)
    found, hashes = Found(), {}
    for index in range(120):
        split = ("train", "train", "val", "test")[index % 4]
        found.images[Place("", split, "a", f"{index}.png")] = index
        found.digests[index] = bytes([index])
        value = int(random.integers(0, 2**64, dtype=np.uint64))
        if index % 4 > 1 and index % 3 == 0:
            value = hashes[index - index % 4] ^ sum(
                1 << int(bit) for bit in random.choice(64, index % 5, False)
            )
        hashes[index] = value
    found.digests[24] = found.digests[27]
    del hashes[15], hashes[12]
    kinds = {index: place.split for place, index in found.images.items()}
    expected = set()
    for mine, earlier in (("val", ("train",)), ("test", ("train", "val"))):
        for index, value in hashes.items():
            pairs = [
                ((value ^ hashes[other]).bit_count(), other)
                for other in hashes
                if kinds[other] in earlier and kinds[index] == mine
            ]
            distance, other = min(pairs, default=(64, 0))
            if distance <= 3 and found.digests[index] != found.digests[other]:
                expected.add(f"{index}.png ≈ {other}.png")
    assert len(expected) > 5
    assert set(survey._near_copies(found, hashes)) == expected


def test_sheet(tmp_path: Path) -> None:
    """Of nine images of each class every second one, from the left, and white squares."""
    files = {f"{name}/{n}.png": png((20 * n, label, 0)) for label, name in enumerate("ab") for n in range(9)}
    places = {Place("", "train", name[0], name): index for index, name in enumerate(files)}
    source = FolderSource(write_folder(tmp_path / "photos", files))
    classes, picture = survey.sheet_of(Found(places), source)
    assert classes == ["a", "b"] and picture.shape == (2 * 64, 8 * 64, 3)
    for column in range(8):
        colours = [[40 * column, label, 0] if column < 5 else [255, 255, 255] for label in range(2)]
        assert picture[[32, 96], 32 + 64 * column].tolist() == colours
