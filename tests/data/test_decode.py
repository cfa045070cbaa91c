"""Image files become uint8 RGB pixels."""

from __future__ import annotations

import io
import struct
import threading
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional as F

from kdcli.base.errors import KdError
from kdcli.data import decode
from tests.data.helpers import png


def test_resize_is_antialiased() -> None:
    """A chessboard of single pixels shrinks to grey, not to one of its colours."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 200).astype(np.uint8)[..., None]
    assert abs(decode.resize(board, 8).astype(int) - 100).max() <= 8


def raw_png(bits: int, kind: int, row: bytes, transparent: tuple[int, ...]) -> bytes:
    """A PNG (4, 6) of equal rows, with a tRNS chunk: kind 0 is grey, 2 is colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 6, 4, bits, kind, 0, 0, 0)
    parts = [
        chunk(b"IHDR", head),
        chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)),
        chunk(b"IDAT", zlib.compress((b"\0" + row) * 4)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "shape", [(256, 256), (500, 500), (37, 37), (224, 224), (301, 224), (90, 400), (401, 300), (3, 40)]
)
@pytest.mark.parametrize("channels", [3, 1])
def test_resize_with_crop_is_that_of_torchvision(shape: tuple[int, int], channels: int) -> None:
    """To one level; to the bit where the part of the image that is resized has exact edges."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, channels), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels)
    for full in (256, 257, 224):
        wanted = F.center_crop(F.resize(image, [full], antialias=True), [224, 224])
        found = decode.resize(pixels, 224, full)
        difference = found.astype(int) - np.asarray(wanted).reshape(224, 224, channels)
        assert abs(difference).max() <= (0 if shape[0] == shape[1] and full == 256 else 1)


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
        (png((9, 8, 7), format="TIFF"), (9, 8, 7)),
        (png((9, 8, 7, 0), mode="RGBA", format="TIFF", compression="tiff_lzw"), (255, 255, 255)),
        (png(257 * 130, mode="I;16", format="TIFF"), (130, 130, 130)),
        (png((9, 8, 7), format="GIF"), (9, 8, 7)),
        (png(0, mode="P", format="GIF", transparency=0), (255, 255, 255)),
        (png(257 * 130, mode="I;16", transparency=257 * 130), (255, 255, 255)),
        (png(257 * 130, mode="I;16", transparency=257 * 131), (130, 130, 130)),
        (raw_png(2, 0, b"\x1b" * 2, (1,)), (0, 0, 0)),  # grey of two bits, 0 1 2 3: 0 85 170 255
        (raw_png(2, 0, b"\x5b" * 2, (1,)), (255, 255, 255)),
        (raw_png(4, 0, b"\x8f" * 3, (8,)), (255, 255, 255)),
        (raw_png(4, 0, b"\x8f" * 3, (9,)), (136, 136, 136)),
        (raw_png(8, 0, b"\x08" * 6, (8,)), (255, 255, 255)),
        (raw_png(16, 2, struct.pack(">3H", 1000, 2000, 3000) * 6, (1000, 2000, 3000)), (255, 255, 255)),
        (raw_png(16, 2, struct.pack(">3H", 1000, 2000, 3000) * 6, (1000, 2000, 4000)), (3, 7, 11)),
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


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
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


@pytest.mark.parametrize("format_name", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_frame_counts(format_name: str) -> None:
    stream = io.BytesIO()
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    first.save(
        stream,
        format_name,
        save_all=True,
        append_images=[second],
        **{"lossless": True} if format_name == "WEBP" else {},
    )
    assert decode.decode(stream.getvalue(), "x")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("values", [np.float32([[0, 0.5]]), np.int32([[0, 70_000]])])
def test_values_of_unknown_range_are_refused(values: np.ndarray[Any, Any]) -> None:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF")
    with pytest.raises(KdError, match=r"image x\.tif has values of 32 bits"):
        decode.decode(stream.getvalue(), "x.tif")


def test_a_git_lfs_pointer_is_named_as_such() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    with pytest.raises(KdError, match=r"image a/x\.png is a Git LFS pointer") as caught:
        decode.decode(pointer, "a/x.png")
    assert "git lfs pull" in caught.value.hint


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(0, (5000, 5000), "1")
    monkeypatch.setattr(decode, "MAX_PIXELS", 24_000_000)
    with pytest.raises(KdError, match=r"x\.png has more than 24 million pixels"):
        decode.decode(data, "x.png")


def test_large_images_are_decoded_and_used_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LARGE_PIXELS", 23)
    held, most, real = [0], [0], decode._to_rgb

    def counted(image: Image.Image) -> Image.Image:
        held[0] += image.width * image.height
        most[0] = max(most[0], held[0])
        return real(image)

    def use() -> None:
        with decode.decoded(png(), "x"):
            time.sleep(0.02)  # such as resizing and storing
            held[0] -= 24

    monkeypatch.setattr(decode, "_to_rgb", counted)
    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most[0] == 24


def test_a_jpeg_of_many_scans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png((1, 2, 3), (64, 64), format="JPEG", progressive=True)
    assert decode.decode(data, "x").shape == (64, 64, 3)
    monkeypatch.setattr(decode, "MAX_SCAN_PIXELS", 4 * 64 * 64)
    buffer = io.BytesIO()
    image = Image.new("RGB", (64, 64))
    image.save(buffer, "MPO", save_all=True, append_images=[image], progressive=True)
    for scans, content in ((10, data), (20, buffer.getvalue())):
        with pytest.raises(KdError, match=f"x has {scans} scans"):
            decode.decode(content, "x")
