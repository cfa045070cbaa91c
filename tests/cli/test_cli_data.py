"""`kd data`: a folder of odd files, and what training does with it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.cli.helpers import Kd
from tests.data.helpers import png, write_folder


@pytest.fixture
def odd(workplace: Path) -> Path:
    """A data set of two classes with a file of each problem."""
    random = np.random.default_rng(0)

    def photo(**options: object) -> bytes:
        colour = tuple(random.integers(0, 256, 3).tolist())
        return png(colour, (24, 16), **options)

    scene = Image.fromarray(random.integers(0, 256, (6, 6, 3)).astype(np.uint8)).resize((80, 60))
    scene.save(stream := io.BytesIO(), "PNG")
    scene.resize((64, 48)).save(smaller := io.BytesIO(), "JPEG")
    turned = Image.Exif()
    turned[274] = 6
    files = {
        f"{split}/{name}/{n}.png": photo()
        for split in ("train", "test")
        for name in ("ape", "bee")
        for n in range(8)
    }
    files |= {
        "train/ape/grey.png": png(7, (24, 16), "L"),
        "train/ape/rgba.png": png((1, 2, 3, 99), (24, 16), "RGBA"),
        "train/ape/cmyk.jpg": png((1, 2, 3, 4), (24, 16), "CMYK", format="JPEG"),
        "train/ape/palette.gif": png(3, (24, 16), "P", format="GIF", transparency=3),
        "train/ape/16-bit.png": png(9999, (24, 16), "I;16"),
        "train/ape/turned.jpg": png((9, 9, 99), (24, 16), format="JPEG", exif=turned),
        "train/bee/dot.png": png((9, 9, 9), (1, 1)),
        "train/bee/huge.png": png(1, (8000, 8000), "1"),
        "train/bee/cut.png": png((1, 9, 9), (24, 16))[:60],
        "train/bee/text.jpg": b"not an image",
        "train/bee/notes.txt": b"not an image",
        "train/bee/new\nline.png": png((2, 9, 9), (24, 16)),
        "train/bee/\u00fcn\u00ef.png": png((3, 9, 9), (24, 16)),
        "train/dog/only.png": png((4, 9, 9), (24, 16)),
        "test/bee/copy.png": files["train/ape/3.png"],
        "train/ape/scene.png": stream.getvalue(),
        "test/ape/scene.jpg": smaller.getvalue(),
    }
    write_folder(workplace / "odd", files)
    (workplace / "odd/train/cat").mkdir()
    (workplace / "odd/train/bee/loop").symlink_to("../bee")
    return workplace / "odd"


def test_a_folder_of_odd_files(odd: Path, kd: Kd) -> None:
    done = kd("data", "odd", "--json")
    found = json.loads(done.out)
    assert done.code == 1 and "error: odd has 2 broken images" in done.err and "hint:" in done.err
    assert (
        found["images"]["train"] == {"ape": 15, "bee": 12, "dog": 1} and found["images"]["test"]["bee"] == 9
    )
    assert found["imbalance"] == 15
    assert found["sizes"] == {"smallest": [1, 1], "median": [16, 24], "largest": [8000, 8000]}
    assert found["kinds"] == {"grey": 2, "RGBA": 1, "CMYK": 1, "palette": 1, "16-bit": 1, "turned by EXIF": 1}
    problems = found["problems"]
    assert [name.partition(":")[0] for name in problems.pop("broken")] == [
        "cannot read image train/bee/cut.png",
        "cannot read image train/bee/text.jpg",
    ]
    assert problems == {
        "not an image": ["train/bee/notes.txt"],
        "smaller than 8 pixels": ["train/bee/dot.png, 1×1"],
        "more than 16 million pixels": ["train/bee/huge.png, 8000×8000"],
        "link or special file": ["train/bee/loop"],
        "folder without images of a class": ["train/cat"],
        "class of one image": ["dog"],
        "duplicate images in two splits": ["test/bee/copy.png = train/ape/3.png"],
        "duplicate images in two classes": ["test/bee/copy.png = train/ape/3.png"],
        "near-duplicate images in two splits": ["test/ape/scene.jpg ≈ train/ape/scene.png"],
        "name with control characters": ["train/bee/new\nline.png"],
    }
    shown = kd("data", "odd", "--skip-broken")
    assert shown.code == 0 and r"'train/bee/new\nline.png'" in shown.out and "\nline" not in shown.out


def test_training_on_odd_files_refuses_or_works(odd: Path, kd: Kd) -> None:
    train = (
        "train",
        "--method",
        "ce",
        "--student",
        "convnet-tiny",
        "--epochs",
        "1",
        "--threads",
        "1",
        "--data",
        "odd",
    )
    done = kd(*train)
    [line] = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert done.code == 1 and "cannot read image train/bee/" in line
    done = kd(*train, "--skip-broken")
    assert done.code == 0 and "Skipped 2 broken images" in done.err
    assert "not plain RGB" in done.err and "1 of 18 test images are among the training images" in done.err


def test_a_sheet_of_images(workplace: Path, kd: Kd) -> None:
    files = {f"{name}/{n}.png": png((9, 9, n)) for name in ("Cat", "cat") for n in range(3)}
    write_folder(Path("photos"), files)
    done = kd("data", "photos", "--sheet", "sheets/contact.png")
    assert done.code == 0 and "Cat = cat" in done.out and "wrote sheets/contact.png" in done.out
    assert Image.open("sheets/contact.png").size == (8 * 150, 2 * 120 + 60)
    done = kd("data", "photos", "--sheet", "contact.gif")
    assert done.code == 2 and "--sheet contact.gif: must be a .png or .svg file" in done.err


def test_a_data_set_by_name(kd: Kd) -> None:
    done = kd("data", "digits", "--json", "--sheet", "digits.png")
    found = json.loads(done.out)
    classes = np.bincount(load_digits().target[:1437])
    assert done.code == 0 and found["images"]["train"] == {str(n): count for n, count in enumerate(classes)}
    assert sum(found["images"]["test"].values()) == 360 and found["kinds"] == {"grey": 1797}
    assert (
        found["sizes"]["median"] == [8, 8] and found["problems"] == {}
    )  # 8 × 8 are too few for near-duplicates
    assert Image.open("digits.png").size == (1200, 10 * 120 + 60)


def test_a_set_that_cannot_be_trained_on(workplace: Path, kd: Kd) -> None:
    write_folder(Path("photos"), {f"{name}/{n}.png": png((n, 0, 0)) for name in "ab" for n in range(3)})
    assert kd("data", "photos").code == 0
    write_folder(Path("photos"), {"c/1.png": b""})
    done = kd("data", "photos", "--skip-broken", "--json")
    assert done.code == 1 and "all images of c in photos are broken" in json.loads(done.out)["error"]
    assert kd("data", "nothing").code == 2
