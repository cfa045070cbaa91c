"""Checkpoint → one ONNX file that is proved to give what the checkpoint gives, or no file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from kdcli import data, models
from kdcli.base import metrics
from kdcli.base.config import ExportConfig
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import OnEvent, Progress, ignore
from kdcli.base.files import atomic_path, sha256_file
from kdcli.data import ImageSet, Splits
from kdcli.deploy import int8, onnx_model
from kdcli.deploy.export.blame import first_difference
from kdcli.deploy.export.images import Chosen, choose
from kdcli.deploy.export.parity import BATCHES, Parity, check_parity, run
from kdcli.deploy.export.remarks import metadata_of, of_int8
from kdcli.deploy.int8 import Quantisation, Quantiser, Recipe, Trial
from kdcli.deploy.onnx_model.translate import finish, fix_batch, interface_of, to_onnx
from kdcli.models import Classifier

__all__ = [
    "Drop",
    "ExportResult",
    "Parity",
    "Quantisation",
    "default_output",
    "export",
    "export_classifier",
    "to_onnx",
]

EXPORTS_DIR = Path("exports")


@dataclass(frozen=True)
class Drop:
    """What accuracy the file lost, and was allowed to lose.

    Attributes:
        images: how many it was measured on.
        measured_on: the model's validation split; train images kept apart, where no split is known.
        float_accuracy, accuracy: of checkpoint and file, per cent.
        points: the first minus the second.
        allowed: `--max-drop`.
    """

    images: int
    measured_on: str
    float_accuracy: float
    accuracy: float
    points: float
    allowed: float


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
        trials: the int8 recipes that `--int8-recipe auto` tried; with `quantisation` None, none of them was
            faster than float32, which was kept.
        batch: images a run; None: any number.
        drop: what `--max-drop` was asked for; None without it.
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
    trials: tuple[Trial, ...] = ()
    batch: int | None = None
    drop: Drop | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values with a `schema_version`."""
        document = asdict(self)
        document["path"], document["checkpoint"] = self.path.as_posix(), self.checkpoint.as_posix()
        return {"schema_version": 1, **document}


def export(
    checkpoint: Path, config: ExportConfig, images: Splits | None = None, on_event: OnEvent = ignore
) -> ExportResult:
    """Write a checkpoint as one ONNX file, and prove that it gives the same.

    Args:
        checkpoint: a `.pt` file.
        config: what to write and where.
        images: data whose *train* images calibrate int8, choose its recipe and prove parity; by default what
            `config` or the checkpoint's provenance names.
        on_event: told of progress.

    Raises:
        KdError: the file cannot be written, does not give what the checkpoint gives, or loses more than
            `max_drop`. No file appears then, and an earlier one of that name is untouched.
    """
    target = config.output or default_output(checkpoint, config)
    if target.suffix.lower() != ".onnx" or target.is_dir():
        raise UsageError(f"--output {target}: must be a file name that ends in .onnx")
    classifier = models.load(checkpoint).eval()
    images = images or load_data(classifier, checkpoint, config, on_event)
    _check_data(classifier, images.train)
    chosen = choose(classifier.provenance, images.train, config)
    on_event(Progress("exporting", 0, 3, "steps"))
    model = to_onnx(classifier, opset=config.opset, with_preprocessing=config.with_preprocessing)
    remarks = metadata_of(classifier, sha256_file(checkpoint), config)
    on_event(Progress("exporting", 1, 3, "steps"))
    raw = np.asarray(images.train.images[chosen.parity])
    quantisation: Quantisation | None = None
    trials: tuple[Trial, ...] = ()
    drop: Drop | None = None
    try:
        with atomic_path(target) as temporary:
            _write(finish(model, remarks), temporary)
            inputs = _inputs(classifier, raw, config.with_preprocessing)
            with torch.inference_mode():
                logits = models.predict_logits(classifier, raw)
            interface = interface_of(classifier, with_preprocessing=config.with_preprocessing)
            explain = partial(first_difference, interface, model, temporary)
            outputs, parity = check_parity(temporary, inputs, logits, config.with_preprocessing, explain)
            if config.batch is not None:
                fixed = finish(fix_batch(model, config.batch), remarks)
                _write(fixed, temporary)
                outputs, parity = check_parity(
                    temporary, inputs, logits, config.with_preprocessing, explain, (config.batch,)
                )
            on_event(Progress("exporting", 2, 3, "steps"))
            if config.recipe:
                quantised, quantisation, trials = _quantise(
                    classifier, model, temporary, images.train, chosen, config, on_event
                )
                _write(finish(quantised, remarks), temporary)
                labels = images.train.labels[chosen.parity]
                quantisation = _judge_int8(quantisation, temporary, inputs, outputs, labels)
                _write(finish(quantised, of_int8(remarks, quantisation)), temporary)
            if config.max_drop is not None:
                drop = _dropped(classifier, temporary, images.train, chosen, config, on_event)
            size = temporary.stat().st_size
            digest = sha256_file(temporary)
    except _Slower as slower:
        kept = export(
            checkpoint, config.model_copy(update={"int8": False, "int8_recipe": None}), images, on_event
        )
        return replace(kept, trials=slower.trials)
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
        trials=trials,
        batch=config.batch,
        drop=drop,
    )


