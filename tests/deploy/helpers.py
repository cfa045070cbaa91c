"""Small classifiers, images and exports shared by the tests of deploy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from kdcli import models
from kdcli.base.config import ExportConfig
from kdcli.data import ImageSet, Splits
from kdcli.data.preprocess import Photo, fit
from kdcli.deploy.export import ExportResult, export
from kdcli.deploy.onnx_model.translate import to_onnx
from kdcli.models import Classifier

CLASSES = tuple(f"class {index}" for index in range(5))


def random_splits(side: int = 16, count: int = 60) -> Splits:
    random = np.random.default_rng(3)

    def one(number: int) -> ImageSet:
        images = random.integers(0, 256, (number, side, side, 3), dtype=np.uint8)
        return ImageSet(images, random.integers(0, 5, number), CLASSES, "x")

    return Splits("random", "random", one(count), one(20))


SPLITS = random_splits()


def classifier(arch: str, preprocess: str = "mean-std", order: str = "rgb", side: int = 16) -> Classifier:
    torch.manual_seed(0)
    args = {"width": 0.5} if arch == "convnet-tiny" else {}  # widths 4, 8
    network = models.build(arch, classes=5, input_size=(side, side, 3), **args).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # fresh statistics would make it the identity
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return Classifier(
        network,
        fit(
            preprocess,
            SPLITS.train.images if side == 16 else random_splits(side).train.images,
            channel_order=order,
        ),
        arch=arch,
        arch_args=args,
        classes=CLASSES,
        input_size=(side, side, 3),
        provenance={
            "method": "kd",
            "test_accuracy": 61.5,
            "teacher": {"path": "/home/someone/secret/teacher.pt", "name": "nin"},
            "data": {"spec": "C:\\Users\\someone\\pictures", "label": "pictures"},
        },
    ).eval()


def resizing_classifier() -> Classifier:
    """A network of 16×16 in the middle of images that are resized to 20, by default of 30×30."""
    model = classifier("convnet-tiny")
    constants: Any = model.preprocess
    model.preprocess = Photo(constants.mean, constants.std, 20, 16, "bicubic")
    model.input_size = (30, 30, 3)
    return model


def exported(folder: Path, model: Classifier, **settings: object) -> ExportResult:
    checkpoint = folder / "model.pt"
    model.save(checkpoint)
    config = ExportConfig.model_validate({"output": folder / "model.onnx", "parity_images": 30, **settings})
    splits = SPLITS if model.input_size[0] == 16 else random_splits(model.input_size[0])
    return export(models.load(checkpoint), config, splits)


_TRANSLATIONS: dict[tuple[object, ...], onnx.ModelProto] = {}


def cached_to_onnx(model: Classifier, *, opset: int, with_preprocessing: bool) -> onnx.ModelProto:
    """`to_onnx`, which takes two seconds, once per session for equal networks."""
    tensors = (value.numpy().tobytes() for value in model.state_dict().values())
    key = (
        model.arch,
        model.input_size,
        opset,
        with_preprocessing,
        repr(model.preprocess),
        *map(hash, tensors),
    )
    if key not in _TRANSLATIONS:
        _TRANSLATIONS[key] = to_onnx(model, opset=opset, with_preprocessing=with_preprocessing)
    return _TRANSLATIONS[key]
