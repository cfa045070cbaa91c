"""Datasets: digits, image trees in folders and archives, CIFAR-10 batches, the packed cache."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import pickle
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Event, Note, Progress
from kdcli.data import decode, load, sources, streams, tree
from kdcli.data.images import Splits, fingerprint_of
from tests.helpers import ROOT

Files = dict[str, bytes]


def png(
    colour: Any = (10, 20, 30), size: tuple[int, int] = (6, 4), mode: str = "RGB", **options: Any
) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, options.pop("format", "PNG"), **options)
    return stream.getvalue()


def small_tree(prefix: str = "") -> Files:
    """Two classes; each image is of one colour, so that order and labels can be read off the pixels."""
    return {
        f"{prefix}train/zebra/b.PNG": png((3, 0, 0)),
        f"{prefix}train/zebra/a.png": png((2, 0, 0)),
        f"{prefix}train/ape house/é.png": png((1, 0, 0)),
        f"{prefix}test/zebra/1.png": png((5, 0, 0)),
        f"{prefix}test/ape house/1.bmp": png((4, 0, 0), format="BMP"),
    }


def write_folder(path: Path, files: Files) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_tar(path: Path, files: Files, extra: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    mode = {".xz": "w:xz", ".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info in extra:
            archive.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


WRITERS: dict[str, Callable[[Path, Files], Path]] = {
    "folder": write_folder,
    "set.tar": write_tar,
    "set.tar.gz": write_tar,
    "set.tar.xz": write_tar,
    "set.zip": write_zip,
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Splits]:
    return lambda path, **options: load(str(path), **{"cache_dir": tmp_path / "cache", **options})


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


@pytest.mark.parametrize("kind", WRITERS)
def test_second_load_decodes_nothing(
    kind: str, tmp_path: Path, read: Callable[..., Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = WRITERS[kind](tmp_path / kind, small_tree())
    first = read(path)
    monkeypatch.setattr(decode, "decode_into", lambda *_: pytest.fail("decoded again"))
    second = read(path)
    assert np.array_equal(first.train.images, second.train.images)
    with pytest.raises(pytest.fail.Exception):
        read(path, image_size=5)


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
    assert (splits.train.images[1] == [0, 100, 0]).all()
    assert splits.train.images[[0, 2, 3], 5, 5, 0].tolist() == [1, 2, 3]
    assert any("32x32" in note for note in splits.notes)


def test_resize_is_antialiased() -> None:
    """A chessboard of single pixels shrinks to grey, not to one of its colours."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 200).astype(np.uint8)[..., None]
    assert abs(decode.resize(board, 8).astype(int) - 100).max() <= 8


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


@pytest.mark.parametrize("sizes", [(None, 6), (6, None)])
def test_images_that_have_the_size_asked_for_are_packed_once(
    sizes: tuple[int | None, ...], tmp_path: Path, read: Callable[..., Splits]
) -> None:
    square = {name: png((1, 2, 3), (6, 6)) for name in small_tree()}
    path = write_folder(tmp_path / "set", square)
    first, second = (read(path, image_size=size) for size in sizes)
    assert first.train.fingerprint == second.train.fingerprint
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 1
    assert read(path, image_size=5).train.input_size == (5, 5, 3)
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 2


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png((9, 8, 7)), (9, 8, 7)),
        (png(77, mode="L"), (77, 77, 77)),
        (png(1, mode="1"), (255, 255, 255)),
        (png((255, 0, 0, 0), mode="RGBA"), (255, 255, 255)),
        (png((0, 0, 0, 51), mode="RGBA"), (204, 204, 204)),
        (png((100, 255), mode="LA"), (100, 100, 100)),
        (png(257 * 130, mode="I;16"), (130, 130, 130)),
        (png((9, 8, 7), transparency=(9, 8, 7)), (255, 255, 255)),
        (png((250, 10, 10), format="WEBP", lossless=True), (250, 10, 10)),
        (png((0, 0, 0, 255), mode="CMYK", format="JPEG"), (0, 0, 0)),
    ],
)
def test_everything_becomes_rgb(data: bytes, expected: tuple[int, int, int]) -> None:
    pixels = decode.decode(data, "x")
    assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == list(expected)


