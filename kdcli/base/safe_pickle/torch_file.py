"""Whether a `.pt` file is what kd writes, found out before torch opens it.

torch's `weights_only` reader knows far more than kd writes (sparse and quantised tensors, byte arrays of any
length, text codecs by name), and reads the archive by other rules than Python's zipfile. Here the archive must
leave no room for two readings, and its pickle is run on the machine of this package: plain values, and tensors
whose storages are as large as their records.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from kdcli.base.errors import KdError
from kdcli.base.safe_pickle.arrays import HINT
from kdcli.base.safe_pickle.machine import BUILDERS, Machine, handlers_with

MAX_RECORDS = 200_000
MAX_DIRECTORY_BYTES = 32 << 20
MAX_PICKLE_BYTES = 256 << 20

_AGAIN = "Write it again with kd."
_ITEM_BYTES = {
    "ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1, "ShortStorage": 2, "HalfStorage": 2,
    "BFloat16Storage": 2, "IntStorage": 4, "FloatStorage": 4, "LongStorage": 8, "DoubleStorage": 8,
    "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16,
}  # fmt: skip


def check(path: Path) -> None:
    """Raise KdError if a file is no archive that `torch.save` makes of plain values and tensors.

    Raises:
        KdError: also where it cannot be read or is damaged.
        zipfile.BadZipFile, OSError, ValueError, struct.error: damage that the zip reader found.
    """
    if not path.is_file():
        raise KdError(f"{path} is not a file", "Name the .pt file itself.")
    with path.open("rb") as handle:
        if not zipfile.is_zipfile(handle):
            raise KdError(
                f"{path} is not a kd checkpoint", "kd reads .pt files that kd wrote; see kd convert-caffe."
            )
        _check_directory(handle, path)
        with zipfile.ZipFile(handle) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            pickles = [name for name in names if name.endswith("/data.pkl")]
            if not pickles:
                raise KdError(f"{path} is a zip archive, not a checkpoint", "Name the .pt file itself.")
            # torch would unpack compressed records without limit
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                raise KdError(f"{path} holds compressed records, as no checkpoint does", _AGAIN)
            if any(name.endswith("/constants.pkl") for name in names):
                raise KdError(f"{path} is a TorchScript archive: a program, not weights", _AGAIN)
            if (
                len(pickles) > 1
                or len(set(names)) < len(names)
                or len(names) > MAX_RECORDS
                or sum(entry.file_size for entry in entries) > path.stat().st_size  # one on top of another
                or archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES
            ):
                raise KdError(f"{path} claims to hold more than it can", _AGAIN)
            folder = pickles[0].removesuffix("data.pkl") + "data/"
            sizes = {
                entry.filename.removeprefix(folder): entry.file_size
                for entry in entries
                if entry.filename.startswith(folder)
            }
            content = archive.read(pickles[0])
    try:
        _TorchMachine(content, sizes).outcome()
    except KdError as error:
        raise KdError(f"{path}: {error.message}", error.hint) from error


def _check_directory(handle: IO[bytes], path: Path) -> None:
    """The end of the archive must be the only one, and say the same in each of its forms."""
    size = handle.seek(0, 2)
    handle.seek(max(0, size - 98))
    tail = handle.read(98).rjust(98, b"\0")  # zip64 record (56), its locator (20), end record (22)
    end = struct.unpack("<4s4H2LH", tail[76:])
    if end[0] != b"PK\x05\x06" or end[7]:
        raise KdError(f"{path} has something behind its end, as no checkpoint does", _AGAIN)
    length, start, last = end[5], end[6], size - 22
    if tail[56:60] == b"PK\x06\x07":
        last = size - 98
        wide = struct.unpack("<4sQ2H2L4Q", tail[:56])
        if wide[0] != b"PK\x06\x06" or struct.unpack("<Q", tail[64:72]) != (last,):
            raise KdError(f"{path} has two directories, as no checkpoint does", _AGAIN)
        length, start = wide[8], wide[9]
    if start + length != last or length > MAX_DIRECTORY_BYTES:
        raise KdError(f"{path} has two directories, as no checkpoint does", _AGAIN)


class _TorchMachine(Machine):
    """Runs the pickle of a `.pt` file, with stand-ins for tensors.

    Args:
        sizes: bytes of each storage's record.
    """

    def __init__(self, data: bytes, sizes: Mapping[str, int]) -> None:
        super().__init__(data)
        self.sizes = sizes
        self.builders, self.handlers = _BUILDERS, _HANDLERS

    def storage(self) -> None:
        about = self.pop()
        if not isinstance(about, tuple) or len(about) != 5 or about[0] != "storage":
            raise KdError("refuses a reference to something outside", HINT)
        _, kind, key, _, count = about
        name = getattr(kind, "name", "")
        if not isinstance(key, str) or type(count) is not int or name not in _ITEM_BYTES:
            raise KdError("refuses a storage of an unknown kind", HINT)
        if count < 0 or count * _ITEM_BYTES[name] > self.sizes.get(key, -1):
            raise KdError(f"storage {key[:40]!r} claims more than its record holds", _AGAIN)
        self.stack.append(None)

    def tensor(self, arguments: tuple[Any, ...]) -> object:
        if not 6 <= len(arguments) <= 7 or not all(
            isinstance(numbers, tuple) and all(type(number) is int and number >= 0 for number in numbers)
            for numbers in ((arguments[1],), arguments[2], arguments[3])
        ):
            raise KdError("refuses a tensor of an unknown form", HINT)
        return None

    def parameter(self, arguments: tuple[Any, ...]) -> object:
        return None


_BUILDERS = {
    ("collections", "OrderedDict"): BUILDERS["collections", "OrderedDict"],
    ("_codecs", "encode"): BUILDERS["_codecs", "encode"],
    ("torch._utils", "_rebuild_tensor_v2"): _TorchMachine.tensor,
    ("torch._utils", "_rebuild_parameter"): _TorchMachine.parameter,
    **{("torch", name): Machine.never_called for name in _ITEM_BYTES},
}
_HANDLERS = handlers_with({"BINPERSID": lambda machine, _: machine.storage()})