class _Slower(Exception):
    """No int8 recipe is faster than float32 here."""

    def __init__(self, trials: tuple[Trial, ...]) -> None:
        super().__init__()
        self.trials = trials


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
    suffix = ("-images" if config.with_preprocessing else "") + ("-int8" if config.recipe else "")
    if config.batch is not None:
        suffix += f"-batch{config.batch}"
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


def _inputs(classifier: Classifier, raw: npt.NDArray[np.uint8], with_preprocessing: bool) -> npt.NDArray[Any]:
    """Raw images (N, H, W, C) as the exported file takes them."""
    if with_preprocessing:
        return np.ascontiguousarray(raw)
    with torch.inference_mode():
        return np.ascontiguousarray(classifier.prepare(torch.from_numpy(raw)).numpy())


def _quantise(
    classifier: Classifier,
    model: onnx.ModelProto,
    float_file: Path,
    train: ImageSet,
    chosen: Chosen,
    config: ExportConfig,
    on_event: OnEvent,
) -> tuple[onnx.ModelProto, Quantisation, tuple[Trial, ...]]:
    """The network by the recipe that is asked for, or by the one that is found.

    Raises:
        _Slower: none is faster than float32.
    """
    raw_inputs = config.with_preprocessing

    def batches() -> Iterator[npt.NDArray[Any]]:
        for start in range(0, len(chosen.calibration), 32):
            numbers = chosen.calibration[start : start + 32]
            on_event(Progress("calibrating", start + len(numbers), len(chosen.calibration)))
            yield _inputs(classifier, np.asarray(train.images[numbers]), raw_inputs)

    quantiser = Quantiser(model, batches)
    trials: tuple[Trial, ...] = ()
    if config.recipe == "auto":
        raw = np.asarray(train.images[chosen.selection])
        with torch.inference_mode():
            reference = models.predict_logits(classifier, raw)
        inputs = _inputs(classifier, raw, raw_inputs)
        trials, found = int8.search(quantiser, float_file.read_bytes(), inputs, reference, on_event)
        if found is None:
            raise _Slower(trials)
        quantised, recipe = found, next(trial.recipe for trial in trials if trial.chosen)
    else:
        recipe = str(config.recipe)
        quantised = quantiser.make(Recipe.parse(recipe))
    if config.batch is not None:
        quantised = fix_batch(quantised, config.batch)
    count = len(chosen.calibration)
    return quantised, Quantisation(recipe, count, reduce_range=quantiser.reduce_range), trials


def _dropped(
    classifier: Classifier,
    path: Path,
    train: ImageSet,
    chosen: Chosen,
    config: ExportConfig,
    on_event: OnEvent,
) -> Drop:
    """Measure what the file loses against the checkpoint, in points of accuracy.

    Raises:
        KdError: it is more than `config.max_drop`.
    """
    assert config.max_drop is not None
    truth = torch.from_numpy(np.asarray(train.labels[chosen.held_out]))
    name = f"accuracy on the {chosen.held_out_name}"
    expected = models.predict_logits(classifier, train.images, chosen.held_out, task=name, on_event=on_event)
    runner = onnx_model.session(path.read_bytes(), name="the exported file")
    parts = []
    for start in range(0, len(truth), 256):
        raw = np.asarray(train.images[chosen.held_out[start : start + 256]])
        inputs = _inputs(classifier, raw, config.with_preprocessing)
        parts.append(run(runner, inputs, config.batch or len(inputs), config.with_preprocessing))
    accuracy, float_accuracy = metrics.accuracy(torch.cat(parts), truth), metrics.accuracy(expected, truth)
    points = float_accuracy - accuracy
    if points > config.max_drop:
        raise KdError(
            f"the file loses {points:.2f} points of accuracy on the {chosen.held_out_name} "
            f"({float_accuracy:.2f} % → {accuracy:.2f} %, n = {len(truth):,}); --max-drop allows "
            f"{config.max_drop:g}; no file was written",
            "Try --int8-recipe auto or another recipe, or allow more." if config.recipe else "Allow more.",
        )
    return Drop(len(truth), chosen.held_out_name, float_accuracy, accuracy, points, config.max_drop)


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
    return int8.judged(
        quantisation,
        images=len(inputs),
        agreement=metrics.agreement(outputs, reference),
        float_accuracy=metrics.accuracy(reference, truth),
        int8_accuracy=metrics.accuracy(outputs, truth),
    )


def _write(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString(deterministic=True))


def _check_data(classifier: Classifier, train: ImageSet) -> None:
    reason = data.incompatibility(classifier.classes, classifier.input_size, train)
    if reason:
        raise KdError(f"the model {reason}", "Name data that fits with --data.")
