"""Formats that kd does not read: recognised by content, each with the steps that convert it. Nothing is executed."""

import pickletools
import re
import shlex
import zipfile
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import IO

from kdcli.base.errors import KdError
from kdcli.base.files import open_regular

_MAX_PICKLE_BYTES = 64 << 20
_MAX_INSTRUCTIONS = 500_000
_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # PyTorch's own number, pickled

_READ = (
    "kd reads model.onnx; set its input by --scale, --mean and --std (a teacher's by --teacher-scale …), or export a "
    "network that takes uint8 images (N, H, W, 3)"
)
_EXPORT = (
    'torch.onnx.export(network.eval(), (torch.zeros(1, 3, 224, 224),), "model.onnx", '
    f'dynamic_shapes=({{0: "n"}},), external_data=False) with its own image size. {_READ}'
)
_DOWNLOAD = "Download the file itself: the link named raw or download, not the page about it."
_KERAS = 'keras.saving.load_model({file!r}).export("model.onnx", format="onnx"). ' + _READ
_WEIGHTS = (
    "Weights come without their network: name it before the file, as torchvision:NAME:{quoted}, or with timm:NAME or "
    "package.module:function."
)

# Format → (description, steps of the conversion, with the file's path as `quoted` for a shell and `file` for Python)
_KINDS = {
    "html": ("a web page, not a model", _DOWNLOAD),
    "hdf5": ("an HDF5 file, as Keras writes it", "Export it to ONNX in Keras 3: " + _KERAS),
    "keras": ("a Keras model", "Export it to ONNX in Keras 3: " + _KERAS),
    "tflite": (
        "a TensorFlow Lite model",
        "Convert it: pip install tf2onnx; python -m tf2onnx.convert --tflite {quoted} --output model.onnx. " + _READ,
    ),
    "saved_model": (
        "a TensorFlow SavedModel",
        "Convert it: pip install tf2onnx; python -m tf2onnx.convert --saved-model {quoted} --output model.onnx. "
        + _READ,
    ),
    "safetensors": ("a safetensors file: weights without their network", _WEIGHTS),
    "state_dict": ("a state_dict: weights without their network", _WEIGHTS),
    "script": (
        "a TorchScript program",
        "kd runs no program from a file. If you trust it, in Python: torch.onnx.export(torch.jit.load({file!r}), "
        '(torch.zeros(1, 3, 224, 224),), "model.onnx", dynamo=False) with its own image size. ' + _READ,
    ),
    "module": (
        "a pickled PyTorch module, which is code",
        "kd runs no code from a file. In the program that defines the network: " + _EXPORT,
    ),
}  # fmt: skip


def explain(path: Path) -> KdError | None:
    """An error that names the format of a file or folder and how to convert it; None for an unknown format."""
    try:
        kind, steps = _identify(path)
    except Exception:  # readers raise whatever the bytes provoke
        return None
    file = path.as_posix()
    return KdError(
        f"{path} is {kind}", steps.replace("{file!r}", repr(file)).replace("{quoted}", shlex.quote(file))
    )


def _identify(path: Path) -> tuple[str, str]:
    """Description and steps of `_KINDS`; a KeyError for other formats."""
    if path.is_dir():
        return _KINDS["saved_model" if (path / "saved_model.pb").is_file() else ""]
    with open_regular(path) as handle:
        head = handle.read(1024)
        signatures = {
            "html": bool(re.match(rb"(?i)\s*(<!doctype html|<html)", head.removeprefix(b"\xef\xbb\xbf"))),
            "hdf5": head.startswith(b"\x89HDF\r\n\x1a\n"),
            "tflite": head[4:8] == b"TFL3",
            "safetensors": head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 100 << 20,
        }
        kind = next((name for name, found in signatures.items() if found), "")
        if head.startswith(_BEFORE_1_6):
            handle.seek(0)
            return _of_pickles(handle, 4)  # a number, the version, the machine's types, and what was saved
        return _KINDS[kind] if kind else _of_zip(handle)


def _of_zip(handle: IO[bytes]) -> tuple[str, str]:
    with zipfile.ZipFile(handle) as archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return _KINDS["script"]
        if {"config.json", "model.weights.h5"} <= set(names):
            return _KINDS["keras"]
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _MAX_PICKLE_BYTES:
            return _KINDS[""]
        return _of_pickles(BytesIO(archive.read(entry)), 1)


def _of_pickles(handle: IO[bytes], count: int) -> tuple[str, str]:
    """The entry of `_KINDS` for a pickle of `torch.save`, by the names in it."""
    instructions = chain.from_iterable(pickletools.genops(handle) for _ in range(count))
    texts = [
        str(argument).replace(" ", ".") if code.name == "GLOBAL" else argument
        for code, argument, _ in islice(instructions, _MAX_INSTRUCTIONS)
        if isinstance(argument, str)
    ]
    if {"format_version", "arch_args"} <= set(texts):  # kd's own, damaged or of another version
        return _KINDS[""]
    if any(text.startswith("torch.nn.modules.") for text in texts):
        return _KINDS["module"]
    weights = any(re.search(r"(^|\.)(weight|bias|running_mean)$", text) for text in texts)
    return _KINDS["state_dict" if weights else ""]