def test_palette() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putpixel((1, 0), 1)
    for transparency, second in ((None, [10, 200, 30]), (1, [255, 255, 255])):
        stream = io.BytesIO()
        image.save(stream, "PNG", **({} if transparency is None else {"transparency": transparency}))
        assert decode.decode(stream.getvalue(), "x").tolist() == [[[0, 0, 0], second]]


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(format_name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate clockwise for view
    image = Image.new("RGB", (16, 8), "black")
    image.paste((255, 255, 255), (0, 0, 8, 8))  # left half white → top half after the turn
    stream = io.BytesIO()
    image.save(stream, format_name, exif=exif)
    pixels = decode.decode(stream.getvalue(), "x")
    assert pixels.shape == (16, 8, 3)
    assert pixels[:6].min() > 200 and pixels[10:].max() < 50


def _tar_entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_and_devices_are_skipped(tmp_path: Path, read: Callable[..., Splits]) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png((99, 0, 0)))
    extra = (
        _tar_entry("train/zebra/link.png", tarfile.SYMTYPE, str(secret)),
        _tar_entry("train/zebra/hard.png", tarfile.LNKTYPE, "train/zebra/a.png"),
        _tar_entry("train/zebra/fifo.png", tarfile.FIFOTYPE),
        _tar_entry("train/zebra/device.png", tarfile.CHRTYPE),
    )
    splits = read(write_tar(tmp_path / "x.tar", small_tree(), extra))
    assert len(splits.train) == 3 and "Skipped 4 links" in splits.notes[0]
    path = write_zip(tmp_path / "x.zip", small_tree())
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("train/zebra/link.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, str(secret))
    assert len(read(path).train) == 3


def test_a_folder_with_a_fifo_and_a_loop_is_read(tmp_path: Path, read: Callable[..., Splits]) -> None:
    path = write_folder(tmp_path / "set", small_tree())
    os.mkfifo(path / "train/zebra/x.png")
    (path / "train/zebra/loop").symlink_to(path)
    (path / "train/zebra/dangling.png").symlink_to("nowhere")
    assert len(read(path).train) == 3


@pytest.mark.parametrize("name", ["../train/zebra/x.png", "/train/zebra/x.png", "train/../../zebra/x.png"])
@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_unsafe_names_are_refused(
    write: Callable[[Path, Files], Path], name: str, tmp_path: Path, read: Callable[..., Splits]
) -> None:
    with pytest.raises(KdError, match="unsafe name"):
        read(write(tmp_path / "archive", {**small_tree(), name: png()}))


def test_bombs(tmp_path: Path, read: Callable[..., Splits], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_MEMBER_BYTES", 10_000)
    big = {**small_tree(), "train/zebra/big.png": bytes(20_000)}
    for path in (write_zip(tmp_path / "x.zip", big), write_tar(tmp_path / "x.tar.xz", big)):
        with pytest.raises(KdError, match=r"big\.png in .* is 20,000 bytes"):
            read(path)
    monkeypatch.setattr(sources, "MAX_MEMBER_BYTES", 1 << 30)
    monkeypatch.setattr(streams, "EXPANSION_FLOOR", 1 << 20)
    huge = {"README": bytes(3 << 20), **small_tree()}
    path = write_tar(tmp_path / "y.tar.xz", huge)
    with pytest.raises(KdError, match="bomb"):
        read(path)
    path = write_zip(tmp_path / "y.zip", {**small_tree(), "train/zebra/big.png": bytes(3 << 20)})
    with pytest.raises(KdError, match="bomb"):
        read(path)


def test_a_header_that_asks_for_gigabytes(tmp_path: Path, read: Callable[..., Splits]) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 3 << 30
    path = tmp_path / "x.tar.xz"
    path.write_bytes(lzma.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 20)))
    with pytest.raises(KdError, match="oversized header"):
        read(path)


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(0, (5000, 5000), "1")
    monkeypatch.setattr(decode, "MAX_PIXELS", 24_000_000)
    with pytest.raises(KdError, match=r"x\.png has more than 24 million pixels"):
        decode.decode(data, "x.png")


