"""Folders and archives: what is read, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcli.base.errors import KdError
from kdcli.data import decode, sources, tree
from kdcli.data.images import Splits
from tests.data.helpers import Files, png, small_tree, write_folder, write_tar, write_zip


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


def test_folders_that_kd_writes_are_no_part_of_the_working_folder(
    tmp_path: Path, read: Callable[..., Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_folder(tmp_path / "set", small_tree())
    monkeypatch.chdir(path)
    before = sources.open_source(Path()).key()
    for folder in ("cache", "runs/a"):
        (path / folder).mkdir(parents=True)
        (path / folder / "curves.png").write_bytes(png((1, 2, 3)))
    assert sources.open_source(Path()).key() == before
    assert len(read(Path()).train) == 3
    monkeypatch.chdir(tmp_path)
    assert sources.open_source(path).key() != before


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
    monkeypatch.setattr(sources, "EXPANSION_FLOOR", 1 << 20)
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


def test_too_little_memory_is_named() -> None:
    with pytest.raises(KdError, match="not enough memory"), sources.reader_errors(KdError):
        raise MemoryError


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


def test_an_encrypted_zip_is_named_as_such(tmp_path: Path, read: Callable[..., Splits]) -> None:
    data = bytearray(write_zip(tmp_path / "x.zip", small_tree()).read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:  # the flag of each entry of the directory
        data[at + 8] |= 1
        at = data.find(b"PK\x01\x02", at + 4)
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(KdError, match=r"x\.zip .*train/zebra/b\.PNG.* is encrypted"):
        read(tmp_path / "x.zip")


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
