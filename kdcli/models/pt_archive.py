"""Checks of a `.pt` archive before torch reads it.

`torch.load(weights_only=True)` executes nothing, but sets no limits: it unpacks compressed records whole and hashes
any dictionary key. Hence the archive's directory is checked for sizes, and its pickle is run once without tensors.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from kdcli.base.errors import KdError
from kdcli.base.files import check_pointer
from kdcli.base.pickles import HINT, SafeUnpickler

MAX_RECORDS = 200_000
MAX_PICKLE_BYTES = 256 << 20

OTHER_FILES = (
    "A .pt file is one that kd wrote. Test, predict, info, bench and --teacher also take ONNX files of any program; "
    "kd convert-caffe takes Caffe files."
)
AGAIN = "Write it again with the program that made it."
_ITEM_BYTES = {
    "ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1, "ShortStorage": 2, "HalfStorage": 2,
    "BFloat16Storage": 2, "IntStorage": 4, "FloatStorage": 4, "LongStorage": 8, "DoubleStorage": 8,
    "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16,
}  # fmt: skip


def check_archive(path: Path, content: bytes) -> None:
    """Raise KdError unless a file's bytes are an archive that `torch.save` makes of plain values and tensors.

    Damage that the zip reader finds is raised as its own errors.
    """
    if not zipfile.is_zipfile(io.BytesIO(content)):
        check_pointer(content, str(path))
        raise KdError(f"{path} is not a kd checkpoint", OTHER_FILES)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if not pickles:
            raise KdError(f"{path} is a zip archive, not a checkpoint", "Name the .pt file itself.")
        if (
            len(pickles) > 1
            or any(name.endswith("/constants.pkl") for name in entries)  # TorchScript: a program
            or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values())
            or any(entry.flag_bits & 1 for entry in entries.values())  # encrypted
            or len(entries) < len(archive.infolist())  # two records of one name
            or len(entries) > MAX_RECORDS
            or sum(entry.file_size for entry in entries.values()) > len(content)  # overlapping records
            or entries[pickles[0]].file_size > MAX_PICKLE_BYTES
            or not _has_one_directory(content, archive.start_dir)
        ):
            raise KdError(
                f"{path} is not an archive of weights as torch.save writes it",
                "Compressed and padded archives are refused. " + AGAIN,
            )
        folder = pickles[0].removesuffix("data.pkl") + "data/"
        sizes = {name.removeprefix(folder): entry.file_size for name, entry in entries.items()}
        plain = archive.read(pickles[0])
    try:
        _TensorlessUnpickler(plain, sizes).dictionary()
    except KdError as error:
        raise KdError(f"{path}: {error.message}", error.hint) from error


def _has_one_directory(content: bytes, start: int) -> bool:
    """Whether torch's zip reader must find the directory where Python's found it: from `start` to the end records."""
    size = len(content)
    tail = content[-98:].rjust(98, b"\0")  # zip64 end record (56), its locator (20), end record (22)
    _, _, _, _, _, length, offset, comment = struct.unpack("<4s4H2LH", tail[76:])
    end = size - 22
    if tail[56:60] == b"PK\x06\x07":
        end = size - 98
        if tail[:4] != b"PK\x06\x06" or struct.unpack("<Q", tail[64:72]) != (end,):
            return False
        length, offset = struct.unpack("<2Q", tail[40:56])
    return tail[76:80] == b"PK\x05\x06" and not comment and offset == start and start + length == end


class _TensorlessUnpickler(SafeUnpickler):
    """Unpickler for a `.pt` file that makes no tensors; no storage may exceed its record, of `sizes` bytes."""

    dispatch: ClassVar[Any] = {
        **SafeUnpickler.dispatch,
        pickle.BINPERSID[0]: pickle._Unpickler.dispatch[pickle.BINPERSID[0]],
        pickle.BUILD[0]: lambda self: self.build(),
    }

    def __init__(self, data: bytes, sizes: Mapping[str, int]) -> None:
        super().__init__(data)
        self.sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        """Return the name of a storage's type, a function that returns None for a tensor, or as the base class."""
        if module == "torch" and name in _ITEM_BYTES:
            return name
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return lambda *_: None
        if (module, name) == ("collections", "Counter"):  # milestones in the state of torch's MultiStepLR
            return dict
        return super().find_class(module, name)

    def build(self) -> None:
        """BUILD: drop the attributes of a dictionary, as `_metadata` of a state_dict; none of another object."""
        if type(self.stack[-2]) is dict:
            self.stack.pop()
        else:
            super().build()

    def persistent_load(self, pid: Any) -> None:
        """Check a reference to a storage: ("storage", type, record, device, number of values)."""
        kind, name, record, _, count = pid
        if kind != "storage" or name not in _ITEM_BYTES or type(count) is not int or count < 0:
            raise KdError("refuses a reference to something other than a storage", HINT)
        if count * _ITEM_BYTES[name] > self.sizes.get(record, -1):
            raise KdError(f"storage {record[:40]!r} claims more than its record holds", AGAIN)
