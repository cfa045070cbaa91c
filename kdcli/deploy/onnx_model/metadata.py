"""Metadata of exported ONNX files: classes, preprocessing, origin, quantisation. Written and read here only."""

import ast
import base64
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from kdcli import __version__
from kdcli.base.config import NO_ASSUMPTIONS, InputSettings
from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import parse_document, read_bytes
from kdcli.base.text import first_line
from kdcli.data.preprocess import MeanStd, Preprocess, from_spec
from kdcli.deploy.load import name_files
from kdcli.deploy.onnx_model.form import MAX_SIDE, InputForm
from kdcli.models import Classifier

FORMAT = "kd-onnx-1"
FORMAT_KEY = "kd.format"
_MOST_VALUES = 16_384  # of a preprocessing that is stored as text
_MOST_TEXT = 1_000_000  # bytes of class names
_NAME_KEYS = ("names", "id2label", "labels", "classes", "class_names")  # of metadata of exporters
_PIXEL_FORMATS = {"Rgb8": {"channel_order": "rgb"}, "Bgr8": {"channel_order": "bgr"}, "Gray8": {}}
_PIXEL_RANGES = {
    "NominalRange_0_255": {"scale": "1"},
    "Normalized_0_1": {"scale": "1/255"},
    "Normalized_1_1": {"scale": "1/127.5", "mean": "1"},
}
_MEASURED = ("test_accuracy", "agreement")  # of the float32 network, in its provenance


def encode_preprocess(preprocess: Preprocess, most_values: int = _MOST_VALUES) -> str:
    """JSON of `Preprocess.spec()`; `state`: shapes and base64 of little-endian float32, null if too large."""
    spec = preprocess.spec()
    state: dict[str, Any] | None = None
    if sum(value.numel() for value in spec["state"].values()) <= most_values:
        state = {
            name: {
                "shape": list(value.shape),
                "float32": base64.b64encode(value.detach().numpy().astype("<f4").tobytes()).decode("ascii"),
            }
            for name, value in spec["state"].items()
        }
    return json.dumps({"name": spec["name"], "args": spec["args"], "state": state}, sort_keys=True)


def decode_preprocess(text: str) -> Preprocess | None:
    """The inverse of `encode_preprocess`; None if the values were left out. Other text is an error of any kind."""
    spec = parse_document(text)
    if spec["state"] is None:
        return None
    state = {}
    for name, value in spec["state"].items():
        numbers = np.frombuffer(base64.b64decode(value["float32"]), "<f4").astype(np.float32)
        state[name] = torch.from_numpy(numbers).reshape([int(side) for side in value["shape"]])
    return from_spec({**spec, "state": state})


