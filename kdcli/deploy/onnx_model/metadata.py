"""Metadata of exported ONNX files: classes, preprocessing, origin, quantisation. Written and read here only."""

import base64
import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from kdcli import __version__
from kdcli.base.config import InputSettings
from kdcli.base.errors import KdError, UsageError
from kdcli.base.text import first_line
from kdcli.data.preprocess import MeanStd, Preprocess, from_spec
from kdcli.models import Classifier

FORMAT = "kd-onnx-1"
_MOST_VALUES = 16_384  # of a preprocessing that is stored as text
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
    spec = json.loads(text)
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
        "kd.format": FORMAT,
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
        "kd.crop": repr(classifier.crop),
        "kd.layout": "uint8 NHWC RGB" if with_preprocessing else "float32 NCHW, preprocessed",
        "kd.output": "probabilities" if with_preprocessing else "logits",
        "kd.checkpoint_sha256": classifier.file_sha256,
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


def recorded_crop(path: Path, metadata: dict[str, str]) -> float:
    """The share of the shorter side that images are cropped to; 1 in a file of another program or an older kd.

    Raises:
        KdError: it is damaged.
    """
    try:
        crop = float(metadata.get("kd.crop", 1))
        if not 0.25 <= crop <= 1:
            raise ValueError(f"crop {crop}")
    except ValueError as error:
        raise KdError(f"{path} has invalid metadata: {first_line(error)}", "Export it again.") from error
    return crop


def parse_metadata(
    path: Path, metadata: dict[str, str], classes: int
) -> tuple[tuple[str, ...], dict[str, Any], Preprocess | None]:
    """Class names, provenance and preprocessing from the metadata of a file with that many classes.

    In a file of another program: numbers, nothing, and None.

    Raises:
        KdError: it is damaged, of a newer version, or names another number of classes.
    """
    if "kd.format" not in metadata:
        return tuple(map(str, range(classes))), {}, None
    try:
        if metadata["kd.format"] != FORMAT:
            raise ValueError(f"{metadata['kd.format'][:40]} of another version of kd")
        names = tuple(str(name) for name in json.loads(metadata["kd.classes"]))
        provenance = dict(json.loads(metadata["kd.provenance"]))
        preprocess = decode_preprocess(metadata["kd.preprocess"])
        if len(names) != classes:
            raise ValueError(f"{len(names)} class names for {classes} outputs")
    except Exception as error:  # JSON of any form raises many kinds
        raise KdError(f"{path} has invalid metadata: {first_line(error)}", "Export it again.") from error
    return names, provenance, preprocess


def assumed_preprocess(assumed: InputSettings, channels: int) -> Preprocess | None:
    """Preprocessing of an input that the user describes; None if the scale of its values is not known.

    Raises:
        UsageError: values for another number of channels.
    """
    if assumed.mean_std is None:
        return None
    order = assumed.channel_order or "rgb"
    state = {}
    for name, values in zip(("mean", "std"), assumed.mean_std, strict=True):
        if len(values) not in (1, channels):
            raise UsageError(
                f"{assumed.flag(name)}: {len(values)} values for {channels} channels",
                "Set one, or one a channel.",
            )
        each = values if len(values) == channels else values * channels
        state[name] = torch.tensor(each[::-1] if order == "bgr" else each)  # MeanStd's are in RGB order
    return MeanStd(**state, channel_order=order)


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
