"""What an exported file says of itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from kdcli import __version__
from kdcli.base.config import ExportConfig
from kdcli.deploy import onnx_model
from kdcli.deploy.int8 import Quantisation, Recipe
from kdcli.models import Classifier


def metadata_of(classifier: Classifier, sha256: str, config: ExportConfig) -> dict[str, str]:
    """What the file says of itself: strings by key."""
    provenance = _without_paths(classifier.provenance)
    teacher, teacher_sha256 = provenance.get("teacher"), None
    if isinstance(teacher, dict):
        teacher_sha256 = teacher.get("sha256")
        teacher = teacher.get("name") or teacher.get("path")
    remarks: dict[str, Any] = {
        "kd.format": onnx_model.FORMAT,
        "kd.version": __version__,
        "kd.classes": json.dumps(list(classifier.classes), ensure_ascii=False),
        "kd.arch": classifier.arch,
        "kd.method": provenance.get("method"),
        "kd.teacher": teacher,
        "kd.teacher_sha256": teacher_sha256,
        "kd.test_accuracy": provenance.get("test_accuracy"),
        "kd.provenance": json.dumps(provenance, ensure_ascii=False, sort_keys=True, default=str),
        "kd.preprocess": onnx_model.encode_preprocess(classifier.preprocess),
        "kd.preprocess_included": "yes" if config.with_preprocessing else "no",
        "kd.input_size": json.dumps(list(classifier.input_size)),
        "kd.layout": "uint8 NHWC RGB" if config.with_preprocessing else "float32 NCHW, preprocessed",
        "kd.output": "probabilities" if config.with_preprocessing else "logits",
        "kd.checkpoint_sha256": sha256,
    }
    return {key: str(value) for key, value in remarks.items() if value is not None}


def of_int8(remarks: dict[str, str], quantisation: Quantisation) -> dict[str, str]:
    """The remarks of a quantised file: what was measured of the float network is not said of it."""
    measured = ("test_accuracy", "agreement")
    provenance = json.loads(remarks["kd.provenance"])
    provenance = {f"float_{key}" if key in measured else key: value for key, value in provenance.items()}
    kept = {"kd.float_test_accuracy" if key == "kd.test_accuracy" else key: v for key, v in remarks.items()}
    recipe = Recipe.parse(quantisation.recipe)
    how = {
        "weights": f"int8 per {'channel' if recipe.per_channel else 'tensor'}",
        "activations": "int8" if recipe.signed else "uint8",
        **asdict(quantisation),
    }
    return {
        **kept,
        "kd.provenance": json.dumps(provenance, ensure_ascii=False, sort_keys=True),
        "kd.quantisation": json.dumps(how, sort_keys=True),
    }


def _without_paths(value: Any) -> Any:
    """Absolute paths shortened to their last part: a file that is given away says nothing of this machine."""
    if isinstance(value, dict):
        return {str(key): _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if isinstance(value, str):
        for kind in (PurePosixPath(value), PureWindowsPath(value)):
            if kind.is_absolute() or value.startswith("~"):
                return kind.name
    return value
