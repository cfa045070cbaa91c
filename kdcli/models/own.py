"""A `torch.nn.Module` of the user as a network of this process, and as a classifier."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.base.config import InputSettings
from kdcli.base.errors import KdError, is_out_of_memory
from kdcli.base.text import dims, first_line
from kdcli.data import Splits
from kdcli.data.preprocess import MeanStd, Preprocess
from kdcli.models import registry
from kdcli.models.checkpoint import digest
from kdcli.models.classifier import Classifier, predict_logits

_DATA = ("image_size", "crop", "grey", "skip_broken", "test_fraction")  # see `data.recorded_source`


def classifier(network: nn.Module, data: Splits, assumed: InputSettings) -> Classifier:
    """A copy of a module as a classifier of these classes and images, registered for `--student`.

    The module takes pixels float32 (B, C, H, W), (value 0–255 · scale − mean) / std as assumed, and gives logits
    (B, classes). Equal layers and shapes have one name, by which this process loads checkpoints of them.
    """
    name, size = type(network).__name__, data.train.input_size
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    arch = f"{name}-{digest([repr(network), shapes])[:8]}"
    order, scaling = assumed.channel_order or "rgb", assumed.mean_std
    preprocess = MeanStd.described(scaling, size[2], order) if scaling else Preprocess(order)
    settings = {key: value for key, value in data.settings.items() if key in _DATA}
    provenance: dict[str, Any] = {"kind": "pretrained", "data": {"spec": data.spec, **settings}}
    images = np.random.default_rng(0).integers(0, 256, (2, *size), dtype=np.uint8)
    try:
        own = copy.deepcopy(network).cpu()
        registry.register(arch)(lambda classes, input_size: copy.deepcopy(own).to(torch.get_default_device()))
        made = Classifier(
            copy.deepcopy(own),
            preprocess,
            arch=arch,
            arch_args={},
            classes=data.train.classes,
            input_size=size,
            crop=data.train.crop,
        ).eval()
        logits: Any = predict_logits(made, images)
    except Exception as error:  # of the module
        if is_out_of_memory(error):
            raise
        raise KdError(
            f"{name} fails on images of {dims(size)}: {first_line(error)}",
            "It takes float32 (B, C, H, W); see image_size and grey of kd.load_data.",
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (2, len(made.classes)):
        raise KdError(
            f"{name} gives {dims(logits.shape)} for 2 images of {len(made.classes)} classes",
            f"It must give logits (B, {len(made.classes)}): replace its last layer.",
        )
    # other code or attributes with the same weights are another teacher
    made.provenance = {**provenance, "outputs": digest(logits)}
    return made
