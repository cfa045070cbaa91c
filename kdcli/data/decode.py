"""One image file's bytes to uint8 RGB pixels."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import PurePath

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import check_pointer
from kdcli.base.text import dims, first_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
FORMATS_READ = "PNG, JPEG, WebP, BMP, GIF and TIFF files are read."
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff")
OTHER_SUFFIXES = (".avif", ".heic", ".heif", ".jp2", ".ppm", ".pgm", ".tga")
_HEADS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"),
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),  # TIFF and BigTIFF, either byte order
)
MAX_PIXELS = 64_000_000
MAX_SCAN_PIXELS = 64 * MAX_PIXELS  # of a JPEG: its pixels times its scans (passes over all of them)
LARGE_PIXELS = MAX_PIXELS // 4  # beyond the photos of most cameras
_large_images = threading.Lock()  # one at a time is decoded and used, of all threads
_START_OF_SCAN = b"\xff\xda"  # the only place of these bytes in compressed data; metadata may add some

Pixels = npt.NDArray[np.uint8]
_KINDS = {
    "1": "grey",
    "L": "grey",
    "LA": "grey",
    "I;16": "16-bit",
    "I;16B": "16-bit",
    "P": "palette",
}
_ORIENTATION = 0x0112  # EXIF's tag
_EXIF_KEYS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


def is_image(head: bytes, name: str) -> bool:
    """Whether a file is an image by its first 16 bytes, of `FORMATS`, or else, of any format, by its suffix."""
    return (
        head.startswith(_HEADS)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:2] == b"BM" and head[6:10] == bytes(4))  # reserved words of a BMP are zero
        or PurePath(name).suffix.lower() in (*SUFFIXES, *OTHER_SUFFIXES)
    )


def decode(data: bytes, name: str) -> Pixels:
    """Pixels of an image file, see `decoded`."""
    with decoded(data, name) as pixels:
        return pixels


@contextmanager
def decoded(data: bytes, name: str, kinds: list[str] | None = None) -> Iterator[Pixels]:
    """Pixels uint8 (H, W, 3) of an image file, upright by its EXIF orientation, for use in a block.

    Transparent pixels are laid on white; of an animation and of several pages the first is taken; grey becomes three
    equal channels, and 16-bit grey is scaled to 8 bits. Blocks with images of more than `LARGE_PIXELS` wait for each
    other. KdError names a file that is broken, not one of `FORMATS`, or of more than `MAX_PIXELS`.

    Conversions are appended to `kinds`: `grey`, `palette`, `RGBA`, `CMYK`, `16-bit`, `turned by EXIF`.
    """
    with _errors(name, data):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        count, scans = image.width * image.height, data.count(_START_OF_SCAN)
        if count > MAX_PIXELS:
            raise Image.DecompressionBombError
        if data.startswith(b"\xff\xd8") and scans * count > MAX_SCAN_PIXELS:
            raise KdError(
                f"image {name} has {scans:,} scans", "It looks like a decompression bomb; remove it."
            )
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise KdError(f"image {name} has values of 32 bits", "Convert it to 8 or 16 bits.")
    with _large_images if count > LARGE_PIXELS else nullcontext():
        with _errors(name, data), image:
            image.load()
            if image.format == "PNG":
                _fit_transparency(image, bits=data[24])
            turned = any(key in image.info for key in _EXIF_KEYS)
            upright = ImageOps.exif_transpose(image) if turned else image
            if kinds is not None and image.mode != "RGB":
                kinds.append(_KINDS.get(image.mode, image.mode))
            if kinds is not None and turned and image.getexif().get(_ORIENTATION) in range(2, 9):
                kinds.append("turned by EXIF")
            pixels = np.array(_to_rgb(upright), dtype=np.uint8)
        del image, upright
        yield pixels


@contextmanager
def _errors(name: str, data: bytes) -> Iterator[None]:
    """Convert exceptions of Pillow into a KdError."""
    try:
        yield
    except KdError:
        raise
    except Image.DecompressionBombError as error:
        raise KdError(
            f"image {name} has more than {MAX_PIXELS // 1_000_000} million pixels",
            "Scale it down or remove it.",
        ) from error
    except Exception as error:  # hostile bytes raise exceptions of any type
        check_pointer(data, f"image {name}")
        problem = first_line(error)
        if isinstance(error, UnidentifiedImageError):
            problem = "damaged" if is_image(data[:16], "") else "its format is not read"
        raise KdError(
            f"cannot read image {name}: {problem}",
            f"{FORMATS_READ} Convert, replace or remove it, or leave such files out by --skip-broken.",
        ) from error


def checked_resize(side: int | None, height: int | None, width: int | None) -> int:
    """--resize for images (H, W), 0 where it crops nothing; a UsageError unless these are squares of at most that."""
    if side and (height is None or height != width or side < height):
        raise UsageError(
            f"--resize {side} requires square images of at most {side} pixels a side",
            "Set --image-size, or leave it out.",
        )
    return side if side and side != height else 0


def resize(pixels: Pixels, size: int, full: int = 0) -> Pixels:
    """The middle of uint8 (H, W, 1 or 3), by an antialiased bilinear resize → (size, size, C).

    As torchvision's presets: the shorter side is resized to `full` pixels, if these are more than `size`, and the
    centre cropped. Only its part of the image is resized, by the same filter, which reads pixels around it.
    """
    height, width, channels = pixels.shape
    full = max(full, size)
    if (height, width) == (size, size) and full == size:
        return pixels
    image, box = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels), [0.0] * 4
    for axis, side in enumerate(image.size):
        resized = full * side // min(height, width)
        start = round((resized - size) / 2)  # of the centre crop
        box[axis], box[axis + 2] = start * side / resized, (start + size) * side / resized
    square = image.resize((size, size), Image.Resampling.BILINEAR, (box[0], box[1], box[2], box[3]))
    return np.array(square, dtype=np.uint8).reshape(size, size, channels)


def fit_to(pixels: Pixels, name: str, size: tuple[int, int, int], consumer: str, full: int = 0) -> Pixels:
    """Convert an image to the channels of `size` (H, W, C), and `resize` it if `size` is a square.

    KdError if the shape still differs; `consumer` is subject and verb of its message, such as `the model takes`.
    """
    height, width, channels = size
    pixels = with_channels(pixels, channels) if channels in (1, 3) else pixels
    pixels = resize(pixels, height, full) if height == width else pixels
    if pixels.shape != size:
        raise KdError(
            f"image {name} is {dims(pixels.shape)}, {consumer} {dims(size)}",
            "kd resizes images to squares only.",
        )
    return pixels


def with_channels(pixels: Pixels, channels: int) -> Pixels:
    """Colour to grey by ITU-R 601 luma, or grey to three equal planes; uint8 (H, W, 1 or 3) → (H, W, channels)."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return np.array(Image.fromarray(pixels).convert("L"), dtype=np.uint8)[..., None]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips instead of scaling
        wide = np.asarray(image).astype(np.int32)
        wide[wide == image.info.get("transparency", -1)] = 65535  # white
        wide += 128
        wide //= 257
        return Image.fromarray(wide.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        # Dropping alpha instead would bring up whatever colour is stored under transparent pixels.
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _fit_transparency(image: Image.Image, bits: int) -> None:
    """Scale a PNG's transparent value, stated in the file's bits, as Pillow scales its pixels to 8 bits."""
    value = image.info.get("transparency")
    if isinstance(value, tuple) and bits == 16:
        image.info["transparency"] = tuple(part >> 8 for part in value)
    elif isinstance(value, int) and image.mode == "L":
        image.info["transparency"] = value * 255 // (2**bits - 1)
