"""Malicious archives and folders of images."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from tests.hostile.pickles import Calls

Write = Callable[[Path], None]


def png(colour: int = 1) -> bytes:
    """A good image."""
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (colour, 2, 3)).save(stream, "PNG")
    return stream.getvalue()


def good() -> dict[str, bytes]:
    """The smallest good data set."""
    return {f"{split}/{name}/1.png": png() for split in ("train", "test") for name in "ab"}


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, target: str = "") -> tarfile.TarInfo:
    """A header."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info


def header(name: bytes, kind: bytes, size: bytes) -> bytes:
    """A raw header with a size field of one's choice."""
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0"))
    block += b"00000000000\0" + b" " * 8 + kind + bytes(100) + b"ustar\x0000" + bytes(247)
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    """To whole blocks."""
    return data + bytes(-len(data) % 512)


def tar(files: dict[str, bytes], first: bytes = b"", last: bytes = b"") -> bytes:
    """An archive with raw blocks before and after its files."""
    body = b"".join(
        header(name.encode(), b"0", b"%011o" % len(data)) + padded(data) for name, data in files.items()
    )
    return first + body + last + bytes(1024)


def pax(text: bytes, kind: bytes = b"x") -> bytes:
    """An extended header."""
    return header(b"pax", kind, b"%011o" % len(text)) + padded(text)


def record(key: bytes, value: bytes) -> bytes:
    """`length key=value` of an extended header."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip file."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def patched(content: bytes, at: int, new: bytes, directory: bool = True) -> bytes:
    """Bytes of the first local header and of the first entry of the directory changed alike."""
    changed = bytearray(content)
    changed[at : at + len(new)] = new
    if directory:
        where = content.index(b"PK\x01\x02") + at + 2
        changed[where : where + len(new)] = new
    return bytes(changed)


@cache
def overlapping(count: int, kernel: int) -> bytes:
    """A zip file whose `count` entries are all the same `kernel` bytes of zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packer.compress(bytes(kernel)) + packer.flush()
    crc = zlib.crc32(bytes(kernel))
    about = struct.pack("<HHHHHIII", 20, 0, 8, 0, 0, crc, len(body), kernel)
    name = b"train/a/x.txt"
    local = b"PK\x03\x04" + about + struct.pack("<HH", len(name), 0) + name
    rest = about + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0) + name
    directory = (b"PK\x01\x02" + struct.pack("<H", 20) + rest) * count
    start = len(local) + len(body)
    end = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, count, count, len(directory), start, 0)
    return local + body + directory + end


