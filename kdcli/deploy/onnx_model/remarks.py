"""What kd export writes into a file of its classes, origin and preprocessing."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcli.base.errors import KdError
from kdcli.base.text import first_line
from kdcli.data.preprocess import Preprocess, from_spec

FORMAT = "kd-onnx-1"


def encode_preprocess(preprocess: Preprocess, most_values: int = 16_384) -> str:
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
    """The inverse of `encode_preprocess`; None if the values were left out.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RuntimeError, KdError: the text is not what
            `encode_preprocess` writes.
    """
    spec = json.loads(text)
    if spec["state"] is None:
        return None
    state = {}
    for name, value in spec["state"].items():
        numbers = np.frombuffer(base64.b64decode(value["float32"]), "<f4").astype(np.float32)
        state[name] = torch.from_numpy(numbers).reshape([int(side) for side in value["shape"]])
    return from_spec({"name": spec["name"], "args": dict(spec["args"]), "state": state})


def remarks_of(
    path: Path, metadata: dict[str, str], count: int
) -> tuple[tuple[str, ...], dict[str, Any], Preprocess | None]:
    """Class names, provenance and preprocessing as kd export wrote them, or what stands in for them."""
    numbers = tuple(str(index) for index in range(count))
    if "kd.format" not in metadata:
        return numbers, {}, None
    if metadata["kd.format"] != FORMAT:
        raise KdError(
            f"{path} was written by a newer kd ({metadata['kd.format'][:40]})", "pip install --upgrade kdcli"
        )
    try:
        classes = tuple(str(name) for name in json.loads(metadata["kd.classes"]))
        provenance = dict(json.loads(metadata["kd.provenance"]))
        preprocess = decode_preprocess(metadata["kd.preprocess"])
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        RuntimeError,
        KdError,
    ) as error:
        raise KdError(f"{path}: its metadata is damaged: {first_line(error)}", "Export it again.") from error
    if len(classes) != count:
        raise KdError(f"{path} names {len(classes)} classes and gives {count} values", "Export it again.")
    return classes, provenance, preprocess
