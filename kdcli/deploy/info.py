"""What is in a model: a checkpoint, an ONNX file, or a network by its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcli import models
from kdcli.base.config import InfoConfig
from kdcli.base.files import sha256_file
from kdcli.data.preprocess import Preprocess
from kdcli.deploy import onnx_model
from kdcli.deploy.load import load_model
from kdcli.deploy.onnx_model import OnnxClassifier
from kdcli.models.layer_summary import LayerSummary, summarize_layers

_SMALL = 16  # values of a tensor that are shown one by one


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without an image.

    Attributes:
        kind: `checkpoint`, `onnx` or `network`.
        arch: the network's name; None of a stranger's file.
        input_size: (H, W, C) of the raw images.
        gives: `logits` or `probabilities`.
        classes: names in the order of the outputs.
        parameters: values of the network.
        macs: multiply-accumulates of one image in convolutions and linear layers; None if not known.
        file_bytes, sha256: of the file; None of a network that is not one.
        preprocess: name, settings and constants; None if it is not known or there is none yet.
        provenance: plain values that the file holds of where it came from.
    """

    kind: str
    arch: str | None
    input_size: tuple[int, int, int]
    gives: str
    classes: tuple[str, ...]
    parameters: int
    macs: int | None
    file_bytes: int | None
    sha256: str | None
    preprocess: dict[str, Any] | None
    provenance: dict[str, Any]
    layers: tuple[LayerSummary, ...]


def info(model: str, config: InfoConfig) -> ModelInfo:
    """Look into a model.

    Args:
        model: path of a checkpoint or an ONNX file, or a network's name; a name is a fresh network for the settings'
            classes and image size.

    Raises:
        KdError: no such file or network, or not a model.
    """
    if model in models.names() and not Path(model).is_file():
        size = (config.image_size, config.image_size, 1 if config.grey else 3)
        with torch.random.fork_rng(devices=[]):
            network = models.build(model, classes=config.classes, input_size=size).eval()
        numbers = tuple(str(number) for number in range(config.classes))
        rows = summarize_layers(network, torch.zeros(1, size[2], size[0], size[1]))
        return _of_network("network", model, size, numbers, models.parameter_count(network), rows)
    path = Path(model)
    loaded = load_model(path)
    if isinstance(loaded, OnnxClassifier):
        return _of_onnx(loaded)
    blank = torch.zeros((1, *loaded.input_size), dtype=torch.uint8)
    with torch.inference_mode():
        rows = summarize_layers(loaded.network, loaded.prepare(blank))
    count = models.parameter_count(loaded.network)
    return _of_network(
        "checkpoint",
        loaded.arch,
        loaded.input_size,
        loaded.classes,
        count,
        rows,
        file_bytes=path.stat().st_size,
        sha256=sha256_file(path),
        preprocess=_constants(loaded.preprocess),
        provenance=loaded.provenance,
    )


def _of_network(
    kind: str,
    arch: str,
    size: tuple[int, int, int],
    classes: tuple[str, ...],
    parameters: int,
    rows: list[LayerSummary],
    **more: Any,
) -> ModelInfo:
    unknown: dict[str, Any] = {"file_bytes": None, "sha256": None, "preprocess": None, "provenance": {}}
    return ModelInfo(
        kind=kind,
        arch=arch,
        input_size=size,
        gives="logits",
        classes=classes,
        parameters=parameters,
        macs=sum(row.macs or 0 for row in rows),
        layers=tuple(rows),
        **{**unknown, **more},
    )


def _of_onnx(loaded: OnnxClassifier) -> ModelInfo:
    facts = onnx_model.facts(loaded.model, loaded.input_size)
    return ModelInfo(
        kind="onnx",
        arch=loaded.metadata.get("kd.arch"),
        input_size=loaded.input_size,
        gives=loaded.gives,
        classes=loaded.classes,
        parameters=facts.parameters,
        macs=facts.macs,
        file_bytes=loaded.file_bytes,
        sha256=sha256_file(loaded.path),
        preprocess=None if loaded.preprocess is None else _constants(loaded.preprocess),
        provenance=loaded.provenance,
        layers=facts.nodes,
    )


def _constants(preprocess: Preprocess) -> dict[str, Any]:
    """Name, settings, and its tensors: small ones as numbers, others as their shapes."""
    return {
        "name": preprocess.name,
        **preprocess.args(),
        **{name: _shown(value) for name, value in preprocess.state_dict().items()},
    }


def _shown(value: Tensor) -> Any:
    if value.numel() <= _SMALL:
        return [round(number, 4) for number in value.flatten().tolist()]
    return "×".join(map(str, value.shape))
