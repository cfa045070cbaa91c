"""Malicious image files."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, *more: bytes, depth: int = 8, kind: int = 2, data: bytes | None = None
) -> bytes:
    """A PNG with a header of one's choice."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = zlib.compress(bytes(1000)) if data is None else data
    parts = (chunk(b"IHDR", header), *more, chunk(b"IDAT", body), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """As a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def webp_of(width: int, height: int) -> bytes:
    """A WebP whose canvas is as large as one likes."""
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0"
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    small = saved(Image.new("RGB", (4, 4)), "WEBP")[12:]
    frame = bytes(6) + (3).to_bytes(3, "little") * 2 + bytes(4) + small
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def scans(count: int) -> bytes:
    """A JPEG of 25 million pixels that goes over them `count` times."""
    whole = saved(Image.new("L", (5000, 5000), 128), "JPEG", progressive=True)
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


def bmp(width: int, height: int, bits: int = 24, compression: int = 0, body: bytes = bytes(64)) -> bytes:
    """A BMP with a header of one's choice."""
    palette = bytes(4) * (256 if bits == 8 else 0)
    about = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 1, 1, 0, 0)
    offset = 14 + len(about) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + about + palette + body


def tiff(*entries: tuple[int, int, int, int], after: int = 0, body: bytes = bytes(64)) -> bytes:
    """A TIFF with one folder of entries (tag, type, count, value) and the offset of the next folder."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    offset = 8 + len(body)
    return (
        b"II*\0"
        + struct.pack("<I", offset)
        + body
        + struct.pack("<H", len(entries))
        + packed
        + struct.pack("<I", after)
    )


def tiff_of(
    width: int, height: int, *more: tuple[int, int, int, int], compression: int = 1, **options: object
) -> bytes:
    """A grey TIFF of one strip with a header of one's choice."""
    about = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
    ]
    strip = [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 64)]
    return tiff(*sorted([*about, *strip, *more]), **options)  # type: ignore[arg-type]


def gif_of(screen: tuple[int, int], frame: tuple[int, int], more: bytes = b"") -> bytes:
    """A GIF whose screen and first frame are as large as one likes."""
    palette = bytes(6)
    body = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\2\2\x44\1\0"
    return b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + palette + more + body + b";"


