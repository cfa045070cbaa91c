"""The student: a new network by name, or one from a file; modules trained along with it; the scale of its output."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcli import data, methods, models
from kdcli.base import code
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Note, OnEvent
from kdcli.base.files import cache_folder
from kdcli.data import ImageSet, preprocess, rows
from kdcli.data.preprocess import Preprocess
from kdcli.engine.feed import TeacherOutputs, example_images
from kdcli.engine.plan import RunPlan
from kdcli.methods import Shapes, TrainConfig, Training
from kdcli.models import Classifier, checkpoint, weights
from kdcli.models.feature_extractor import FeatureExtractor, find_stages
from kdcli.teacher import CachedLogits

Int64 = npt.NDArray[np.int64]
_FITTED_PIXELS = 5_000 * 32 * 32  # of the images for a network's `fit_to_images`
_ADAPTER_SEED = 0x5EED  # differs from the run's seed: adapters do not take the student's initial weights
_CONSTANTS_VERSION = 1  # raise it when a preprocessing's fit gives other constants


def make_student(
    config: TrainConfig, train: ImageSet, samples: Int64, device: torch.device, on_event: OnEvent
) -> Classifier:
    """The network that `config.student` names, in training mode; a KdError if its file does not fit the data.

    `samples` are indices of the images on which a new network's preprocessing is measured.
    """
    made = _fresh(config, train, samples, on_event) if config.student_file is None else _stored(config, train)
    return made.to(device).train()


def check_student(config: TrainConfig, train: ImageSet) -> None:
    """Raise the errors of `make_student`, or UsageError for missing stages, without allocating weights."""
    needs_values = config.student_file is not None or code.is_own(config.student)
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if needs_values else "meta"):
        if config.student_file is None:
            size = _network_size(config, train)
            options = _network_options(config)
            network = models.build(config.student, classes=len(train.classes), input_size=size, **options)
            if (path := config.student_weights) is not None:
                weights.match(network, weights.read(path), f"--student-weights {path}")
        else:
            stored = _stored(config, train)
            network, size = stored.network, stored.network_size
        method = methods.objective(config)
        if not method.needs_features:
            return
        height, width, channels = size
        stages = find_stages(network, torch.zeros(2, channels, height, width), config.student_stages)
        hint = method.settings.get("hint_stage", 0)
        if hint > len(stages):
            raise UsageError(
                f"--hint-stage {hint}: {config.student} has {len(stages)} stages", f"Use 1 to {len(stages)}."
            )


def _fresh(config: TrainConfig, train: ImageSet, samples: Int64, on_event: OnEvent) -> Classifier:
    options = _network_options(config)
    torch.manual_seed(config.seed)
    size = _network_size(config, train)
    network = models.build(config.student, classes=len(train.classes), input_size=size, **options)
    student = Classifier(
        network.to(memory_format=torch.channels_last),
        _fitted_preprocess(config, train, samples, on_event),
        arch=config.student,
        arch_args=options,
        classes=train.classes,
        input_size=train.input_size,
        resize=train.resize,
    )
    if config.student_weights is not None:
        _start_from(network, config.student_weights, on_event)
    elif hasattr(network, "fit_to_images"):
        count = max(1, _FITTED_PIXELS // math.prod(train.input_size[:2]))
        spaced = samples[:: -(-len(samples) // count)]  # images may be sorted by class
        images = torch.from_numpy(rows.take(train.images, spaced))
        network.fit_to_images(student.prepare(images))  # type: ignore[operator]
    return student


def _network_options(config: TrainConfig) -> dict[str, Any]:
    wanted = {"dropout": config.dropout} | ({"width": config.width} if config.width != 1 else {})
    return {name: value for name, value in wanted.items() if models.accepts(config.student, name)}


def _network_size(config: TrainConfig, train: ImageSet) -> tuple[int, int, int]:
    """(H, W, C) of a new network's input."""
    side = config.student_size
    return (side, side, train.input_size[2]) if side else train.input_size


def _start_from(network: nn.Module, path: Path, on_event: OnEvent) -> None:
    """Load a state_dict; a last layer for other classes stays as it is, with a note."""
    found, head = weights.match(network, weights.read(path), f"--student-weights {path}")
    network.load_state_dict({name: found[name] for name in found if name not in head}, strict=False)
    if head:
        count = len(found[head[0]])
        on_event(Note(f"{path} is of {count} classes: the last layer is new ({', '.join(head)})"))


