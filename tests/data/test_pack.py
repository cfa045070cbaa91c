"""The cache of decoded data sets."""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Event, Note, Progress
from kdcli.data import decode, load, pack, read_images
from kdcli.data.images import Splits
from tests.data.helpers import WRITERS, png, small_tree, write_folder, write_tar
from tests.helpers import ROOT, disk_calls


@pytest.mark.parametrize("kind", WRITERS)
def test_second_load_decodes_nothing(
    kind: str, tmp_path: Path, read: Callable[..., Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = WRITERS[kind](tmp_path / kind, small_tree())
    first = read(path)
    monkeypatch.setattr(decode, "decoded", lambda *_: pytest.fail("decoded again"))
    second = read(path)
    assert np.array_equal(first.train.images, second.train.images)
    with pytest.raises(pytest.fail.Exception):
        read(path, image_size=5)


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


def test_crop_is_part_of_a_pack(tmp_path: Path, read: Callable[..., Splits]) -> None:
    """Also where images have the size already; test and unlabelled images are cropped alike."""
    random = np.random.default_rng(0)
    stored = {name: random.integers(0, 256, (8, 8, 3), dtype=np.uint8) for name in small_tree()}
    for name, pixels in stored.items():
        place = tmp_path / "set" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place, "PNG")
    middle = {  # 16 pixels a side, of which the middle 8 are kept
        name: np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR))[4:12, 4:12]
        for name, pixels in stored.items()
    }
    whole, cropped, again = (read(tmp_path / "set", image_size=8, resize=side) for side in (None, 16, 8))
    for name, part in (("train/zebra/b.PNG", "train"), ("test/zebra/1.png", "test")):
        assert np.array_equal(getattr(whole, part).images[-1], stored[name])
        assert np.array_equal(getattr(cropped, part).images[-1], middle[name])
        assert np.array_equal(getattr(again, part).images[-1], stored[name])
        assert (getattr(whole, part).resize, getattr(cropped, part).resize) == (0, 16)
    (tmp_path / "more").mkdir()
    Image.fromarray(stored["train/zebra/b.PNG"][::-1]).save(tmp_path / "more" / "1.png")
    added = read(tmp_path / "set", image_size=8, resize=16, unlabelled=tmp_path / "more").unlabelled
    assert added is not None
    assert np.array_equal(added.images[0], middle["train/zebra/b.PNG"][::-1])
    assert np.array_equal(
        read(tmp_path / "set", fit_to=(8, 8, 3), resize=16).train.images, cropped.train.images
    )
    for size in (None, 17):
        with pytest.raises(UsageError, match="--resize 16 requires square images of at most 16 pixels"):
            read(tmp_path / "set", image_size=size, resize=16)


def test_crop_of_a_named_data_set(tmp_path: Path) -> None:
    whole, cropped = (
        load("digits", cache_dir=tmp_path, image_size=8, resize=side).test.images for side in (None, 10)
    )
    middle = (0.8, 0.8, 7.2, 7.2)  # pixels 1 … 9 of 10
    expected = Image.fromarray(whole[0, :, :, 0]).resize((8, 8), Image.Resampling.BILINEAR, middle)
    assert np.array_equal(cropped[0, :, :, 0], np.asarray(expected))


def _entry(cache: Path) -> Path:
    (entry,) = (cache / "data").iterdir()
    return entry


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as handle:
        handle.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        handle.write(content)


@pytest.mark.parametrize(
    "damage",
    ["meta gone", "meta cut", "class", "short", "gone", "labels", "label", "flipped", "zeros", "type"],
)
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
    elif damage == "class":
        meta.write_text(meta.read_text().replace("zebra", "zebrA"))
    elif damage == "label":
        overwrite(entry / "test-labels.npy", -8, b"\0")
    elif damage == "flipped":
        overwrite(entry / "train-images.npy", -100, bytes(value ^ 1 for value in good.tobytes()[-100:-60]))
    elif damage == "zeros":
        overwrite(entry / "test-images.npy", -144, bytes(144))
    elif damage == "type":
        header = (entry / "train-images.npy").read_bytes()[:128]
        overwrite(entry / "train-images.npy", 0, header.replace(b"|u1", b"|i1"))
    elif damage == "gone":
        (entry / "test-labels.npy").unlink()
    else:
        np.save(entry / "train-labels.npy", np.load(entry / "train-labels.npy")[:-1])
    seen: list[Event] = []
    again = read(path, on_event=seen.append)
    assert np.array_equal(again.train.images, good) and again.train.images.dtype == np.uint8
    assert again.test.images[:, 0, 0, 0].tolist() == [4, 5] and again.test.labels.tolist() == [0, 1]
    assert again.train.classes == ("ape house", "zebra")
    assert any(isinstance(event, Progress) for event in seen)
    assert [event.text for event in seen if isinstance(event, Note)] == [
        f"the packed images in {entry} are damaged and are packed anew"
    ]
    assert sorted(p.name for p in _entry(tmp_path / "cache").iterdir()) == [
        "meta.json", "test-images.npy", "test-labels.npy", "test-names.npy", "train-images.npy", "train-labels.npy",
        "train-names.npy",
    ]  # fmt: skip


