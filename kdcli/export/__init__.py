"""Checkpoint → one ONNX file that is proved to give what the checkpoint gives, or no file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from kdcli import __version__, data, metrics, models, onnx_model, quantize
from kdcli.config import ExportConfig
from kdcli.data import ImageSet, Splits
from kdcli.errors import KdError, UsageError
from kdcli.events import OnEvent, Progress, ignore
from kdcli.export.blame import first_difference
from kdcli.export.parity import BATCHES, Parity, check_parity, run
from kdcli.files import atomic_path, sha256_file
from kdcli.models import Classifier
from kdcli.onnx_model.translate import finish, interface_of, silence, to_onnx
from kdcli.quantize import Quantisation

__all__ = [
    "ExportResult",
    "Parity",
    "Quantisation",
    "default_output",
    "export",
    "export_classifier",
    "to_onnx",
]

EXPORTS_DIR = Path("exports")
_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ExportResult:
    """What was written and what was proved of it.

    Attributes:
        path: the ONNX file.
        size_bytes: of the file.
        sha256: of the file.
        checkpoint: where it came from.
        opset: ONNX operator set.
        with_preprocessing: takes raw uint8 (N, H, W, C) images and gives probabilities.
        data_label: the data whose train images were used.
        parity: of the float32 network.
        quantisation: what int8 costs; None for a float32 file.
    """

    path: Path
    size_bytes: int
    sha256: str
    checkpoint: Path
    opset: int
    with_preprocessing: bool
    data_label: str
    parity: Parity
    quantisation: Quantisation | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values with a `schema_version`."""
        document = asdict(self)
        document["path"], document["checkpoint"] = self.path.as_posix(), self.checkpoint.as_posix()
        return {"schema_version": 1, **document}


def export(
    checkpoint: Path, config: ExportConfig, images: Splits | None = None, on_event: OnEvent = ignore
) -> ExportResult:
    """Write a checkpoint as one ONNX file with a dynamic batch, and prove that it gives the same.

    Args:
        checkpoint: a `.pt` file.
        config: what to write and where.
        images: data whose *train* images calibrate int8 and prove parity; by default what `config` or the
            checkpoint's provenance names.
        on_event: told of progress.

    Raises:
        KdError: the file cannot be written, or it does not give what the checkpoint gives. No file appears
            then, and an earlier one of that name is untouched.
    """
    target = config.output or default_output(checkpoint, config)
    if target.suffix.lower() != ".onnx" or target.is_dir():
        raise UsageError(f"--output {target}: must be a file name that ends in .onnx")
    classifier = models.load(checkpoint).eval()
    images = images or load_data(classifier, checkpoint, config, on_event)
    _check_data(classifier, images.train)
    parity_indices, calibration_indices = choose_images(
        len(images.train), config.parity_images, config.calibration_images if config.int8 else 0
    )
    on_event(Progress("exporting", 0, 3, "steps"))
    model = to_onnx(classifier, opset=config.opset, with_preprocessing=config.with_preprocessing)
    remarks = metadata_of(classifier, sha256_file(checkpoint), config)
    on_event(Progress("exporting", 1, 3, "steps"))
    raw = np.asarray(images.train.images[parity_indices])
    quantisation = None
    try:
        with atomic_path(target) as temporary:
            _write(finish(model, remarks), temporary)
            inputs = _inputs(classifier, raw, config.with_preprocessing)
            with torch.inference_mode():
                logits = models.predict(classifier, raw)
            interface = interface_of(classifier, with_preprocessing=config.with_preprocessing)
            explain = partial(first_difference, interface, model, temporary)
            outputs, parity = check_parity(temporary, inputs, logits, config.with_preprocessing, explain)
            on_event(Progress("exporting", 2, 3, "steps"))
            if config.int8:
                quantised, quantisation = _quantise(
                    classifier,
                    model,
                    images.train,
                    calibration_indices,
                    with_preprocessing=config.with_preprocessing,
                    on_event=on_event,
                )
                _write(finish(quantised, remarks), temporary)
                quantisation = _judge_int8(
                    quantisation, temporary, inputs, outputs, images.train.labels[parity_indices]
                )
                _write(finish(quantised, _of_int8(remarks, quantisation)), temporary)
            size = temporary.stat().st_size
            digest = sha256_file(temporary)
    except OSError as error:
        raise KdError(
            f"cannot write {target}: {error.strerror or error}",
            "Check free space and permissions; an earlier file of that name is unchanged.",
        ) from error
    on_event(Progress("exporting", 3, 3, "steps"))
    return ExportResult(
        path=target,
        size_bytes=size,
        sha256=digest,
        checkpoint=checkpoint,
        opset=config.opset,
        with_preprocessing=config.with_preprocessing,
        data_label=images.label,
        parity=parity,
        quantisation=quantisation,
    )


def export_classifier(
    classifier: Classifier,
    config: ExportConfig,
    images: npt.NDArray[np.uint8],
    label: str,
    on_event: OnEvent = ignore,
) -> ExportResult:
    """`export` of a classifier that lies in no file, proved on these images.

    Args:
        config: names the output.
        images: uint8 (N, H, W, C).
        label: what they are.
    """
    labels = np.zeros(len(images), np.int64)
    split = ImageSet(images, labels, classifier.classes, fingerprint="")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "classifier.pt"
        classifier.save(checkpoint)
        return export(checkpoint, config, Splits(label, label, split, split), on_event)