def _fitted_preprocess(config: TrainConfig, train: ImageSet, samples: Int64, on_event: OnEvent) -> Preprocess:
    """The student's preprocessing; its constants are measured on these samples once and cached."""
    key = {
        "version": _CONSTANTS_VERSION,
        "preprocess": config.preprocess,
        "data": train.fingerprint,
        "samples": hashlib.sha256(samples.tobytes()).hexdigest(),
    }
    path = cache_folder(config.cache_dir, "preprocess", key).with_suffix(".pt")
    fit = partial(preprocess.fit, config.preprocess, train.images, samples, on_event=on_event)
    fitted: Any = preprocess.from_spec(checkpoint.cached(path, lambda: fit().spec()))
    side = config.student_size
    return preprocess.Photo(fitted.mean, fitted.std, side, side) if side else fitted


def _stored(config: TrainConfig, train: ImageSet) -> Classifier:
    """Weights and their preprocessing from a file, without its provenance."""
    path = config.student_file
    assert path is not None
    stored = models.load(path)
    reason = data.incompatibility(stored, train)
    if reason:
        raise KdError(f"student {path} {reason}", "Student and data must belong together; see --data.")
    stored.classes, stored.provenance, stored.resize = train.classes, {}, train.resize
    stored.input_size = train.input_size  # another one where it resizes images itself
    return stored


def make_adapters(
    plan: RunPlan, student: Classifier, outputs: TeacherOutputs
) -> tuple[tuple[str, ...], dict[str, nn.Module]]:
    """Names of the student's stages that are read, and auxiliary modules by method; empty for methods of logits.

    Adapters are trained with the student and not exported. The same seed makes the same adapters, and the student's
    own weights do not depend on them.
    """
    if not plan.objective.needs_features:
        return (), {}
    config, device = plan.config, plan.world.device
    images = example_images(plan).to(device)
    prepared = student.prepare(images)
    stages = find_stages(student.network, prepared, config.student_stages, f"student {config.student}")
    if config.student_stages and config.teacher_stages and len(stages) != len(outputs.stages):
        raise UsageError(
            f"--student-stages names {len(stages)} layers, --teacher-stages {len(outputs.stages)}",
            "They are paired: name as many of each.",
        )
    # The shapes of both; the student's mode and statistics stay as they are
    extractor = FeatureExtractor(student.network, stages)
    student.eval()
    with torch.no_grad():
        _, maps, embedding = extractor(prepared)
    extractor.remove()
    student.train()
    assert outputs.live is not None
    _, features = outputs.live(images, 0, plan.train_samples[:1].repeat(2))
    assert features is not None
    shapes = (Shapes.of(maps, embedding), Shapes.of(features.stages, features.embedding))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed ^ _ADAPTER_SEED)
        adapters = plan.objective.adapters(Training(*shapes, plan.train.labels, plan.train_samples))
    return stages, {name: module.to(device).train() for name, module in adapters.items()}


@dataclass(frozen=True)
class OutputScale:
    """logits = shift + scale · network(x), with the mean and spread of the teacher's logits.

    Regression has to reach the teacher's values, and a network starts near 0 with steps made for logits of a few
    units: a Caffe NIN's logits lie around 19 ± 9. Ba & Caruana (NIPS 2014, section 3) subtract the mean and divide
    by the standard deviation of the targets; this is the same written on the student's side, so that the loss stays
    ½‖s − t‖² in the teacher's units. It is folded into the last layer at the end and leaves no trace in the file.
    """

    shift: Tensor  # (C,), the mean of each class's logit over the training images
    scale: float  # standard deviation around these means, over all classes

    @classmethod
    def of_logits(cls, cached: CachedLogits, samples: Int64, device: torch.device) -> OutputScale:
        """Measure the scale on the teacher's logits for the training images."""
        total = sum(chunk.sum(axis=0) for chunk in cached.chunks(samples))
        mean = np.asarray(total / len(samples))  # (C,)
        squares = sum(float(((chunk - mean) ** 2).sum()) for chunk in cached.chunks(samples))
        spread = float(np.sqrt(squares / (len(samples) * len(mean))))
        shift = torch.from_numpy(mean.astype(np.float32)).to(device)
        return cls(shift, spread if spread > 0 else 1.0)

    def __call__(self, outputs: Tensor) -> Tensor:
        """The network's outputs (B, C) → logits (B, C)."""
        return self.shift + self.scale * outputs

    def fold(self, network: nn.Module) -> None:
        """Make the network itself give the logits. Its last layer must be linear (`models.final_linear`)."""
        head = models.final_linear(network)
        assert head is not None
        with torch.no_grad():
            head.weight.mul_(self.scale)
            head.bias.mul_(self.scale).add_(self.shift)

    def unfold(self, network: nn.Module) -> None:
        """The reverse of `fold`, for a network that already gives logits."""
        head = models.final_linear(network)
        assert head is not None
        with torch.no_grad():
            head.weight.div_(self.scale)
            head.bias.sub_(self.shift).div_(self.scale)