def test_entry_that_cannot_be_read_now_is_kept(
    tmp_path: Path, read: Callable[..., Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    path = write_tar(tmp_path / "x.tar", small_tree())
    read(path)
    entry = _entry(tmp_path / "cache")
    with (
        monkeypatch.context() as patched,
        pytest.raises(KdError, match=r"cannot read .*: Too many open files"),
    ):
        patched.setattr(np, "load", load)
        read(path)
    assert entry.is_dir()
    read(path)


def test_a_changed_folder_is_packed_anew(tmp_path: Path, read: Callable[..., Splits]) -> None:
    path = write_folder(tmp_path / "set", small_tree())
    first = read(path)
    write_folder(path, {"train/zebra/a.png": png((200, 0, 0))})
    os.utime(path / "train/zebra/a.png", ns=(1, 1))
    assert read(path).train.images[1, 0, 0, 0] == 200 and first.train.images[1, 0, 0, 0] == 2


def test_a_changed_image_whose_old_time_is_restored_is_packed_anew(
    tmp_path: Path, read: Callable[..., Splits]
) -> None:
    path = write_folder(tmp_path / "set", {name: png((9, 9, 9), format="BMP") for name in small_tree()})
    image = path / "train/zebra/a.png"
    before, old = image.stat(), read(path).train.images[1].tolist()
    time.sleep(0.02)  # the clock of a file system may tick every 10 ms
    overwrite(image, -3, b"\7")  # the last byte before the padding of its row
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert image.stat().st_size == before.st_size and image.stat().st_mtime_ns == before.st_mtime_ns
    assert read(path).train.images[1].tolist() != old


def test_a_pack_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, read: Callable[..., Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "x.tar", small_tree())
    calls = disk_calls(monkeypatch)
    read(path)
    entry = _entry(tmp_path / "cache")
    named = calls.index(("rename", entry.name))
    synced = {name for call, name in calls[:named] if call == "sync"}
    assert {file.name for file in entry.iterdir()} <= synced and len(list(entry.iterdir())) == 7
    assert calls[named - 1][0] == "sync" and calls[named - 1][1].startswith(".kd-")  # the scratch folder
    assert calls[named + 1 :] == [("sync", "data")]


def test_an_entry_is_verified_once_a_process(
    tmp_path: Path, read: Callable[..., Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "x.tar", small_tree())
    read(path)
    monkeypatch.setattr(pack, "_sums", lambda *_: pytest.fail("verified again"))
    read(path)


def test_each_block_of_a_large_pack_is_verified(
    tmp_path: Path, read: Callable[..., Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "_BLOCK", 100)  # four for 128 + 216 bytes
    path = write_tar(tmp_path / "x.tar", small_tree())
    good = np.array(read(path).train.images)
    for offset in (130, 199, 200, 343):
        overwrite(_entry(tmp_path / "cache") / "train-images.npy", offset, b"\xff")
        assert np.array_equal(read(path).train.images, good)


def test_packed_pixels_and_fingerprint(tmp_path: Path, read: Callable[..., Splits]) -> None:
    """Worked out by hand: the fingerprint's words, labels and pixels of the small tree."""
    found = read(write_tar(tmp_path / "x.tar", small_tree()))
    pixels = np.array([[1, 0, 0], [2, 0, 0], [3, 0, 0]], np.uint8)[:, None, None].repeat(4, 1).repeat(6, 2)
    assert found.train.images.tobytes() == pixels.tobytes()
    words = repr(((3, 4, 6, 3), ("ape house", "zebra"))).encode()
    content = words + np.array([0, 1, 1], "<i8").tobytes() + pixels.tobytes()
    assert found.train.fingerprint == hashlib.sha256(content).hexdigest()


@pytest.mark.slow
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


def test_batches_in_flight_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading waits for decoding, so that an archive is never held in memory whole."""
    monkeypatch.setattr(read_images, "BATCH_FILES", 1)
    read_ahead: list[int] = []
    state = {"read": 0, "decoded": 0}
    real, real_batches = decode.decoded, read_images._batches

    def slow(*args: Any) -> Any:
        time.sleep(0.002)
        state["decoded"] += 1
        return real(*args)

    def counted(*args: Any) -> Any:
        for batch in real_batches(*args):
            state["read"] += 1
            read_ahead.append(state["read"] - state["decoded"])
            yield batch

    monkeypatch.setattr(decode, "decoded", slow)
    monkeypatch.setattr(read_images, "_batches", counted)
    monkeypatch.setattr(read_images, "cpu_count", lambda: 2)
    files = {
        f"{split}/{label}/{n}.png": png() for split in ("train", "test") for label in "ab" for n in range(25)
    }
    load(str(write_tar(tmp_path / "x.tar", files)), cache_dir=tmp_path)
    assert state["read"] == 100 and max(read_ahead) <= 7
