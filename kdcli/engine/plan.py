"""The plan of a run, derived from its settings, its data and the processes that share it."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcli import methods
from kdcli.base.errors import UsageError
from kdcli.base.runtime import World
from kdcli.data import ImageSet, Splits, augment
from kdcli.data.split import split
from kdcli.engine import identity
from kdcli.methods import Objective, TrainConfig
from kdcli.teacher import Teacher

Int64 = npt.NDArray[np.int64]
_CACHED_VIEWS = 8  # of an augmentation with endless variants, when a teacher has to be run over each
_DERIVED = ("views", "tau")  # by `resolve`, where they are not set


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run, derived once by `make_plan`.

    Attributes:
        config: settings with `tau` and `views` filled in; `derived` names those that were not set.
        objective: terms with their weights and temperatures over time.
        data: the data set; `train` are the images that are trained on, those without labels after the others.
        train_samples, labelled_samples, val_samples: indices into `train` of the images that are trained on, of
            those among them with a label, and of the validation split.
        steps_per_epoch, steps: optimizer steps.
        cache_mode: where the teacher's logits come from, see `cache_mode`.
        teacher: None where no term reads one.
        inputs: SHA-256 of the run's inputs, see `identity.input_hashes`.
        environment: values of `environment.json`.
        source_digests: SHA-256 of the code of custom methods, by name.
        world: the processes that share the work.
        test: whether the student is measured on the test images.
        chain: settings of the chain of trainings that the run is a link of.
    """

    config: TrainConfig
    derived: tuple[str, ...]
    objective: Objective
    data: Splits
    train: ImageSet
    train_samples: Int64
    labelled_samples: Int64
    val_samples: Int64
    steps_per_epoch: int
    steps: int
    cache_mode: str
    teacher: Teacher | None
    inputs: Mapping[str, str]
    environment: Mapping[str, Any]
    source_digests: Mapping[str, str]
    world: World
    test: bool
    chain: TrainConfig | None

    @property
    def made_with(self) -> dict[str, Any]:
        """Values that must be equal for equal bits, beside `inputs`; complete once `config.precision` is settled."""
        return identity.made_with(self.config, self.environment)


def make_plan(
    config: TrainConfig, data: Splits, world: World, *, test: bool = True, chain: TrainConfig | None = None
) -> RunPlan:
    """Derive a run's plan; no model is read.

    Raises:
        UsageError: settings that do not go together, or do not fit the data.
        KdError: a file is missing.
    """
    # 1. Settings
    derived = tuple(name for name in _DERIVED if not getattr(config, name))
    objective = methods.objective(config)
    _check(config, objective, data)
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard: it is not installed", "pip install 'kdcli[tensorboard]'")
    config = _resolve(config, objective)
    # 2. Samples and steps: images without labels come after all others
    train = data.trained_on
    labelled, validation = split(data.train.labels, config.val_fraction)
    samples = np.concatenate([labelled, np.arange(len(data.train), len(train))])
    steps_per_epoch = -(-len(samples) // config.batch_size)
    # 3. Teacher
    teacher = None
    if objective.needs_teacher:
        teacher = Teacher.open(
            config.teacher,
            config.cache_dir,
            weights=config.teacher_weight,
            threads=config.threads or torch.get_num_threads(),
            world=world,
            precision=config.teacher_precision,
            top_k=config.cache_top_k,
        )
    return RunPlan(
        config=config,
        derived=derived,
        objective=objective,
        data=data,
        train=train,
        train_samples=samples,
        labelled_samples=labelled,
        val_samples=validation,
        steps_per_epoch=steps_per_epoch,
        steps=steps_per_epoch * config.epochs,
        cache_mode=_cache_mode(config, objective),
        teacher=teacher,
        inputs=identity.input_hashes(config, data),
        environment=identity.environment(world),
        source_digests=methods.source_digests(config.method),  # as imported: the files may change meanwhile
        world=world,
        test=test,
        chain=chain,
    )


def cache_mode(config: TrainConfig) -> str:
    """`views`, `fixed` or `off`: where the teacher's logits for training images come from.

    With a method of features the teacher runs in each step: features are larger than the images.
    """
    return _cache_mode(config, methods.objective(config))


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in `tau`, where the methods that read it have one default, and `views`.

    All views there are, or, of endless ones, as many as a teacher can be run over. A run without a teacher gets a
    fresh view each epoch, and so does one whose teacher is live or sees plain images only: limiting the baseline
    would flatter the others.

    Raises:
        UsageError: settings that do not go together.
    """
    return _resolve(config, methods.objective(config))


def check(config: TrainConfig, data: Splits | None = None) -> None:
    """Check a run's settings, by themselves and against its data as far as known.

    Raises:
        UsageError: settings that do not go together.
    """
    objective = methods.objective(config)
    _check(config, objective, data)
    _resolve(config, objective)


def _cache_mode(config: TrainConfig, objective: Objective) -> str:
    live = config.teacher_dropout > 0 or objective.needs_features
    return "off" if live else config.teacher_cache


def _resolve(config: TrainConfig, objective: Objective) -> TrainConfig:
    if config.tau is None and objective.default_tau is not None:
        config = config.model_copy(update={"tau": objective.default_tau})
    distinct = augment.distinct_views(config.augment)
    mode = _cache_mode(config, objective) if objective.needs_teacher else ""
    if mode == "fixed" and _mixes(config):
        raise UsageError(
            "--teacher-cache fixed does not go with mixup: the teacher has not seen the mixtures",
            "Use --teacher-cache views or off.",
        )
    if config.cache_top_k and mode == "off":
        raise UsageError(
            "--cache-top-k is for cached logits, and here the teacher runs in each step",
            "Leave out --cache-top-k, or --teacher-cache off and --teacher-dropout; methods of features need it so.",
        )
    if config.views and distinct and config.views > distinct:
        raise UsageError(
            f"--views {config.views}: augment {config.augment} has {distinct} distinct view(s)", "Use fewer."
        )
    if config.views:
        return config
    views = distinct or (min(_CACHED_VIEWS, config.epochs) if mode == "views" else config.epochs)
    return config.model_copy(update={"views": min(views, config.epochs)})


def _check(config: TrainConfig, objective: Objective, data: Splits | None) -> None:
    if config.assistant or config.generations > 1:
        flags = "--assistant" if config.assistant else "--generations"
        raise UsageError(
            f"a chain of students is asked for, and this trains one student; leave out {flags}",
            "kd train, and fit_chain(), train chains.",
        )
    unlabelled = config.unlabelled is not None or (data is not None and data.unlabelled is not None)
    objective.check(unlabelled=unlabelled)
    if _mixes(config) and objective.no_mixup:
        raise UsageError(
            f"method {config.method} tells images of different classes apart, and mixup's have two",
            "Leave mixup out of --augment.",
        )
    if not objective.needs_teacher:
        return
    if config.cache_top_k and objective.regresses:
        raise UsageError(
            f"--cache-top-k: method {config.method} regresses all logits",
            "Use --method kd, or leave it out.",
        )
    if data is not None and config.cache_top_k >= len(data.train.classes):
        raise UsageError(
            f"--cache-top-k {config.cache_top_k}: there are {len(data.train.classes)} classes",
            "Leave it out to keep all of them.",
        )
    if objective.needs_features and len(config.teacher) > 1:
        raise UsageError(
            f"method {config.method} reads features, and those of several teachers have no mean",
            "Name one --teacher, or use a method of logits.",
        )


def _mixes(config: TrainConfig) -> bool:
    return augment.MIXUP_NAME in config.augment.split("-")
