"""Contents of a checkpoint or an ONNX file, or of a network by its name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdcli import models
from kdcli.base.config import InfoConfig
from kdcli.base.text import dims
from kdcli.data.preprocess import Preprocess
from kdcli.deploy.load import kind_of, load_model
from kdcli.deploy.onnx_model import OnnxClassifier
from kdcli.models import checkpoint
from kdcli.models.layers import LayerSummary, ModelCounts, count_network

_IMAGE_SIZE = 32  # of a network given by name
_MOST_VALUES = 16  # of a tensor that is listed; of larger ones the shape


@dataclass(frozen=True)
class ModelInfo:
    """Description of a model."""

    kind: str  # checkpoint, onnx or network
    arch: str | None  # the network's name; None in an ONNX file of another program
    input_size: tuple[int, int, int]  # (H, W, C) of the raw images
    resize: int  # pixels of the shorter side before the centre crop; 0: no crop
    gives: str  # logits, probabilities or sigmoids
    classes: tuple[str, ...]  # names in the order of the outputs
    precision: str  # fp32, fp16 or int8
    parameters: int  # values of the network
    macs: int | None  # multiply-accumulates of one image in convolutions and linear layers; None if unknown
    layers: tuple[LayerSummary, ...]  # in the order they run
    file_bytes: int | None = None
    sha256: str | None = None  # of the file
    preprocess: dict[str, Any] | None = None  # name, settings and constants, if known
    provenance: dict[str, Any] = field(default_factory=dict)  # origin, as recorded in the file
    weights_sha256: str | None = None  # of a checkpoint's tensors, whatever else it records


def info(model: str, config: InfoConfig) -> ModelInfo:
    """Description of a file, or of a network by its name; a KdError if there is no such model."""
    path = Path(model)
    if models.is_network(model) and not path.is_file():
        return _network_info(model, config)
    loaded = load_model(path, assumed=config)
    arch = loaded.metadata.get("kd.arch") if isinstance(loaded, OnnxClassifier) else loaded.arch
    about = loaded.input_size, loaded.resize, loaded.gives, loaded.classes
    constants = None if loaded.preprocess is None else _constants(loaded.preprocess)
    file = loaded.file_bytes, loaded.file_sha256, constants, loaded.provenance
    weights = None if isinstance(loaded, OnnxClassifier) else checkpoint.digest(loaded.network.state_dict())
    return ModelInfo(kind_of(path), arch, *about, *_work(loaded.counts()), *file, weights)


def _network_info(name: str, config: InfoConfig) -> ModelInfo:
    side = config.image_size or _IMAGE_SIZE
    size = side, side, 1 if config.grey else 3
    network = models.build(name, classes=config.classes, input_size=size)
    counts = count_network(network, torch.zeros(1, size[2], side, side))
    classes = tuple(map(str, range(config.classes)))
    return ModelInfo("network", name, size, 0, "logits", classes, *_work(counts))


def _work(counts: ModelCounts) -> tuple[str, int, int | None, tuple[LayerSummary, ...]]:
    return counts.precision, counts.parameters, counts.macs, counts.layers


def _constants(preprocess: Preprocess) -> dict[str, Any]:
    """Name, settings and tensors: small ones as numbers, others as their shapes."""
    tensors = {
        name: [round(number, 4) for number in value.flatten().tolist()]
        if value.numel() <= _MOST_VALUES
        else dims(value.shape)
        for name, value in preprocess.state_dict().items()
    }
    return {"name": preprocess.name, **preprocess.args(), **tensors}
