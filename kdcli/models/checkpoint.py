"""Checkpoints: one `.pt` file with everything a model needs, read without executing anything in it."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from kdcli.base.errors import KdError
from kdcli.base.files import atomic_path
from kdcli.base.results import invalid
from kdcli.base.text import first_line
from kdcli.models.foreign import explain
from kdcli.models.pt_archive import AGAIN, OTHER_FILES, check_archive

FORMAT_VERSION = 1
DAMAGED = "The file is damaged, or was made by another version of kd; write it again."
_MAX_EXPANSION = 4  # bytes of all tensors per byte of the file; two layers may share weights
_LONG_TEXT = 256
_MAX_PARTS = 500_000  # tensors and plain values in one file


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file.

    Attributes:
        resize: pixels of the shorter side of images before the centre crop, see `data.decode.resize`; 0: no crop.
        provenance: method, data, teacher, accuracy, source file: plain JSON values.
        training: optimizer, auxiliary modules, position and identity of an unfinished run; None in a finished model.
    """

    arch: str  # name in `kdcli.models.MODELS`
    arch_args: dict[str, Any]  # keyword arguments that build the network, plain JSON values
    state_dict: dict[str, Tensor]  # the network's parameters and buffers
    preprocess: dict[str, Any]  # `{"name", "args", "state"}`, see `kdcli.data.preprocess`
    classes: tuple[str, ...]  # class names in the order of the logits
    input_size: tuple[int, int, int]  # `(H, W, C)` of the raw uint8 images
    provenance: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    file_sha256: str = ""  # of the bytes that were read; empty if it was made here
    resize: Annotated[int, Field(ge=0, le=4096)] = 0

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True, extra="ignore")  # for `load`


# made here, since it evaluates annotations, and reading evaluates nothing
_CHECKPOINT = TypeAdapter(Checkpoint)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically, see `save_plain`."""
    document = {
        "format_version": FORMAT_VERSION,
        **vars(checkpoint),
        "state_dict": {
            name: value.detach().cpu().contiguous() for name, value in checkpoint.state_dict.items()
        },
        "classes": list(checkpoint.classes),
        "input_size": list(checkpoint.input_size),
    }
    del document["file_sha256"]
    if checkpoint.training is None:
        del document["training"]
    save_plain(path, document)


def save_plain(path: Path, document: dict[str, Any]) -> None:
    """Write tensors and plain values atomically: temporary file, read back, fsync, rename; else a KdError.

    The file holds the SHA-256 of its own content, since torch's reader does not notice a flipped bit.
    """
    document = {**document, "sha256": digest(document)}
    try:
        with atomic_path(path) as temporary:
            with temporary.open("wb") as handle:  # with a path, torch would write its name into the file
                torch.save(document, handle)
            _read(temporary)
    except (OSError, RuntimeError, KdError) as error:  # torch reports a full disk as RuntimeError
        raise KdError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or first_line(error)}",
            "Check free space and permissions; an earlier file of that name is unchanged.",
        ) from error


def load_plain(path: Path) -> dict[str, Any] | None:
    """Return what `save_plain` wrote, or None if the file is missing, damaged or of another kind."""
    try:
        return _read(path)[0]
    except KdError:
        return None


def cached(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A document of `save_plain`; without one it is made, and kept if the file can be written."""
    document = load_plain(path)
    if document is None:
        document = make()
        with suppress(KdError):
            save_plain(path, document)
    return document


def load(path: Path) -> Checkpoint:
    """Read a checkpoint with `weights_only=True`, whatever the environment; KdError for any other file."""
    document, sha256 = _read(path)
    version = document.get("format_version")
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise explain(path) or KdError(
            f"{path} is not a kd checkpoint of format {FORMAT_VERSION}",
            f"{OTHER_FILES} For one that a newer kd wrote: pip install --upgrade kdcli",
        )
    try:
        return replace(_CHECKPOINT.validate_python(document), file_sha256=sha256)
    except ValidationError as error:
        raise KdError(f"{path} is not a complete kd checkpoint: {invalid(error)}", DAMAGED) from error


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """Content of a file without the SHA-256 in it, which is checked; and the SHA-256 of the file."""
    if not path.exists():
        raise KdError(f"no such file: {path}", "kd convert-caffe makes a teacher, kd train a student.")
    if not path.is_file():
        raise explain(path) or KdError(f"{path} is not a file", "Name the .pt file itself.")
    try:
        content = path.read_bytes()
        document = load_tensors(path, content)
        if not isinstance(document, dict):
            raise KdError(f"{path} is not a kd checkpoint", OTHER_FILES)
        recorded = document.pop("sha256", None)
        if recorded is not None and recorded != digest(document):
            raise KdError(
                f"{path} is damaged: its content does not have the SHA-256 recorded in it",
                "Restore it, or write it again.",
            )
        return document, hashlib.sha256(content).hexdigest()
    except KdError as error:
        raise (explain(path) or error) from error.__cause__
    except Exception as error:  # the unpickler and the zip reader raise whatever the bytes provoke
        raise explain(path) or KdError(
            f"{path} cannot be read safely: {first_line(error)}",
            "The file is damaged, or holds more than tensors and plain values; kd never executes what it reads.",
        ) from error


def load_tensors(path: Path, content: bytes, *, legacy: bool = False) -> Any:
    """Tensors and plain values of a `.pt` file; an error of any type for other content.

    `legacy`: also a file of a torch before 1.6, which is no zip archive.
    """
    if not legacy or zipfile.is_zipfile(io.BytesIO(content)):
        check_archive(path, content)
    document = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    check_extent(path, len(content), document)
    return document


def check_extent(path: Path, size: int, document: Any) -> None:
    """Raise KdError if a document is far larger than its file of `size` bytes.

    A few bytes can be laid out as a tensor of terabytes, or as nested lists whose parts are shared.
    """
    budget, parts = _MAX_EXPANSION * size, 0
    pending = [document]
    while pending:
        part = pending.pop()
        parts += 1
        if isinstance(part, Tensor):
            budget -= part.numel() * part.element_size()
        elif isinstance(part, dict):
            pending += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            pending += part
        elif isinstance(part, str | bytes) and len(part) > _LONG_TEXT:  # one text can be used a million times
            budget -= len(part)
        if budget < 0 or parts + len(pending) > _MAX_PARTS:
            raise KdError(f"{path} claims to hold more than it can", AGAIN)


def digest(value: Any) -> str:
    """Hexadecimal SHA-256 of nested tensors and plain values; the order of a dictionary does not count."""
    sha = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            plain = part.detach().cpu().contiguous()
            sha.update(f"tensor {plain.dtype} {tuple(plain.shape)} ".encode())
            sha.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, dict):
            sha.update(f"dict {len(part)} ".encode())
            for key in sorted(part, key=lambda key: (str(type(key)), str(key))):
                add(key)
                add(part[key])
        elif isinstance(part, list | tuple):
            sha.update(f"list {len(part)} ".encode())
            for item in part:
                add(item)
        else:
            sha.update(f"{type(part).__name__} {part!r} ".encode())

    add(value)
    return sha.hexdigest()