def zeros(pack: Callable[[bytes], bytes], megabytes: int) -> bytes:
    """Streams of compressed zeros, one after the other."""
    return pack(bytes(1 << 24)) * (megabytes // 16)


def xz_that_asks_for(dictionary_code: int) -> bytes:
    """A good .xz whose block header asks for another dictionary (code 40: 4 GiB)."""
    whole = bytearray(lzma.compress(tar(good()), check=lzma.CHECK_NONE))
    size = (whole[12] + 1) * 4
    at = whole.index(b"\x21\x01", 12)  # the filter LZMA2 with one byte of properties
    whole[at + 2] = dictionary_code
    whole[12 + size - 4 : 12 + size] = struct.pack("<I", zlib.crc32(whole[12 : 12 + size - 4]))
    return bytes(whole)


def bombs(canary: Path) -> dict[str, bytes]:
    """Archives by file name; each must end in a KdError."""
    files = good()
    longest = b"%011o" % (8 << 30)
    whole, gz = tar(files), gzip.compress(tar(files))
    archive = zipped(files)
    eocd = archive.rindex(b"PK\x05\x06")
    start = archive.index(b"PK\x01\x02")
    wide = (
        b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 2**40, 2**40, 2**62, start)
        + b"PK\x06\x07" + struct.pack("<IQI", 0, eocd, 1)
    )  # fmt: skip
    many_numbers = b"%d\n" % (1 << 40) + b"0\n" * (1 << 21)
    sparse = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0")
    return {
        "dot-dot.tar": tar({"../train/a/1.png": png(), **files}),
        "dot-dot within.tar": tar({"train/../../a/1.png": png(), **files}),
        "absolute.tar": tar({"/etc/train/a/1.png": png(), **files}),
        "dot-dot by pax.tar": tar(files, pax(record(b"path", b"../../train/a/9.png"))),
        "dot-dot by long name.tar": tar(files, header(b"L", b"L", b"%011o" % 20) + padded(b"../../../train/a/1\0\0")),
        "dot-dot.zip": zipped({"../train/a/1.png": png(), **files}),
        "absolute.zip": zipped({"/train/a/1.png": png(), **files}),
        "backslash.zip": zipped({"..\\train\\a\\1.png": png(), **files}),
        "drive.zip": zipped({"C:/train/a/1.png": png(), **files}),
        "only links.tar": tar({}, b"".join(header(b"train/a/1.png", kind, b"0") for kind in (b"1", b"2"))),
        "only devices.tar": tar({}, b"".join(header(b"train/a/1.png", kind, b"0") for kind in (b"3", b"4", b"6"))),
        "size of 8 GiB.tar": header(b"train/a/1.png", b"0", longest) + bytes(2048),
        "negative size.tar": header(b"train/a/1.png", b"0", b"\xff" * 12) + bytes(2048),
        "size of 2**80.tar": header(b"train/a/1.png", b"0", b"\x80\x01" + bytes(10)) + bytes(2048),
        "pax of 8 GiB.tar": header(b"x", b"x", longest) + bytes(2048),
        "pax of zeros.tar.gz": header(b"x", b"x", b"%011o" % (1 << 30)) + bytes(2048),
        "long name of 1 GiB.tar": header(b"L", b"L", b"%011o" % (1 << 30)) + bytes(2048),
        "pax size of 2**70.tar": tar(files, pax(record(b"size", b"1180591620717411303424"))),
        "pax size negative.tar": tar(files, pax(record(b"size", b"-512"))),
        "pax of digits.tar": tar(files, pax(b"9" * 60_000)),
        "global pax of digits.tar": tar(files, pax(b"9" * 60_000, b"g")),
        "pax after pax.tar": tar(files, pax(record(b"comment", b"x")) * 5_000),
        "sparse of a trillion parts.tar.gz": gzip.compress(
            tar(files, pax(sparse) + header(b"train/a/2.png", b"0", b"%011o" % len(many_numbers)) + padded(many_numbers))
        ),
        "cut.tar": whole[:700], "cut in a header.tar": whole[:1100], "flipped.tar": whole[:1030] + b"\7" + whole[1031:],
        "cut.tar.gz": gz[:-30], "sum.tar.gz": gz[:-8] + b"\0\0\0\0" + gz[-4:], "rubbish.tar.gz": gz[:40] + gz[60:],
        "cut.tar.xz": lzma.compress(whole)[:-20], "cut.tar.bz2": bz2.compress(whole)[:-10],
        "name of a megabyte.gz": b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (1 << 20) + b"\0" + gz[10:-20],
        "zeros.tar.gz": zeros(lambda data: gzip.compress(header(b"junk", b"0", b"%011o" % (1 << 33)) + data), 560),
        "a dictionary of 4 GiB.tar.xz": xz_that_asks_for(40),
        "overlapping.zip": overlapping(64, 16 << 20),
        "a member of 300 MB.zip": overlapping(1, 257 << 20),
        "overstated.zip": patched(archive, 22, struct.pack("<I", 10_000_000)),
        "encrypted.zip": patched(archive, 6, b"\x01\x00"),
        "unknown compression.zip": patched(archive, 8, b"\x63\x00"),
        "lzma.zip": zipped(files, zipfile.ZIP_LZMA),
        "cut.zip": archive[:-10], "wrong sum.zip": patched(archive, 14, b"\0\0\0\0"),
        "zip64 of a million million.zip": archive[:eocd] + wide + archive[eocd:],
        "a directory elsewhere.zip": archive[: eocd + 16] + b"\xff\xff\xff\x7f" + archive[eocd + 20 :],
        "a directory of 3 GiB.zip": archive[: eocd + 12] + b"\0\0\0\xc0" + archive[eocd + 16 :],
        "only an end.zip": b"PK\x05\x06" + bytes(18),
        "a pickle.zip": pickle.dumps(Calls(os.system, f"touch {canary}")),
        "control characters.tar": tar({f"{split}/a\x1b[31m/1.png": png() for split in ("train", "test")}),
        "a broken image.tar": tar({**files, "train/a/2.png": png()[:30]}),
        "nothing.tar": b"", "zeros.tar": bytes(10_240),
    }  # fmt: skip