def bombs() -> dict[str, bytes]:
    """Each must end in a KdError."""
    small = Image.new("RGB", (8, 8), (9, 8, 7))
    whole = {kind: saved(small, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")}
    text = zlib.compress(bytes(20_000_000), 9)
    found = {
        "PNG of 4 million million pixels": png(2**31 - 1, 2**31 - 1),
        "PNG of 100 million pixels": png(10_000, 10_000),
        "PNG of 64 million pixels, truncated": png(8_000, 8_000),
        "PNG without width": png(0, 10),
        "PNG of an unknown kind": png(4, 4, kind=5),
        "PNG, wrong sum": whole["PNG"][:20] + b"\xff" + whole["PNG"][21:],
        "PNG, zTXt of 20 MB": png(4, 4, chunk(b"zTXt", b"a\0\0" + text)),
        "PNG, iTXt of 20 MB": png(4, 4, chunk(b"iTXt", b"a\0\1\0\0\0" + text)),
        "PNG, chunk of 4 GiB": whole["PNG"][:33] + b"\xff\xff\xff\xffzTXt" + whole["PNG"][33:],
        "PNG, Adobe's JPEG inside": png(4, 4, data=b"\xff\xd8\xff"),
        "WebP of 268 million pixels": webp_of(16_383, 16_383),
        "WebP of 2**48 pixels": webp_of(2**24, 2**24),
        "BMP of 2**62 pixels": bmp(2**31 - 1, 2**31 - 1),
        "BMP, negative": bmp(-5, 4),
        "BMP of 64 million pixels, no data": bmp(8_000, 8_000),
        "BMP of 0 bits": bmp(4, 4, bits=0),
        "BMP, packed, 64 million pixels": bmp(8_000, 8_000, 8, 1, b"\0\0" * 20),
        "JPEG of 2,000 scans": scans(2_000),
        "JPEG, 65,500 by 65,500": whole["JPEG"].replace(b"\x08\x00\x08\x00\x08", b"\x08\xff\xdc\xff\xdc", 1),
        "GIF of 4 thousand million pixels": gif_of((65_535, 65_535), (1, 1)),
        "GIF, its frame larger than its screen": gif_of((1, 1), (65_535, 65_535)),
        "TIFF of 2**62 pixels": tiff_of(2**31 - 1, 2**31 - 1),
        "TIFF of 100 million pixels": tiff_of(10_000, 10_000),
        "TIFF of 64 million pixels, no data": tiff_of(8_000, 8_000),
        "TIFF of floats": saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
        "TIFF of an unknown compression": tiff_of(4, 4, compression=999),
        "ICO": saved(small, "ICO"),
        "PPM": saved(small, "PPM"),
        "EPS that deletes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file (y) deletefile\n",
        "EPS in a DOS box": b"\xc5\xd0\xd3\xc6\x1e\0\0\0" + bytes(22) + b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "SVG": b"<?xml version='1.0'?><!DOCTYPE s [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><svg>&x;</svg>",
        "PDF": b"%PDF-1.4\n",
        "HTML": b"<html><script>1</script></html>",
        "nothing": b"",
        "zeros": bytes(10_000),
    }
    for kind, data in whole.items():
        for share in (3, 2):
            found[f"{kind}, {1}/{share} of it"] = data[: len(data) // share]
        found[f"{kind}, only its head"] = data[:12]
    return found


def odd() -> dict[str, bytes]:
    """Strange images that may be read or refused, but must not do harm."""
    small = Image.new("RGB", (8, 8), (9, 8, 7))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + b"\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\xff\xff\xff\xff\x7f" * 3000
    frames = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(20)]
    wide = Image.fromarray(np.full((2000, 2000), 40_000, np.uint16))
    return {
        "PNG of 64 million pixels": png(8_000, 8_000, data=zlib.compress(bytes((8_000 * 3 + 1) * 8_000), 9)),
        "PNG of 9 million pixels with alpha": png(
            3_000, 3_000, kind=6, data=zlib.compress(bytes((3_000 * 4 + 1) * 3_000), 9)
        ),
        "PNG of 4 million pixels, 16 bits": saved(wide, "PNG"),
        "BMP, packed, all in deltas": bmp(2_000, 2_000, 8, 1, b"\0\2\xff\xff" * 3_000 + b"\0\1"),
        "JPEG, EXIF of 65,535 entries": saved(small, "JPEG", exif=exif[:60_000]),
        "JPEG, CMYK of Adobe": saved(small.convert("CMYK"), "JPEG"),
        "JPEG, a profile of a megabyte": saved(small, "JPEG", icc_profile=bytes(1 << 20)),
        "PNG, EXIF of 65,535 entries": png(4, 4, chunk(b"eXIf", exif[6:])),
        "PNG, a profile of 20 MB": png(4, 4, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(20_000_000), 9))),
        "PNG, animated": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "WebP, animated": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "TIFF, a folder that is its own next": tiff_of(8, 8, after=72),
        "TIFF of 65,535 entries": tiff(*[(256, 4, 1, 8), (257, 4, 1, 8)] * 32_767),
        "TIFF, 10,000 pages": saved(frames[0], "TIFF", save_all=True, append_images=frames[1:] * 500),
        "TIFF, a tag of 4 GiB": tiff_of(4, 4, (270, 2, 2**32 - 1, 8)),
        "TIFF, strips without rows": tiff_of(8, 8, (278, 4, 1, 0)),
        "TIFF of 64 million pixels, deflated": saved(
            Image.new("RGB", (8_000, 8_000)), "TIFF", compression="tiff_adobe_deflate"
        ),
        "GIF, 10,000 comments": gif_of((8, 8), (8, 8), b"!\xfe\1x\0" * 10_000),
        "GIF of 64 million pixels": gif_of((8_000, 8_000), (8_000, 8_000)),
        "GIF, animated": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "PNG, rubbish behind": saved(small, "PNG") + b"x" * 1_000_000,
    }
