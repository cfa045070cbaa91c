"""Image trees as folders, tar and zip files."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

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
