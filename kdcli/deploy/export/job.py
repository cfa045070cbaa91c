"""The images of an export, and its steps: verify, quantise, measure."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from kdcli import models
from kdcli.base import metrics
from kdcli.base.config import ExportConfig
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress
from kdcli.data import ImageSet
from kdcli.data.split import split_validation
from kdcli.deploy import int8
from kdcli.deploy.export.parity import BATCHES, Parity, check_parity, run
from kdcli.deploy.int8 import Quantiser, Recipe, RecipeTrial
from kdcli.deploy.onnx_model import OnnxRunner
from kdcli.deploy.onnx_model.metadata import add_quantisation
from kdcli.deploy.onnx_model.translate import ExportedModule, file_bytes, fix_batch
from kdcli.models import Classifier

_CALIBRATION_BATCH = 32
_DROP_BATCH = 256
_SELECTION = 1024  # images for the choice of an int8 recipe
_MOST_HELD_OUT = 5000  # for --max-drop without a known validation split
_Indices = npt.NDArray[np.int64]
_Inputs = npt.NDArray[Any]


@dataclass(frozen=True)
class Samples:
    """Sorted, disjoint indices of training images."""

    parity: _Indices  # of the parity check, on which int8 is measured too
    calibration: _Indices  # set the ranges of int8 activations
    selection: _Indices  # for the choice between int8 recipes
    held_out: _Indices  # for --max-drop
    held_out_name: str  # the validation split, or its replacement


def choose_samples(provenance: dict[str, Any], train: ImageSet, config: ExportConfig) -> Samples:
    """Choose images, the same for the same counts; the validation split, where known, serves `--max-drop` alone."""
    pool, held_out, name = np.arange(len(train)), np.arange(0), "validation split"
    recorded = provenance.get("data", {})  # the data of the training that made the model
    same = isinstance(recorded, dict) and recorded.get("fingerprint_train") == train.fingerprint
    if same and (recorded.get("val_fraction") or train.validation):
        pool, held_out = split_validation(train.labels, recorded.get("val_fraction") or 0, train.validation)
    elif config.max_drop is not None:
        count = min(_MOST_HELD_OUT, len(train) // 4)
        order = np.random.default_rng(1).permutation(len(train))
        pool, held_out, name = np.sort(order[count:]), np.sort(order[:count]), "held-out training images"
    if len(pool) < max(BATCHES) + 1:
        raise KdError(f"the data has {len(pool)} training images; at least {max(BATCHES) + 1} are needed")
    if config.max_drop is not None and not len(held_out):
        raise KdError("there are no images to measure --max-drop on", "Pass more with --data.")
    parity, calibration, selection = disjoint_indices(
        len(pool),
        config.parity_images,
        config.calibration_images if config.recipe else 0,
        _SELECTION if config.recipe == "auto" else 0,
    )
    return Samples(pool[parity], pool[calibration], pool[selection], held_out, name)


def disjoint_indices(
    available: int, parity: int, calibration: int, selection: int = 0
) -> tuple[_Indices, _Indices, _Indices]:
    """Three sorted, disjoint random parts of `range(available)`, the same for the same counts.

    If there are too few, all shrink in proportion.
    """
    wanted = parity + calibration + selection
    if wanted > available:
        parity = min(max(*BATCHES, available * parity // wanted), available)
        rest = available - parity
        selection = rest * selection // max(1, calibration + selection)
        calibration = rest - selection if calibration else 0
    order = np.random.default_rng(0).permutation(available)
    ends = np.cumsum([parity, calibration, selection])
    return np.sort(order[: ends[0]]), np.sort(order[ends[0] : ends[1]]), np.sort(order[ends[1] : ends[2]])


@dataclass(frozen=True)
class Quantisation:
    """How a network was quantised, and the cost."""

    recipe: str  # name of a `Recipe`
    calibration_images: int  # training images that set the activation ranges
    reduce_range: bool  # weights have 7 bits, because 8-bit products could overflow on this CPU
    images: int  # training images, not used for calibration, on which the result was measured
    agreement: float  # per cent of them with the float32 network's top-1 class
    float_accuracy: float  # per cent
    int8_accuracy: float  # per cent


@dataclass(frozen=True)
class AccuracyDrop:
    """Loss of accuracy of the file against the checkpoint."""

    images: int  # number of images it was measured on
    measured_on: str  # the model's validation split, or held-out training images where no split is known
    float_accuracy: float  # of the checkpoint, per cent
    accuracy: float  # of the file, per cent
    points: float  # the first minus the second
    allowed: float  # --max-drop


@dataclass(frozen=True)
class ExportJob:
    """A classifier, training images and settings, with the steps of an export as methods."""

    classifier: Classifier
    train: ImageSet
    samples: Samples
    config: ExportConfig
    on_event: OnEvent

    def inputs(self, indices: _Indices) -> _Inputs:
        """Train images as the exported file takes them."""
        raw = np.ascontiguousarray(self.train.images[indices])
        if self.config.with_preprocessing:
            return raw
        with torch.inference_mode():
            return np.ascontiguousarray(self.classifier.prepare(torch.from_numpy(raw)).numpy())

    def logits(self, indices: _Indices, task: str = "evaluating") -> Tensor:
        """The checkpoint's logits for training images."""
        images = self.train.images
        return models.predict_logits(self.classifier, images, indices, task=task, on_event=self.on_event)

    def labels(self, indices: _Indices) -> Tensor:
        """Labels of training images."""
        return torch.from_numpy(np.asarray(self.train.labels[indices]))

    def verify(self, model: onnx.ModelProto, metadata: dict[str, str]) -> tuple[bytes, Tensor, Parity]:
        """The float32 file, its outputs for the parity images, and the comparison."""
        inputs, logits = self.inputs(self.samples.parity), self.logits(self.samples.parity)
        module = ExportedModule(self.classifier, with_preprocessing=self.config.with_preprocessing)
        content, batch = file_bytes(model, metadata), self.config.batch
        outputs, parity = check_parity(content, module, model, inputs, logits, BATCHES)
        if batch is not None:
            content = file_bytes(fix_batch(model, batch), metadata)
            outputs, parity = check_parity(content, module, model, inputs, logits, (batch,))
        return content, outputs, parity

    def quantise(
        self, model: onnx.ModelProto, metadata: dict[str, str], float_content: bytes, reference: Tensor
    ) -> tuple[bytes, Quantisation | None, tuple[RecipeTrial, ...]]:
        """The int8 file by the given recipe or the best one, its cost, and the trials of `auto`.

        The float32 file, with no cost, where `auto` finds no faster one; `reference`: its outputs in `verify`.
        """
        quantiser = Quantiser(model, self._calibration_batches)
        trials: tuple[RecipeTrial, ...] = ()
        recipe = str(self.config.recipe)
        if recipe == "auto":
            inputs, logits = self.inputs(self.samples.selection), self.logits(self.samples.selection)
            dynamic = file_bytes(model, metadata)  # trials are timed with one image, whatever --batch is
            trials, quantised = int8.search(quantiser, dynamic, inputs, logits, self.on_event)
            if quantised is None:
                return float_content, None, trials
            recipe = next(trial.recipe for trial in trials if trial.chosen)
        else:
            quantised = quantiser.quantise(Recipe.parse(recipe))
        if self.config.batch is not None:
            quantised = fix_batch(quantised, self.config.batch)
        quantisation = self._measure_int8(quantised, recipe, reference)
        parsed = Recipe.parse(recipe)
        described = {
            "weights": f"int8 per {'channel' if parsed.per_channel else 'tensor'}",
            "activations": "int8" if parsed.signed else "uint8",
            **asdict(quantisation),
        }
        return file_bytes(quantised, add_quantisation(metadata, described)), quantisation, trials

    def _calibration_batches(self) -> Iterator[_Inputs]:
        calibration = self.samples.calibration
        for start in range(0, len(calibration), _CALIBRATION_BATCH):
            indices = calibration[start : start + _CALIBRATION_BATCH]
            self.on_event(Progress("calibrating", start + len(indices), len(calibration)))
            yield self.inputs(indices)

    def _measure_int8(self, quantised: onnx.ModelProto, recipe: str, reference: Tensor) -> Quantisation:
        """Agreement and accuracy of an int8 network on the parity images."""
        parity = self.samples.parity
        runner = OnnxRunner(quantised.SerializeToString(), name="the quantised file")
        outputs = torch.from_numpy(runner.run(self.inputs(parity), max(BATCHES)))
        if not bool(torch.isfinite(outputs).all()):
            raise KdError("the quantised network gives values that are not finite; no file was written")
        labels = self.labels(parity)
        return Quantisation(
            recipe=recipe,
            calibration_images=len(self.samples.calibration),
            reduce_range=int8.needs_reduced_range(),
            images=len(outputs),
            agreement=metrics.agreement(outputs, reference),
            float_accuracy=metrics.accuracy(reference, labels),
            int8_accuracy=metrics.accuracy(outputs, labels),
        )

    def measure_drop(self, content: bytes, allowed: float) -> AccuracyDrop:
        """Loss of accuracy of the file against the checkpoint; a KdError if it is more than allowed."""
        held_out, name = self.samples.held_out, self.samples.held_out_name
        labels = self.labels(held_out)
        expected = self.logits(held_out, f"accuracy on the {name}")
        runner = OnnxRunner(content, name="the exported file")
        parts = []
        for start in range(0, len(held_out), _DROP_BATCH):
            inputs = self.inputs(held_out[start : start + _DROP_BATCH])
            parts.append(run(runner, inputs, len(inputs), probabilities=self.config.with_preprocessing))
        accuracy = metrics.accuracy(torch.cat(parts), labels)
        float_accuracy = metrics.accuracy(expected, labels)
        points = round(float_accuracy - accuracy, 9)  # without rounding errors above the limit
        if points > allowed:
            other = "Try --int8-recipe auto or another recipe, or allow" if self.config.recipe else "Allow"
            raise KdError(
                f"the file loses {points:.2f} points of accuracy on the {name} "
                f"({float_accuracy:.2f} % → {accuracy:.2f} %, n = {len(labels):,}); --max-drop allows "
                f"{allowed:g}; no file was written",
                f"{other} more.",
            )
        return AccuracyDrop(len(labels), name, float_accuracy, accuracy, points, allowed)
