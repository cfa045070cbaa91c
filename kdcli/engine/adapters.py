"""What learns along with the student and is not part of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcli.base.errors import UsageError
from kdcli.data import ImageSet, rows
from kdcli.engine.targets import Targets, shapes_of
from kdcli.methods import Objective, TrainConfig, Training
from kdcli.models import Classifier
from kdcli.models.feature_extractor import FeatureExtractor, find_stages

_SEED = 0x5EED  # beside the run's: adapters do not take the student's initial weights


def make_adapters(
    config: TrainConfig,
    method: Objective,
    student: Classifier,
    targets: Targets,
    train: ImageSet,
    samples: npt.NDArray[np.int64],
) -> tuple[tuple[str, ...], dict[str, nn.Module]]:
    """Names of the student's stages that are read, and the adapters by the method's name; nothing of either
    where the method reads no features.

    The same seed makes the same adapters, and the student's own weights do not depend on them.

    Raises:
        UsageError: the student has no such stages.
    """
    if not method.needs_features:
        return (), {}
    device = next(student.network.parameters()).device
    images = torch.from_numpy(rows.take(train.images, samples[:1].repeat(2))).to(device)
    prepared = student.prepare(images)
    try:
        stages = find_stages(student.network, prepared, config.student_stages)
    except UsageError as error:
        raise UsageError(f"student {config.student}: {error.message}", error.hint) from error
    if config.student_stages and config.teacher_stages and len(stages) != len(targets.stages):
        raise UsageError(
            f"--student-stages names {len(stages)} layers, --teacher-stages {len(targets.stages)}",
            "They are paired: name as many of each.",
        )
    shapes = shapes_of(_looked_at(student.network, prepared, stages))
    training = Training(shapes, targets.shapes(), train.labels, samples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed ^ _SEED)
        made = {name: module.to(device).train() for name, module in method.adapters(training).items()}
    return stages, made


def _looked_at(
    network: nn.Module, prepared: Tensor, stages: tuple[str, ...]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """What a network with features gives for an example; it and its statistics stay as they are."""
    training = network.training
    tap = FeatureExtractor(network, stages)
    try:
        tap.eval()
        with torch.no_grad():
            found: tuple[Tensor, list[Tensor], Tensor] = tap(prepared)
    finally:
        tap.remove()
        network.train(training)
    return found


def states_of(adapters: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """All that changes in them, for a saved state."""
    return {name: dict(module.state_dict()) for name, module in adapters.items()}


def restore_adapters(adapters: Mapping[str, nn.Module], states: Mapping[str, dict[str, Tensor]]) -> None:
    """Fill in what a saved state holds.

    Raises:
        KeyError, RuntimeError: it holds that of other adapters.
    """
    if set(adapters) != set(states):
        raise KeyError("adapters")
    for name, module in adapters.items():
        module.load_state_dict(states[name])