def test_broken_images_are_named(tmp_path: Path, read: Callable[..., Splits]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    gif = png(0, mode="P", format="GIF")
    for name, data in {
        "half.jpg": stream.getvalue()[:900],
        "text.jpg": b"hello",
        "empty.png": b"",
        "gif.png": gif,
        "real.gif": gif,
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
        "no images": {"train/zebra/a.txt": b"x"},
        "no images found": {"zebra/a.png": png()},
        "no train images": without(small_tree(), "train"),
        "no test images": without(small_tree(), "test"),
        "only one class: zebra": without(small_tree(), "train/ape", "test/ape"),
        "classes without train images: ape house": without(small_tree(), "train/ape"),
        "more than one dataset: a, b": both,
        "unusable class name": {**small_tree(), "train/\x1b[31m/a.png": png()},
    }
    for number, (message, files) in enumerate(cases.items()):
        with pytest.raises(KdError, match=message) as caught:
            read(write_tar(tmp_path / f"{number}.tar", files))
        assert caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(KdError, match="no images found"):
        read(tmp_path / "empty")


def test_a_class_without_test_images_is_a_note(tmp_path: Path, read: Callable[..., Splits]) -> None:
    splits = read(write_tar(tmp_path / "x.tar", without(small_tree(), "test/zebra")))
    assert splits.test.labels.tolist() == [0] and splits.notes == ("No test images of zebra.",)


def test_files_that_are_no_archives(tmp_path: Path, read: Callable[..., Splits]) -> None:
    whole = write_tar(tmp_path / "a.tar.xz", small_tree()).read_bytes()
    zipped = write_zip(tmp_path / "a.zip", small_tree()).read_bytes()
    for data in (
        b"",
        b"hello",
        whole[:200],
        zipped[:-30],
        b"\x1f\x8bjunk",
        whole[:100] + b"xx" + whole[102:],
    ):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(KdError, match=r"not an archive|damaged|cannot read") as caught:
            read(tmp_path / "x")
        assert caught.value.hint


def test_a_tar_of_the_oldest_form_is_known_by_its_checksum(
    tmp_path: Path, read: Callable[..., Splits]
) -> None:
    data = bytearray(write_tar(tmp_path / "new.tar", small_tree()).read_bytes())
    at = 0
    while any(data[at : at + 512]):  # what `tar --format=v7` writes: no magic, version, owner's name
        size = int(data[at + 124 : at + 135], 8)
        data[at + 257 : at + 512] = bytes(255)
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        at += 512 + -(-size // 512) * 512
    (tmp_path / "old.tar").write_bytes(data)
    old, new = read(tmp_path / "old.tar"), read(tmp_path / "new.tar")
    assert old.train.fingerprint == new.train.fingerprint
    (tmp_path / "cut.tar").write_bytes(data[:700])
    with pytest.raises(KdError, match=r"cut.tar is not an archive that can be read"):
        read(tmp_path / "cut.tar")


def test_layout_errors_tell_of_links_that_were_skipped(tmp_path: Path, read: Callable[..., Splits]) -> None:
    folder = write_folder(tmp_path / "set", without(small_tree(), "test"))
    (folder / "test").symlink_to("train")  # one folder, read once under one of its names
    with pytest.raises(KdError, match=r"has no (train|test) images") as caught:
        read(folder)
    assert "Skipped 1 links" in (caught.value.hint or "")


def test_an_encrypted_zip_is_named_as_such(tmp_path: Path, read: Callable[..., Splits]) -> None:
    data = bytearray(write_zip(tmp_path / "x.zip", small_tree()).read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:  # the flag of each entry of the directory
        data[at + 8] |= 1
        at = data.find(b"PK\x01\x02", at + 4)
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(KdError) as caught:
        read(tmp_path / "x.zip")
    assert caught.value.message == f"train/zebra/b.PNG in {tmp_path / 'x.zip'} is encrypted"
    assert "password" in (caught.value.hint or "")


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="digts") as caught:
        load("digts")
    assert "Did you mean digits?" in caught.value.hint and "cifar10, cifar100, digits" in caught.value.hint
    with pytest.raises(UsageError):
        load("")


def _entry(cache: Path) -> Path:
    (entry,) = (cache / "data").iterdir()
    return entry


@pytest.mark.parametrize("damage", ["meta gone", "meta cut", "short", "gone", "labels"])
def test_damaged_entries_are_rebuilt(damage: str, tmp_path: Path, read: Callable[..., Splits]) -> None:
    path = write_tar(tmp_path / "x.tar", small_tree())
    good = np.array(read(path).train.images)
    entry = _entry(tmp_path / "cache")
    meta = entry / "meta.json"
    if damage == "meta gone":
        meta.unlink()
    elif damage == "meta cut":
        meta.write_text(meta.read_text()[:-20])
    elif damage == "short":
        os.truncate(entry / "train-images.npy", 150)
    elif damage == "gone":
        (entry / "test-labels.npy").unlink()
    else:
        np.save(entry / "train-labels.npy", np.load(entry / "train-labels.npy")[:-1])
    seen: list[Event] = []
    assert np.array_equal(read(path, on_event=seen.append).train.images, good)
    assert any(isinstance(event, Progress) for event in seen)
    assert sorted(p.name for p in _entry(tmp_path / "cache").iterdir()) == [
        "meta.json", "test-images.npy", "test-labels.npy", "train-images.npy", "train-labels.npy",
    ]  # fmt: skip


def test_a_changed_folder_is_packed_anew(tmp_path: Path, read: Callable[..., Splits]) -> None:
    path = write_folder(tmp_path / "set", small_tree())
    first = read(path)
    write_folder(path, {"train/zebra/a.png": png((200, 0, 0))})
    os.utime(path / "train/zebra/a.png", ns=(1, 1))
    assert read(path).train.images[1, 0, 0, 0] == 200 and first.train.images[1, 0, 0, 0] == 2


def test_notes_reach_the_user_each_time(tmp_path: Path, read: Callable[..., Splits]) -> None:
    path = write_tar(tmp_path / "x.tar", small_tree("top/"))
    for _ in range(2):
        seen: list[Event] = []
        read(path, on_event=seen.append)
        assert [event.text for event in seen if isinstance(event, Note)] == ["Images are below top/."]


def test_digits() -> None:
    """Pixel sums are those of scikit-learn's own copy: 0–16 becomes 0–255."""
    splits = load("digits")
    assert (len(splits.train), len(splits.test)) == (1437, 360) and splits.train.input_size == (8, 8, 1)
    assert splits.train.images[0, 0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0
    assert splits.train.images.max() == 255 and splits.label == "digits"
    assert splits.train.labels[:5].tolist() == [0, 1, 2, 3, 4] and splits.train.classes == tuple("0123456789")
    assert splits.train.fingerprint != splits.test.fingerprint


def cifar_files(count: int = 3, protocol: int = 2) -> Files:
    """Batches as the official archive has them; image n of batch b is red b, green n, blue 7."""
    files: Files = {}
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        data = np.zeros((count, 3, 32, 32), np.uint8)
        data[:, 0], data[:, 2] = number, 7
        data[:, 1] = np.arange(count)[:, None, None]
        data[:, :, 0, 31] = 255  # top right, to tell rows from columns
        batch = {b"data": data.reshape(count, 3072), b"labels": [(number + n) % 10 for n in range(count)]}
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, protocol=protocol)
    meta = {b"label_names": [f"name{n}".encode() for n in range(10)]}
    files["cifar-10-batches-py/batches.meta"] = pickle.dumps(meta, protocol=protocol)
    return files


@pytest.mark.parametrize("unpacked", [True, False])
def test_cifar10(unpacked: bool, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    if unpacked:
        write_folder(data_dir, cifar_files())
    else:
        write_tar(data_dir / "cifar-10-python.tar.gz", cifar_files())
    for _ in range(2):
        splits = load("cifar10", data_dir=data_dir, cache_dir=tmp_path / "cache")
        assert splits.label == "CIFAR-10" and splits.train.classes[3] == "name3"
        assert splits.train.images.shape == (15, 32, 32, 3) and splits.test.images.shape == (3, 32, 32, 3)
        assert splits.train.images[7, 5, 5].tolist() == [2, 1, 7]
        assert (
            splits.train.images[7, 0, 31].tolist() == [255] * 3
            and splits.train.images[7, 31, 0].tolist() != [255] * 3
        )
        assert splits.train.labels[7] == 3 and splits.test.labels.tolist() == [5, 6, 7]
        assert any("not the official" in note for note in splits.notes) is not unpacked
    if unpacked:
        assert load(str(data_dir), cache_dir=tmp_path / "cache").label == "CIFAR-10"


def test_cifar10_that_is_absent_or_wrong(tmp_path: Path) -> None:
    with pytest.raises(KdError, match="CIFAR-10 not found in") as caught:
        load("cifar10", data_dir=tmp_path, cache_dir=tmp_path)
    assert "kd download cifar10" in caught.value.hint and "--data" in caught.value.hint

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/canary",)

    good = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
    for message, batch in {
        "refuses .*system": Evil(),
        "no dictionary": [1],
        r"uint8 \(N, 3072\)": {**good, "data": np.zeros((2, 3072))},
        "labels are not numbers 0-9": {**good, "labels": [0, 10]},
    }.items():
        write_folder(tmp_path, {**cifar_files(), "cifar-10-batches-py/test_batch": pickle.dumps(batch)})
        with pytest.raises(KdError, match=message):
            load("cifar10", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    (tmp_path / "cifar-10-batches-py/data_batch_4").unlink()
    write_folder(tmp_path, {"cifar-10-batches-py/test_batch": pickle.dumps(good)})
    with pytest.raises(KdError, match="lacks data_batch_4"):
        load("cifar10", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "canary").exists()


def test_batches_in_flight_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading waits for decoding, so that an archive is never held in memory whole."""
    monkeypatch.setattr(tree, "BATCH_FILES", 1)
    read_ahead: list[int] = []
    state = {"read": 0, "decoded": 0}
    real, real_batches = decode.decode_into, tree._batches

    def slow(*args: Any) -> Any:
        time.sleep(0.002)
        state["decoded"] += 1
        return real(*args)

    def counted(*args: Any) -> Any:
        for batch in real_batches(*args):
            state["read"] += 1
            read_ahead.append(state["read"] - state["decoded"])
            yield batch

    monkeypatch.setattr(decode, "decode_into", slow)
    monkeypatch.setattr(tree, "_batches", counted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    files = {
        f"{split}/{label}/{n}.png": png() for split in ("train", "test") for label in "ab" for n in range(25)
    }
    load(str(write_tar(tmp_path / "x.tar", files)), cache_dir=tmp_path)
    assert state["read"] == 100 and max(read_ahead) <= 7


def test_the_real_archive_begins_as_it_should(shared_data: Path) -> None:
    """The first members of the JPEG archive, without decoding 60,000 of them."""
    source = sources.open_source(shared_data / "cifar10-jpeg.tar.xz")
    assert source.key() == "f3b2857085406949e481708d22b3da2269769e6343208246c7cf5a722c237a03"
    members = source.read(lambda name: tree.place_of(name) is not None)
    name, data = next(members)
    place = tree.place_of(name)
    assert place is not None and place.split in ("train", "test") and place.prefix == ""
    assert decode.decode(data, name).shape == (32, 32, 3)
    members.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".tar.bz2"])
def test_a_damaged_or_cut_archive_never_loses_images_in_silence(
    suffix: str, tmp_path: Path, read: Callable[..., Splits]
) -> None:
    whole = write_tar(tmp_path / "a.tar", small_tree())
    content = whole.read_bytes()
    header = content.index(b"test/zebra/1.png")
    opener = {".tar": bytes, ".tar.gz": gzip.compress, ".tar.xz": lzma.compress, ".tar.bz2": bz2.compress}[
        suffix
    ]
    flipped = content[:header] + bytes([content[header] ^ 4]) + content[header + 1 :]
    for number, damaged in enumerate((flipped, content[:header], content[: header + 100])):
        path = tmp_path / f"b{number}{suffix}"
        path.write_bytes(opener(damaged))
        with pytest.raises(KdError, match="damaged or cut short"):
            read(path)
    (tmp_path / f"c{suffix}").write_bytes(opener(content))
    assert len(read(tmp_path / f"c{suffix}").test) == 2


def test_the_checksum_behind_the_last_image_is_read(tmp_path: Path, read: Callable[..., Splits]) -> None:
    path = tmp_path / "a.tar.gz"
    content = bytearray(gzip.compress(write_tar(tmp_path / "a.tar", small_tree()).read_bytes()))
    content[-6] ^= 1  # of the CRC, before the length
    path.write_bytes(content)
    with pytest.raises(KdError, match=r"a\.tar\.gz"):
        read(path)


def test_numbered_classes_are_sorted_as_numbers(tmp_path: Path, read: Callable[..., Splits]) -> None:
    names = [str(number) for number in range(12)]
    files = {f"{split}/{name}/1.png": png((int(name), 0, 0)) for split in ("train", "test") for name in names}
    splits = read(write_folder(tmp_path / "set", files))
    assert splits.train.classes == tuple(names)
    assert splits.train.images[:, 0, 0, 0].tolist() == splits.train.labels.tolist() == list(range(12))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_error(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in "ab":
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                Image.fromarray(random.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(
                    folder / f"{number}.bmp"
                )
    code = (
        "import sys; from pathlib import Path; from kdcli.data import load; from kdcli.base.errors import KdError\n"
        "try: load('set', cache_dir=Path('full'))\n"
        "except KdError as error: print(error.message)"
    )
    # 3.8 MB of pixels are written twice: once as they come, once in their order
    script = (
        f'mkdir full && mount -t tmpfs -o size=$1 none full && exec {shlex.quote(sys.executable)} -c "$2"'
    )
    for size in ("2m", "6m"):
        shutil.rmtree(tmp_path / "full", ignore_errors=True)
        done = subprocess.run(
            ["unshare", "-m", "bash", "-c", script, "bash", size, code],
            cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        if "mount" in done.stderr or "unshare" in done.stderr:
            pytest.skip(f"cannot mount here: {done.stderr.strip()[:80]}")
        assert done.returncode == 0, done
        assert "No space left on device" in done.stdout


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


def test_packed_bytes_of_good_images_are_what_they_always_were(
    tmp_path: Path, read: Callable[..., Splits]
) -> None:
    """Worked out by hand: the fingerprint's words, labels and pixels of the small tree."""
    found = read(write_tar(tmp_path / "x.tar", small_tree()))
    pixels = np.array([[1, 0, 0], [2, 0, 0], [3, 0, 0]], np.uint8)[:, None, None].repeat(4, 1).repeat(6, 2)
    assert found.train.images.tobytes() == pixels.tobytes()
    words = repr(((3, 4, 6, 3), ("ape house", "zebra"))).encode()
    content = words + np.array([0, 1, 1], "<i8").tobytes() + pixels.tobytes()
    assert found.train.fingerprint == hashlib.sha256(content).hexdigest()


def test_large_images_are_converted_in_strips_to_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    colours = Image.fromarray(random.integers(0, 256, (61, 47, 4), dtype=np.uint8))
    wide = Image.fromarray(random.integers(0, 65536, (61, 47), dtype=np.uint16))
    for image in (
        colours,
        colours.convert("RGB"),
        colours.convert("RGB").convert("P"),
        colours.convert("LA"),
        wide,
    ):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        monkeypatch.setattr(decode, "STRIP_PIXELS", 1 << 20)
        whole = decode.decode(stream.getvalue(), "x")
        monkeypatch.setattr(decode, "STRIP_PIXELS", 100)
        assert np.array_equal(decode.decode(stream.getvalue(), "x"), whole) and whole.shape == (61, 47, 3)


def test_large_images_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 24)
    held, most = [0], [0]
    budget = decode.MemoryBudget()

    def keep(pixels: np.ndarray) -> None:
        held[0] += pixels.size // 3
        most[0] = max(most[0], held[0])
        time.sleep(0.02)
        held[0] -= pixels.size // 3

    threads = [threading.Thread(target=decode.decode_into, args=(keep, png(), "x", budget)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most[0] == 24


def test_scans_of_a_jpeg_are_counted() -> None:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for options, count in (({}, 1), ({"progressive": True}, 10)):
        stream = io.BytesIO()
        image.save(stream, "JPEG", icc_profile=b"\xff\xda" * 500, restart_marker_blocks=1, **options)
        data = stream.getvalue()
        assert decode.scans(data) == count
        last = data[data.rindex(b"\xff\xda") : -2]
        assert decode.scans(data[:-2] + last * 5 + b"\xff\xd9" + b"\xff\xda" * 9) == count + 5
    assert decode.scans(b"\xff\xd8") == decode.scans(b"") == 0


def test_a_folder_of_endless_names_is_bounded(
    tmp_path: Path, read: Callable[..., Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, write in (("set", write_folder), ("x.tar", write_tar), ("x.zip", write_zip)):
        monkeypatch.setattr(sources, "MAX_FILES", 20)
        path = write(tmp_path / name, small_tree())
        assert len(read(path, cache_dir=tmp_path / "one").test) == 2 if name != "set" else True
        monkeypatch.setattr(sources, "MAX_FILES", 4)
        with pytest.raises(KdError, match="holds more than 4 files"):
            read(path)


def test_xz_of_several_streams(tmp_path: Path, read: Callable[..., Splits]) -> None:
    whole = write_tar(tmp_path / "x.tar", small_tree()).read_bytes()
    parts = lzma.compress(whole[:3000]) + lzma.compress(whole[3000:])
    (tmp_path / "y.tar.xz").write_bytes(parts)
    assert len(read(tmp_path / "y.tar.xz").train) == 3