def acceptable() -> dict[str, bytes]:
    """Odd archives that may be read or refused, by file name, but must not do harm."""
    files = good()
    archive = zipped(files)
    first = archive.index(b"train/a/1.png")
    return {
        "a dictionary of 1.5 GiB.tar.xz": xz_that_asks_for(37),  # reserved, and used as far as there is data
        "links beside images.tar": tar(files, header(b"train/a/9.png", b"2", b"0") + header(b"train/b/9.png", b"6", b"0")),
        "names that differ in case.zip": zipped({**files, "train/a/1.PNG": png(9), "Train/a/1.png": png(7)}),
        "the same name twice.tar": tar({**files}, tar({"train/a/1.png": png(200)})[:-1024]),
        "NUL in a name.zip": archive.replace(b"train/a/1.png", b"train/a/1\0png"),
        "NUL by pax.tar": tar(files, pax(record(b"path", b"train/a/\0/1.png"))),
        "not UTF-8.tar": tar(files, header(b"train/a/\xff\xfe.png", b"0", b"%011o" % len(png())) + padded(png())),
        "not UTF-8.zip": archive[:first] + b"train/a/\xff\xfe\xfd" + archive[first + 11 :],
        "a name that is empty.zip": archive.replace(b"train/a/1.png", b"\0rain/a/1.png"),
        "a comment.zip": archive[:-2] + b"\x05\x00hello",
        "something before.zip": archive + archive,
        "rubbish behind.tar": tar(files) + b"x" * 512,
        "two streams.tar.gz": gzip.compress(tar(files)[:2000]) + gzip.compress(tar(files)[2000:]),
    }  # fmt: skip


CIFAR = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


def cifar(batch: object = None, names: tuple[str, ...] = CIFAR, **more: bytes) -> bytes:
    """cifar-10-python.tar.gz, with another value in every batch."""
    value = batch if batch is not None else {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
    content = pickle.dumps(value, 2)
    return gzip.compress(tar({**{f"cifar-10-batches-py/{name}": content for name in names}, **more}), 1)


def cifar_bombs(canary: Path) -> dict[str, bytes]:
    """Each must end in a KdError."""
    folder = "cifar-10-batches-py/"
    black = np.zeros((2, 3072), np.uint8)
    links = b"".join(
        header((folder + name).encode(), kind, b"0")
        for name, kind in zip(CIFAR, (b"1", b"2", b"3", b"4", b"6", b"2"), strict=False)
    )
    return {
        "calls": cifar({"data": Calls(os.system, f"touch {canary}")}),
        "links and devices": gzip.compress(tar({}, links)),
        "a batch missing": cifar(names=CIFAR[:4]),
        "other names": cifar(names=("data_batch_7", "train")),
        "no dict": cifar([1, 2]),
        "no labels": cifar({"data": black}),
        "labels of text": cifar({"data": black, "labels": ["a", "b"]}),
        "labels beyond": cifar({"data": black, "labels": [0, 2**62]}),
        "negative labels": cifar({"data": black, "labels": [0, -1]}),
        "floats": cifar({"data": black.astype(float), "labels": [0, 1]}),
        "another width": cifar({"data": np.zeros((2, 9), np.uint8), "labels": [0, 1]}),
        "no images": cifar({"data": np.zeros((0, 3072), np.uint8), "labels": []}),
        "sparse": gzip.compress(tar({}, b"".join(header((folder + n).encode(), b"S", b"0") for n in CIFAR))),
        "pickle bomb": cifar({"data": black, "labels": {10**30: 1}}),
        "cut": cifar()[:-40],
        "meta of numbers": cifar(**{folder + "batches.meta": pickle.dumps({"label_names": list(range(10))})}),
    }


def folders(root: Path) -> dict[str, tuple[Path, bool]]:
    """Folders by name, and whether they are to be read (else refused)."""

    def made(name: str, files: dict[str, bytes] | None = None) -> Path:
        for file, data in (good() if files is None else files).items():
            (root / name / file).parent.mkdir(parents=True, exist_ok=True)
            (root / name / file).write_bytes(data)
        return root / name

    found: dict[str, tuple[Path, bool]] = {}
    fifo = made("a fifo called x.png")
    os.mkfifo(fifo / "train/a/x.png")
    found["a fifo called x.png"] = fifo, True
    named = made("a folder called x.png", {**good(), "train/a/x.png/y.png": png()})
    found["a folder called x.png"] = named, True
    outside = root / "outside.png"
    outside.write_bytes(png())
    linked = made("links")
    (linked / "train/a/out.png").symlink_to(outside)  # a regular file: it is read
    (linked / "train/a/zero.png").symlink_to("/dev/zero")
    (linked / "train/a/self.png").symlink_to("self.png")
    (linked / "train/a/gone.png").symlink_to("nowhere")
    (linked / "train/up").symlink_to("..")
    (linked / "test/again").symlink_to(linked, target_is_directory=True)
    found["links"] = linked, True
    deep = made("deep")
    at = os.open(deep / "train", os.O_RDONLY)
    for _ in range(1_100):  # deeper than the recursion limit
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    found["deep"] = deep, True
    found["an empty image"] = made("an empty image", {**good(), "train/a/0.png": b""}), False
    ppm = io.BytesIO()
    Image.new("L", (3, 3)).save(ppm, "PPM")
    for name, data in {
        "PPM": ppm.getvalue(),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }.items():
        found[f"{name} called png"] = made(f"{name} called png", {**good(), "train/a/2.png": data}), False
    found["nothing"] = made("nothing", {"readme": b""}), False
    return found
