"""Which images are trained on, in how many variants, and prepared how."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from kdcli import methods
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import OnEvent
from kdcli.data import ImageSet, Splits, augment, preprocess
from kdcli.data.preprocess import Preprocess
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint

Int64 = npt.NDArray[np.int64]
_CONSTANTS_VERSION = 1  # raise it when a preprocessing's fit gives other constants
_CACHED_VIEWS = 8  # of an augmentation with endless variants, when a teacher has to be run over each


def fitted_preprocess(config: TrainConfig, data: ImageSet, samples: Int64, on_event: OnEvent) -> Preprocess:
    """The student's preprocessing, its constants measured on these samples once and kept below `cache_dir`."""
    recipe = [
        _CONSTANTS_VERSION,
        config.preprocess,
        data.fingerprint,
        hashlib.sha256(samples.tobytes()).hexdigest(),
    ]
    name = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32]
    path = config.cache_dir / "preprocess" / f"{name}.pt"
    spec = checkpoint.load_plain(path)
    if spec is not None:
        return preprocess.from_spec(spec)
    made = preprocess.fit(config.preprocess, data.images, samples, on_event=on_event)
    with suppress(KdError):  # without a place to keep it, it is measured again
        checkpoint.save_plain(path, made.spec())
    return made


def cache_mode(config: TrainConfig) -> str:
    """`views`, `fixed` or `off`: where the teacher's logits for training images come from.

    For features it runs in each step: they are larger than the images.
    """
    live = config.teacher_dropout > 0 or methods.objective(config).needs_features
    return "off" if live else config.teacher_cache


FILLED = ("views", "tau")  # by `resolve`, where they are not set


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in `tau`, where the methods that read it have one default, and `views`.

    All views there are, or, of endless ones, as many as a teacher can be run over.

    A run without a teacher gets a fresh view each epoch, and so does one whose teacher is live or sees plain images
    only: limiting the baseline would flatter the others.
    """
    objective = methods.objective(config)
    if config.tau is None and objective.default_tau is not None:
        config = config.model_copy(update={"tau": objective.default_tau})
    distinct = augment.distinct_views(config.augment)
    fixed = objective.needs_teacher and cache_mode(config) == "fixed"
    if fixed and augment.MIXUP_NAME in config.augment.split("-"):
        raise UsageError(
            "--teacher-cache fixed does not go with mixup: the teacher has not seen the mixtures",
            "Use --teacher-cache views or off.",
        )
    if config.cache_top_k and objective.needs_teacher and cache_mode(config) == "off":
        raise UsageError(
            "--cache-top-k says what is kept of the teacher's outputs, and here none are kept: it runs in each step",
            "Leave out --cache-top-k, or --teacher-cache off and --teacher-dropout; methods of features need it so.",
        )
    if config.views and distinct and config.views > distinct:
        raise UsageError(
            f"--views {config.views}: augment {config.augment} has {distinct} distinct view(s)", "Use fewer."
        )
    if config.views:
        return config
    cached = objective.needs_teacher and cache_mode(config) == "views"
    views = distinct or (min(_CACHED_VIEWS, config.epochs) if cached else config.epochs)
    return config.model_copy(update={"views": min(views, config.epochs)})


def check(config: TrainConfig, data: Splits | None = None) -> None:
    """Look at all that can be wrong with a run's settings by themselves, and with what is known of its data.

    Raises:
        UsageError: settings that do not go together.
    """
    if config.assistant or config.generations > 1:
        flags = "--assistant" if config.assistant else "--generations"
        raise UsageError(
            f"a chain of students is asked for, and this trains one student; leave out {flags}",
            "kd train, and fit_chain(), train chains.",
        )
    method = methods.objective(config)
    method.check(
        unlabelled=config.unlabelled is not None or (data is not None and data.unlabelled is not None)
    )
    resolve(config)
    if augment.MIXUP_NAME in config.augment.split("-") and method.no_mixup:
        raise UsageError(
            f"method {config.method} tells images of different classes apart, and mixup's have two",
            "Leave mixup out of --augment.",
        )
    if not method.needs_teacher:
        return
    if config.cache_top_k and method.regresses:
        raise UsageError(
            f"--cache-top-k: method {config.method} regresses all logits",
            "Use --method kd, or leave it out.",
        )
    if data is not None and config.cache_top_k >= len(data.train.classes):
        raise UsageError(
            f"--cache-top-k {config.cache_top_k}: there are {len(data.train.classes)} classes",
            "Leave it out to keep all of them.",
        )
    if method.needs_features and len(config.teacher) > 1:
        raise UsageError(
            f"method {config.method} reads features, and those of several teachers have no mean",
            "Name one --teacher, or use a method of logits.",
        )
