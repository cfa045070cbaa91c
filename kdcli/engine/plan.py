"""Which images are trained on, and in how many variants."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kdcli import augment, methods
from kdcli.config import TrainConfig
from kdcli.errors import UsageError

Int64 = npt.NDArray[np.int64]
_CACHED_VIEWS = 8  # of an augmentation with endless variants, when a teacher has to be run over each


def split(labels: Int64, fraction: float) -> tuple[Int64, Int64]:
    """Numbers of the training and of the validation samples, stratified by class.

    The same for every seed and method, so that runs can be compared; at least one sample of each class is
    trained on.
    """
    samples = np.arange(len(labels))
    shuffled = augment.order(0, augment.SPLIT, samples)
    validation: list[Int64] = []
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        validation.append(members[: min(round(fraction * len(members)), len(members) - 1)])
    chosen = np.sort(np.concatenate(validation)) if validation else samples[:0]
    return np.setdiff1d(samples, chosen), chosen


def cache_mode(config: TrainConfig) -> str:
    """`views`, `fixed` or `off`: where the teacher's logits for training images come from."""
    return "off" if config.teacher_dropout > 0 else config.teacher_cache


FILLED = ("views",)  # by `resolve`, where they are not set


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in `views`: all there are, or, of endless ones, as many as a teacher can be run over.

    A run without a teacher gets a fresh view each epoch, and so does one whose teacher is live or sees plain images
    only: limiting the baseline would flatter the others.
    """
    distinct = augment.distinct_views(config.augment)
    fixed = config.teacher_cache == "fixed" and methods.get(config.method).needs_teacher
    if fixed and augment.MIXUP_NAME in config.augment.split("-"):
        raise UsageError(
            "--teacher-cache fixed does not go with mixup: the teacher has not seen the mixtures",
            "Use --teacher-cache views or off.",
        )
    if config.views and distinct and config.views > distinct:
        raise UsageError(
            f"--views {config.views}: augment {config.augment} has {distinct} distinct view(s)", "Use fewer."
        )
    if config.views:
        return config
    cached = methods.get(config.method).needs_teacher and cache_mode(config) == "views"
    views = distinct or (min(_CACHED_VIEWS, config.epochs) if cached else config.epochs)
    return config.model_copy(update={"views": min(views, config.epochs)})
