"""Checkpoints and ONNX files as models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdcli import models
from kdcli.models import Classifier

if TYPE_CHECKING:  # importing onnxruntime takes a third of a second
    from kdcli.deploy.onnx_model import OnnxClassifier


def load_model(path: Path, threads: int = 0) -> Classifier | OnnxClassifier:
    """A checkpoint (.pt) or an ONNX file as a model that gives logits for images.

    Raises:
        KdError: missing, unreadable, or neither.
    """
    if path.suffix.lower() == ".onnx":
        from kdcli.deploy.onnx_model import OnnxClassifier

        return OnnxClassifier.load(path, threads)
    return models.load(path)