def default_output(checkpoint: Path, config: ExportConfig) -> Path:
    """`exports/<run>.onnx` for `runs/<run>/student.pt`, else `exports/<file name>.onnx`; or with a suffix."""
    folder = checkpoint.parent
    in_run = checkpoint.name == "student.pt" and (
        folder.parent.name == "runs" or (folder / "config.toml").is_file()
    )
    stem = folder.name if in_run else checkpoint.stem
    suffix = ("-images" if config.with_preprocessing else "") + ("-int8" if config.int8 else "")
    if config.opset != ExportConfig.model_fields["opset"].default:
        suffix += f"-opset{config.opset}"
    return EXPORTS_DIR / f"{stem}{suffix}.onnx"


def load_data(classifier: Classifier, checkpoint: Path, config: ExportConfig, on_event: OnEvent) -> Splits:
    """The data that `config` names, else the data the model was trained on.

    Raises:
        KdError: neither is known, or it is not there.
    """
    spec, skip_broken = data.source_for(checkpoint, classifier.provenance, config.data, config.skip_broken)
    return data.load(
        spec,
        data_dir=config.data_dir,
        cache_dir=config.cache_dir,
        fit_to=classifier.input_size,
        skip_broken=skip_broken,
        on_event=on_event,
    )


def choose_images(available: int, parity: int, calibration: int) -> tuple[_Indices, _Indices]:
    """Disjoint train images for parity and calibration: always the same ones for the same numbers.

    Returns:
        Sorted indices (≤ parity,), (≤ calibration,). If there are too few, both shrink in proportion.
    """
    wanted = parity + calibration
    if wanted > available:
        parity = min(max(*BATCHES, available * parity // wanted), available)
        calibration = available - parity if calibration else 0
    order = np.random.default_rng(0).permutation(available)
    return np.sort(order[:parity]), np.sort(order[parity : parity + calibration])


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


def _inputs(classifier: Classifier, raw: npt.NDArray[np.uint8], with_preprocessing: bool) -> npt.NDArray[Any]:
    """Raw images (N, H, W, C) as the exported file takes them."""
    if with_preprocessing:
        return np.ascontiguousarray(raw)
    with torch.inference_mode():
        return np.ascontiguousarray(classifier.prepare(torch.from_numpy(raw)).numpy())


def _quantise(
    classifier: Classifier,
    model: onnx.ModelProto,
    train: ImageSet,
    indices: _Indices,
    *,
    with_preprocessing: bool,
    on_event: OnEvent,
) -> tuple[onnx.ModelProto, Quantisation]:
    def batches() -> Iterator[npt.NDArray[Any]]:
        for start in range(0, len(indices), 32):
            raw = np.asarray(train.images[indices[start : start + 32]])
            on_event(Progress("calibrating", min(start + 32, len(indices)), len(indices)))
            yield _inputs(classifier, raw, with_preprocessing)

    with silence():
        return quantize.quantise(model, batches(), len(indices))


def _of_int8(remarks: dict[str, str], quantisation: Quantisation) -> dict[str, str]:
    """The remarks of a quantised file: what was measured of the float network is not said of it."""
    measured = ("test_accuracy", "agreement")
    provenance = json.loads(remarks["kd.provenance"])
    provenance = {f"float_{key}" if key in measured else key: value for key, value in provenance.items()}
    kept = {"kd.float_test_accuracy" if key == "kd.test_accuracy" else key: v for key, v in remarks.items()}
    how = {"weights": "int8 per channel", "activations": "uint8", **asdict(quantisation)}
    return {
        **kept,
        "kd.provenance": json.dumps(provenance, ensure_ascii=False, sort_keys=True),
        "kd.quantisation": json.dumps(how, sort_keys=True),
    }


def _judge_int8(
    quantisation: Quantisation,
    path: Path,
    inputs: npt.NDArray[Any],
    reference: Tensor,
    labels: npt.NDArray[np.int64],
) -> Quantisation:
    runner = onnx_model.session(path.read_bytes(), name="the quantised file")
    outputs = run(runner, inputs, max(BATCHES), False)
    if not bool(torch.isfinite(outputs).all()) or outputs.shape != reference.shape:
        raise KdError("the quantised network gives values that are not finite; no file was written")
    truth = torch.from_numpy(np.asarray(labels))
    return quantize.judged(
        quantisation,
        images=len(inputs),
        agreement=metrics.agreement(outputs, reference),
        float_accuracy=metrics.accuracy(reference, truth),
        int8_accuracy=metrics.accuracy(outputs, truth),
    )


def _write(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString(deterministic=True))


def _check_data(classifier: Classifier, train: ImageSet) -> None:
    reason = data.misfit(classifier.classes, classifier.input_size, train)
    if reason:
        raise KdError(f"the model {reason}", "Name data that fits with --data.")
    if len(train) < max(BATCHES) + 1:
        raise KdError(f"the data has {len(train)} train images; at least {max(BATCHES) + 1} are needed")


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
