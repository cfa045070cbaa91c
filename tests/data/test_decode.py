"""Image files become uint8 RGB pixels."""

from __future__ import annotations

import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from kdcli.base.errors import KdError
from kdcli.data import decode
from tests.data.helpers import png


def test_resize_is_antialiased() -> None:
    """A chessboard of single pixels shrinks to grey, not to one of its colours."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 200).astype(np.uint8)[..., None]
    assert abs(decode.resize(board, 8).astype(int) - 100).max() <= 8


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


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(0, (5000, 5000), "1")
    monkeypatch.setattr(decode, "MAX_PIXELS", 24_000_000)
    with pytest.raises(KdError, match=r"x\.png has more than 24 million pixels"):
        decode.decode(data, "x.png")


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LARGE_PIXELS", 23)
    held, most, real = [0], [0], decode._to_rgb

    def slow(image: Image.Image) -> Image.Image:
        held[0] += image.width * image.height
        most[0] = max(most[0], held[0])
        time.sleep(0.02)
        held[0] -= image.width * image.height
        return real(image)

    monkeypatch.setattr(decode, "_to_rgb", slow)
    threads = [threading.Thread(target=decode.decode, args=(png(), "x")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most[0] == 24


def test_a_jpeg_of_many_scans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png((1, 2, 3), (64, 64), format="JPEG", progressive=True)
    assert decode.decode(data, "x").shape == (64, 64, 3)
    monkeypatch.setattr(decode, "MAX_SCAN_PIXELS", 4 * 64 * 64)
    with pytest.raises(KdError, match="x has 10 scans"):
        decode.decode(data, "x")
