"""Image trees in folders and archives."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcli.base import runtime
from kdcli.base.errors import KdError
from kdcli.base.events import Event, Note
from kdcli.data import load
from kdcli.data.images import Splits, fingerprint_of
from kdcli.data.split import split_of, split_validation
from kdcli.engine.plan import make_plan
from tests.data.helpers import WRITERS, Files, png, small_tree, write_folder, write_tar, write_zip
from tests.helpers import config


@pytest.mark.parametrize("kind", WRITERS)
def test_every_container_gives_the_same_set(kind: str, tmp_path: Path, read: Callable[..., Splits]) -> None:
    path = WRITERS[kind](tmp_path / kind, small_tree())
    splits = read(path)
    assert splits.train.classes == splits.test.classes == ("ape house", "zebra")
    assert splits.train.images.shape == (3, 4, 6, 3) and splits.train.images.dtype == np.uint8
    assert splits.train.images[:, 0, 0, 0].tolist() == [1, 2, 3]  # by class, then by name
    assert splits.train.labels.tolist() == [0, 1, 1] and splits.train.labels.dtype == np.int64
    assert splits.test.images[:, 0, 0, 0].tolist() == [4, 5] and splits.test.labels.tolist() == [0, 1]
    assert splits.label == kind and splits.spec == str(path) and splits.notes == ()
    train = splits.train
    assert train.fingerprint == fingerprint_of(np.array(train.images), train.labels, train.classes)
    again = read(path)
    assert again.train.fingerprint == train.fingerprint and not again.train.images.flags.writeable


def test_leading_folders_junk_and_val(tmp_path: Path, read: Callable[..., Splits]) -> None:
    files = {name.replace("test/", "Valid/"): data for name, data in small_tree("./My set/v1/").items()}
    files |= {
        "My set/README.md": b"text",
        "My set/v1/train/labels.csv": b"a,b",
        "My set/v1/train/zebra/._a.png": b"junk",
        "__MACOSX/My set/v1/train/zebra/a.png": b"junk",
        "My set/v1/train/zebra/.DS_Store": b"junk",
        "My set/v1/train/zebra/Thumbs.db": b"junk",
        "My set/v1/train/zebra/notes.txt": b"hello",
    }
    splits = read(write_tar(tmp_path / "x.tar", files))
    assert len(splits.train) == 3 and len(splits.test) == 2
    notes = " ".join(splits.notes)
    assert "My set/v1/" in notes and "Validation" in notes and "notes.txt" in notes and len(splits.notes) == 3


@pytest.mark.parametrize("kind", ["folder", "set.tar", "set.zip"])
def test_folders_of_one_meaning_are_joined_and_no_image_is_lost(
    kind: str, tmp_path: Path, read: Callable[..., Splits]
) -> None:
    """`é` in one code point or two, `val/` beside `valid/`, `train/` beside `Train/`; all files have one name."""
    places = [
        ("train/caf\u00e9", 1), ("train/cafe\u0301", 2), ("Train/caf\u00e9", 3), ("train/zoo", 4),
        ("val/caf\u00e9", 5), ("valid/caf\u00e9", 6), ("validation/cafe\u0301", 7), ("val/zoo", 8),
    ]  # fmt: skip
    files = {f"{place}/1.png": png((value, 0, 0)) for place, value in places}
    splits = read(WRITERS[kind](tmp_path / kind, files))
    assert splits.train.classes == ("caf\u00e9", "zoo")
    for part, expected in ((splits.train, {1, 2, 3}), (splits.test, {5, 6, 7})):
        values = part.images[:, 0, 0, 0]
        assert set(values[part.labels == 0].tolist()) == expected and len(part) == 4


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("images/train", "images/dev"),
        ("train_images", "Test-Set"),
        ("training", "evaluation/evaluation"),
    ],
)
def test_usual_names_of_splits(train: str, test: str, tmp_path: Path, read: Callable[..., Splits]) -> None:
    named = {"train": train, "test": test}
    parts = {name: name.split("/", 1) for name in small_tree()}
    files = {f"{named[parts[name][0]]}/{parts[name][1]}": data for name, data in small_tree().items()}
    splits = read(write_folder(tmp_path / "set", {**files, "seg_pred/seg_pred/9.png": png((9, 0, 0))}))
    assert splits.train.classes == ("ape house", "zebra")
    assert splits.train.images[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert splits.test.images[:, 0, 0, 0].tolist() == [4, 5]


def test_names_that_are_no_splits() -> None:
    assert not any(
        map(split_of, ("steam train", "trainer", "test_train", "images", "", "train2017", "pretest"))
    )


def test_folders_that_may_be_splits_are_refused(tmp_path: Path, read: Callable[..., Splits]) -> None:
    """Folders of unknown names that hold the same folders; classes may hold one folder, or images beside folders."""
    folds = {f"{fold}/{name}/1.png": png() for fold in ("fold1", "fold2") for name in ("cat", "dog")}
    with pytest.raises(KdError, match=r"the folders fold1, fold2 of .* hold the same folders") as caught:
        read(write_folder(tmp_path / "folds", {f"top/{name}": data for name, data in folds.items()}))
    assert "Rename" in caught.value.hint
    beside = {
        f"{fold}/{number}.png": png((number, 0, 0)) for fold in ("fold1", "fold2") for number in range(4)
    }
    assert read(write_folder(tmp_path / "seasons", {**folds, **beside})).train.classes == ("fold1", "fold2")
    one = {name.replace("dog/1", "cat/2"): png((number, 0, 0)) for number, name in enumerate(folds)}
    assert read(write_folder(tmp_path / "one", one)).train.classes == ("fold1", "fold2")


def test_the_validation_split_of_the_data_is_used(tmp_path: Path, read: Callable[..., Splits]) -> None:
    files = {**small_tree(), "val/zebra/1.png": png((7, 0, 0)), "valid/ape house/1.png": png((6, 0, 0))}
    path = write_folder(tmp_path / "set", files)
    for _ in range(2):  # packed, and from the cache
        splits = read(path)
        assert splits.train.images[:, 0, 0, 0].tolist() == [1, 2, 3, 6, 7]
        assert splits.test.images[:, 0, 0, 0].tolist() == [4, 5] and splits.train.validation == 2
        training, validation = split_validation(splits.train.labels, 0.4, splits.train.validation)
        assert (training.tolist(), validation.tolist()) == ([0, 1, 2], [3, 4])
        assert splits.notes == ("2 validation images by the data's own split: --val-fraction has no effect.",)
    plan = make_plan(config(method="ce"), splits, runtime.World.alone())
    assert plan.val_samples.tolist() == [3, 4] and plan.train_samples.tolist() == [0, 1, 2]


def test_names_in_another_encoding_stay_different(tmp_path: Path, read: Callable[..., Splits]) -> None:
    """`é` and `è` in Latin-1, which tarfile gives as surrogates; neither is UTF-8."""
    files = {f"train/zebra/{byte}.png": png((value, 0, 0)) for byte, value in (("\udce9", 8), ("\udce8", 9))}
    splits = read(write_tar(tmp_path / "x.tar", {**small_tree(), **files}))
    assert sorted(splits.train.images[:, 0, 0, 0].tolist()) == [1, 2, 3, 8, 9]
    above = {f"caf\udce9/{name}": content for name, content in small_tree().items()}
    assert read(write_folder(tmp_path / "set", above)).notes == ("Images are below caf /.",)


def test_images_are_known_by_content_whatever_their_name(tmp_path: Path, read: Callable[..., Splits]) -> None:
    files = {
        **small_tree(),
        "train/zebra/c.jpg": png((7, 0, 0), format="GIF"),
        "train/zebra/d.dat": png((8, 0, 0)),
    }
    files |= {"train/zebra/e.tif": png((9, 0, 0), format="TIFF"), "train/zebra/f.txt": b"text"}
    splits = read(write_folder(tmp_path / "set", files))
    assert splits.train.images[:, 0, 0, 0].tolist() == [1, 2, 3, 7, 8, 9]
    assert splits.notes == (
        "Skipped 1 files that are not images (train/zebra/f.txt).",
        "Images that are not plain RGB: 1 palette.",
    )


def test_a_class_may_be_called_train(tmp_path: Path, read: Callable[..., Splits]) -> None:
    files = {f"test/{split}/{name}/1.png": png() for split in ("train", "test") for name in ("train", "b")}
    splits = read(write_zip(tmp_path / "x.zip", files))
    assert splits.train.classes == ("b", "train") and len(splits.train) == len(splits.test) == 2


@pytest.mark.parametrize("order", [1, -1])
def test_mixed_sizes_are_cropped_and_resized(order: int, tmp_path: Path, read: Callable[..., Splits]) -> None:
    """A 30×90 image, red in its outer thirds, is green after the centre crop, whatever the order."""
    image = np.zeros((30, 90, 3), np.uint8)
    image[:, :30, 0] = image[:, 60:, 0] = 200
    image[:, 30:60, 1] = 100
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    files = {**small_tree(), "train/zebra/0.png": stream.getvalue()}
    splits = read(write_tar(tmp_path / "x.tar", dict(list(files.items())[::order])))
    assert splits.train.input_size == (32, 32, 3)
    assert (splits.train.images[1, :, 1:-1] == [0, 100, 0]).all()
    assert splits.train.images[[0, 2, 3], 5, 5, 0].tolist() == [1, 2, 3]
    assert any("32x32" in note for note in splits.notes)


def test_image_size(tmp_path: Path, read: Callable[..., Splits]) -> None:
    path = write_folder(tmp_path / "set", small_tree())
    assert read(path, image_size=7).test.input_size == (7, 7, 3)
    assert load("digits", image_size=16).train.input_size == (16, 16, 1)


def test_grey_is_luma_and_shares_nothing_with_colour(tmp_path: Path, read: Callable[..., Splits]) -> None:
    red, green, blue = 200, 100, 50
    files = {f"{split}/{name}/1.png": png((red, green, blue)) for split in ("train", "test") for name in "ab"}
    path = write_folder(tmp_path / "set", files)
    luma = round(0.299 * red + 0.587 * green + 0.114 * blue)
    for grey in (read(path, grey=True), read(path, fit_to=(4, 6, 1))):
        assert grey.train.images.shape == (2, 4, 6, 1)
        assert set(grey.train.images.ravel().tolist()) == {luma}
    colour = read(path)
    assert colour.train.images[0, 0, 0].tolist() == [red, green, blue]
    assert colour.train.fingerprint != grey.train.fingerprint
    three = load("digits", fit_to=(8, 8, 3)).train.images
    assert three.shape == (1437, 8, 8, 3)
    assert all(np.array_equal(three[..., [plane]], load("digits").train.images) for plane in range(3))


def test_broken_images_are_named(tmp_path: Path, read: Callable[..., Splits]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    ppm = png(0, format="PPM")
    for name, data in {
        "half.jpg": stream.getvalue()[:900],
        "text.jpg": b"hello",
        "empty.png": b"",
        "ppm.png": ppm,
        "real.ppm": ppm,
        "half.gif": png(0, mode="P", format="GIF")[:20],
    }.items():
        path = write_folder(tmp_path / name, {**small_tree(), f"train/zebra/{name}": data})
        with pytest.raises(KdError, match=f"train/zebra/{name}"):
            read(path)
    assert not list((tmp_path / "cache/data").iterdir())  # nothing half-written stays


def without(files: Files, *prefixes: str) -> Files:
    return {name: data for name, data in files.items() if not name.startswith(prefixes)}


def test_layout_errors(tmp_path: Path, read: Callable[..., Splits]) -> None:
    both = {
        f"{name}/{split}/{label}/1.png": png()
        for name in "ab"
        for split in ("train", "test")
        for label in "xy"
    }
    cases: dict[str, Files] = {
        "has no train images": {"zebra/a.png": png()},
        "tar has no train images": {"train/zebra/a.txt": b"x"},
        "no train images": without(small_tree(), "train"),
        "no test images": without(small_tree(), "test"),
        "only one class: zebra": without(small_tree(), "train/ape", "test/ape"),
        "classes without training images: ape house": without(small_tree(), "train/ape"),
        "more than one dataset: a, b": both,
        "unusable class name": {**small_tree(), "train/\x1b[31m/a.png": png()},
    }
    for number, (message, files) in enumerate(cases.items()):
        with pytest.raises(KdError, match=message) as caught:
            read(write_tar(tmp_path / f"{number}.tar", files))
        assert caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(KdError, match="no train images"):
        read(tmp_path / "empty")


def test_train_images_alone_can_be_split(tmp_path: Path, read: Callable[..., Splits]) -> None:
    files = {f"my set/training/{name}/{i}.png": png((i, 0, 0)) for name in ("ape", "zebra") for i in range(4)}
    folder = write_folder(tmp_path / "x", files)
    with pytest.raises(KdError, match="has no test images") as caught:
        read(folder)
    path = shlex.split(caught.value.hint or "")[-1]
    assert path == str(folder / "my set/training") and read(Path(path)).train.classes == ("ape", "zebra")


def test_a_class_without_test_images_is_a_note(tmp_path: Path, read: Callable[..., Splits]) -> None:
    splits = read(write_tar(tmp_path / "x.tar", without(small_tree(), "test/zebra")))
    assert splits.test.labels.tolist() == [0] and splits.notes == ("No test images of zebra.",)


def test_layout_errors_tell_of_links_that_were_skipped(tmp_path: Path, read: Callable[..., Splits]) -> None:
    folder = write_folder(tmp_path / "set", without(small_tree(), "test"))
    (folder / "test").symlink_to("train")  # one folder, read once under one of its names
    with pytest.raises(KdError, match=r"has no (train|test) images") as caught:
        read(folder)
    assert "Skipped 1 links" in (caught.value.hint or "")


def test_notes_reach_the_user_each_time(tmp_path: Path, read: Callable[..., Splits]) -> None:
    path = write_tar(tmp_path / "x.tar", small_tree("top/"))
    for _ in range(2):
        seen: list[Event] = []
        read(path, on_event=seen.append)
        assert [event.text for event in seen if isinstance(event, Note)] == ["Images are below top/."]


def test_numbered_classes_are_sorted_as_numbers(tmp_path: Path, read: Callable[..., Splits]) -> None:
    names = [str(number) for number in range(12)]
    files = {f"{split}/{name}/1.png": png((int(name), 0, 0)) for split in ("train", "test") for name in names}
    splits = read(write_folder(tmp_path / "set", files))
    assert splits.train.classes == tuple(names)
    assert splits.train.images[:, 0, 0, 0].tolist() == splits.train.labels.tolist() == list(range(12))


def broken_tree() -> Files:
    return {
        **small_tree(),
        "train/zebra/c.png": png()[:40],
        "test/zebra/0.png": b"",
        "train/ape house/x.gif": b"GIF89a",
    }


@pytest.mark.parametrize("kind", ["folder", "set.tar", "set.zip"])
def test_broken_images_are_left_out_if_asked(kind: str, tmp_path: Path, read: Callable[..., Splits]) -> None:
    path = WRITERS[kind](tmp_path / kind, broken_tree())
    with pytest.raises(KdError, match=r"cannot read image .*(c\.png|0\.png|x\.gif)") as caught:
        read(path)
    assert "--skip-broken" in caught.value.hint or "gif" in caught.value.message
    events: list[Event] = []
    found = read(path, skip_broken=True, on_event=events.append)
    told = [event.text for event in events if isinstance(event, Note)]
    assert told == ["Skipped 3 broken images (test/zebra/0.png, train/ape house/x.gif, train/zebra/c.png)."]
    good = read(WRITERS[kind](tmp_path / ("good" + kind), small_tree()))
    assert (
        found.train.fingerprint == good.train.fingerprint and found.test.fingerprint == good.test.fingerprint
    )
    assert read(path, skip_broken=True).notes == found.notes  # of the cache
    with pytest.raises(
        KdError, match="cannot read image"
    ):  # what was packed without them is not taken for the whole
        read(path)


@pytest.mark.parametrize("prefix", ["train/ape house/", "test/ape house/"])
def test_a_class_that_loses_all_its_images_is_an_error(
    prefix: str, tmp_path: Path, read: Callable[..., Splits]
) -> None:
    files = {name: data[:30] if name.startswith(prefix) else data for name, data in small_tree().items()}
    with pytest.raises(KdError, match=f"all images of {prefix[:-1]} in .* are broken"):
        read(write_tar(tmp_path / "x.tar", files), skip_broken=True)
