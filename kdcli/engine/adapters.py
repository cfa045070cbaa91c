"""Auxiliary modules for feature losses: trained with the student, not exported."""

import torch
from torch import Tensor, nn

from kdcli.base.errors import UsageError
from kdcli.engine.plan import RunPlan
from kdcli.engine.targets import Targets, example_images, shapes_of
from kdcli.methods import Shapes, Training
from kdcli.models import Classifier
from kdcli.models.feature_extractor import FeatureExtractor, find_stages

_SEED = 0x5EED  # beside the run's: adapters do not take the student's initial weights


def make_adapters(
    plan: RunPlan, student: Classifier, targets: Targets
) -> tuple[tuple[str, ...], dict[str, nn.Module]]:
    """Names of the student's stages that are read, and the adapters by the method's name; both empty for methods
    of logits.

    The same seed makes the same adapters, and the student's own weights do not depend on them.

    Raises:
        UsageError: the student has no such stages.
    """
    if not plan.objective.needs_features:
        return (), {}
    config, device = plan.config, plan.world.device
    prepared = student.prepare(example_images(plan).to(device))
    try:
        stages = find_stages(student.network, prepared, config.student_stages)
    except UsageError as error:
        raise UsageError(f"student {config.student}: {error.message}", error.hint) from error
    if config.student_stages and config.teacher_stages and len(stages) != len(targets.stages):
        raise UsageError(
            f"--student-stages names {len(stages)} layers, --teacher-stages {len(targets.stages)}",
            "They are paired: name as many of each.",
        )
    shapes = _feature_shapes(student.network, prepared, stages)
    training = Training(shapes, targets.feature_shapes(), plan.train.labels, plan.train_samples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed ^ _SEED)
        adapters = plan.objective.adapters(training)
    return stages, {name: module.to(device).train() for name, module in adapters.items()}


def _feature_shapes(network: nn.Module, prepared: Tensor, stages: tuple[str, ...]) -> Shapes:
    """Shapes of a network's features; its mode and statistics stay as they are."""
    training = network.training
    extractor = FeatureExtractor(network, stages)
    try:
        extractor.eval()
        with torch.no_grad():
            return shapes_of(extractor(prepared))
    finally:
        extractor.remove()
        network.train(training)