def make_metadata(classifier: Classifier, *, with_preprocessing: bool) -> dict[str, str]:
    """Metadata of a float32 export of a checkpoint."""
    provenance = _without_paths(classifier.provenance)
    teacher = provenance.get("teacher")
    teacher = teacher if isinstance(teacher, dict) else {}
    values: dict[str, Any] = {
        FORMAT_KEY: FORMAT,
        "kd.version": __version__,
        "kd.classes": json.dumps(list(classifier.classes), ensure_ascii=False),
        "kd.arch": classifier.arch,
        "kd.method": provenance.get("method"),
        "kd.teacher": teacher.get("name") or teacher.get("path"),
        "kd.teacher_sha256": teacher.get("sha256"),
        "kd.test_accuracy": provenance.get("test_accuracy"),
        "kd.provenance": json.dumps(provenance, ensure_ascii=False, sort_keys=True, default=str),
        "kd.preprocess": encode_preprocess(classifier.preprocess),
        "kd.preprocess_included": "yes" if with_preprocessing else "no",
        "kd.input_size": json.dumps(list(classifier.input_size)),
        "kd.resize": classifier.resize or None,
        "kd.layout": "uint8 NHWC RGB" if with_preprocessing else "float32 NCHW, preprocessed",
        "kd.output": "probabilities" if with_preprocessing else "logits",
        "kd.checkpoint_sha256": classifier.file_sha256 or None,
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def add_quantisation(metadata: dict[str, str], quantisation: dict[str, Any]) -> dict[str, str]:
    """Metadata of an int8 file: figures measured on the float32 network are renamed to `float_…`."""
    provenance = {
        f"float_{key}" if key in _MEASURED else key: value
        for key, value in json.loads(metadata["kd.provenance"]).items()
    }
    changed = metadata | {
        "kd.provenance": json.dumps(provenance, ensure_ascii=False, sort_keys=True),
        "kd.quantisation": json.dumps(quantisation, sort_keys=True),
    }
    if "kd.test_accuracy" in changed:
        changed["kd.float_test_accuracy"] = changed.pop("kd.test_accuracy")
    return changed


def parse_metadata(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Fields of `OnnxClassifier` in a file of `kd export`; a KdError if damaged, or of another version."""
    try:
        if metadata[FORMAT_KEY] != FORMAT:
            raise ValueError(f"{metadata[FORMAT_KEY][:40]} of another version of kd")
        provenance = dict(parse_document(metadata["kd.provenance"]))
        json.dumps(provenance, ensure_ascii=False).encode()  # half of a surrogate pair is an error here
        preprocess, resize = decode_preprocess(metadata["kd.preprocess"]), int(metadata.get("kd.resize", 0))
        if not 0 <= resize <= MAX_SIDE:
            raise ValueError(f"resize {resize}")
        sides = parse_document(metadata["kd.input_size"])
        height, width, channels = (min(max(1, int(side)), MAX_SIDE) for side in sides)
    except Exception as error:  # JSON of any form raises many kinds
        raise invalid(path, error) from error
    size = height, width, channels
    return {"provenance": provenance, "preprocess": preprocess, "resize": resize, "input_size": size}


def class_names(
    path: Path, metadata: Mapping[str, str], count: int, assumed: InputSettings = NO_ASSUMPTIONS
) -> tuple[tuple[str, ...], str]:
    """Names of the classes; and of a file of another program where they come from, empty if they are numbers.

    They are those of `assumed`, of the metadata of any known exporter, or of a file beside the model; a KdError if
    their number is not that of the classes.
    """
    if FORMAT_KEY in metadata:
        try:
            names = tuple(str(name) for name in parse_document(metadata["kd.classes"]))
            if len(names) != count:
                raise ValueError(f"{len(names)} class names for {count} outputs")
        except Exception as error:
            raise invalid(path, error) from error
        return names, ""
    listed = assumed.class_names
    keys = () if listed else _NAME_KEYS
    sources = [(metadata[key], f"its metadata, {key}") for key in keys if metadata.get(key)]
    sources += [(_small_text(file), file.as_posix()) for file in name_files(path, assumed)]
    for text, source in sources:
        found = _names_in(text, source)
        if found is None:
            continue
        if len(found) != count:
            raise KdError(
                f"{source} names {len(found)} classes, {path} has {count} outputs",
                f"Set the names in the order of the outputs with {assumed.flag('class_names')} FILE.",
            )
        return found, source
    if listed is not None:
        raise KdError(
            f"{listed} holds no class names", "One a line, a JSON list, or a JSON object of id: name."
        )
    return tuple(map(str, range(count))), ""


def _names_in(text: str, source: str) -> tuple[str, ...] | None:
    """Names from a JSON or Python list or object of numbers, from lines, or from one line with commas."""
    value: Any = None
    for read in (parse_document, ast.literal_eval):  # ultralytics writes a Python dict
        with suppress(Exception):  # also RecursionError and MemoryError, on deep nesting
            value = read(text[:_MOST_TEXT])
            break
    if isinstance(value, dict) and isinstance(value.get("id2label"), dict):
        value = value["id2label"]
    if isinstance(value, dict):
        by_number = {str(number): str(name) for number, name in value.items()}
        value = [by_number.get(str(number)) for number in range(len(by_number))]
    elif not isinstance(value, list | tuple):
        value = [] if source.endswith(".json") or text.lstrip()[:1] in ("{", "[") else _lines(text)
    if len(value) < 2 or None in value or value == [f"LABEL_{number}" for number in range(len(value))]:
        return None  # the last are placeholders of transformers
    return tuple(map(str, value))


def _lines(text: str) -> list[str]:
    """Lines, or words of one line with commas; without numbers 0, 1, … before all of them."""
    lines = [line.strip() for line in text.strip("\ufeff\r\n ").splitlines()]
    if len(lines) == 1:
        lines = [word.strip() for word in lines[0].split(",")]
    words = [re.split(r"[\s:,]+", line, maxsplit=1) for line in lines]
    numbered = all(len(word) == 2 and word[0] == str(number) for number, word in enumerate(words))
    return [word[1] for word in words] if numbered else lines


def _small_text(path: Path) -> str:
    try:
        return read_bytes(path, _MOST_TEXT).decode("utf-8")
    except ValueError as error:
        raise KdError(f"class names in {path} cannot be read: {first_line(error)}") from error


def invalid(path: Path, error: Exception) -> KdError:
    return KdError(f"{path} has invalid metadata: {first_line(error)}", "Export it again.")


def with_declared(path: Path, metadata: Mapping[str, str], assumed: InputSettings) -> InputSettings:
    """`assumed`, completed by the image metadata of the ONNX standard; a KdError on a form that is not read."""
    declared: dict[str, str] = {}
    for key, forms, own in (
        ("Image.BitmapPixelFormat", _PIXEL_FORMATS, assumed.channel_order),
        ("Image.NominalPixelRange", _PIXEL_RANGES, assumed.mean_std),
    ):
        form = metadata.get(key)
        if own or form is None:
            continue
        if form not in forms:
            raise KdError(
                f"{path} takes pixels of {key} {form[:40]}, which kd does not make",
                f"Set {', '.join(assumed.flag(name) for name in ('channel_order', 'scale', 'mean', 'std'))}.",
            )
        declared |= forms[form]
    return assumed.model_copy(update=declared)


def assumed_preprocess(path: Path, assumed: InputSettings, form: InputForm) -> Preprocess | None:
    """Preprocessing of an input that is described; None if the scale of its values is not known, or it is uint8."""
    if assumed.mean_std is None or (form.dtype == np.uint8 and assumed.mean_std == ((0.0,), (1.0,))):
        return None
    if form.dtype == np.uint8:
        flags = ", ".join(assumed.flag(name) for name in ("scale", "mean", "std") if getattr(assumed, name))
        raise UsageError(f"{path} takes uint8 images: its preprocessing is inside", f"Leave out {flags}.")
    return MeanStd.described(assumed.mean_std, form.size[2], assumed.channel_order or "rgb")


def _without_paths(value: Any) -> Any:
    """Shorten absolute paths to their last part: exported files carry no paths of this machine."""
    if isinstance(value, dict):
        return {str(key): _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if isinstance(value, str):
        for kind in (PurePosixPath(value), PureWindowsPath(value)):
            if kind.is_absolute() or value.startswith("~"):
                return kind.name
    return value
