"""The plan of a run, derived from its settings, its data and the processes that share it."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcli import data as data_sets
from kdcli import methods, models
from kdcli.base import runtime
from kdcli.base.errors import UsageError
from kdcli.base.events import OnEvent, ignore
from kdcli.base.runtime import World
from kdcli.data import ImageSet, Splits, augment, rows
from kdcli.data.split import split_validation
from kdcli.engine import identity
from kdcli.engine.run_dir import RunDir
from kdcli.methods import Objective, TrainConfig
from kdcli.models import Classifier
from kdcli.teacher import Teacher

Int64 = npt.NDArray[np.int64]
_CACHED_VIEWS = 8  # of an augmentation with endless variants, when a teacher has to be run over each
_DERIVED = ("views", "tau", "batch_size")  # where they are not set
_BATCHES = (256, 128, 64, 32, 16, 8, 4)
_STEPS = 20  # in an epoch, at least


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run, derived once by `make_plan`.

    Attributes:
        config: settings with `tau`, `views` and `batch_size` filled in; `derived` names those that were not set.
        train: images that are trained on, those without labels after the others. `train_samples` are indices into
            it, `labelled_samples` those among them with a label, `val_samples` those of the validation split.
    """

    config: TrainConfig
    derived: tuple[str, ...]
    objective: Objective  # terms with their weights and temperatures over time
    data: Splits
    train: ImageSet
    train_samples: Int64
    labelled_samples: Int64
    val_samples: Int64
    steps_per_epoch: int
    steps: int
    cache_mode: str  # where the teacher's logits come from, see `cache_mode`
    teacher: Teacher | None  # None where no term reads one
    inputs: Mapping[str, str]  # SHA-256 of the run's inputs, see `identity.input_hashes`
    environment: Mapping[str, Any]  # values of `environment.json`
    world: World  # the processes that share the work
    test: bool  # whether the student is measured on the test images
    chain: TrainConfig | None  # settings of the chain of trainings that the run is a link of

    @property
    def summary(self) -> str:
        """Images and steps, one line."""
        return (
            f"{len(self.train_samples):,} images to train on, {len(self.val_samples):,} for validation; "
            f"{self.steps_per_epoch:,} steps an epoch in batches of {self.config.batch_size}"
        )

    @property
    def made_with(self) -> dict[str, Any]:
        """Values that equal bits need, in addition to `inputs`; complete once `config.precision` is settled."""
        by_content = identity.BY_CONTENT | ({"student"} if self.config.student_file else set())
        return identity.circumstances(self.environment) | identity.decisive_settings(self.config, by_content)


def make_plan(
    config: TrainConfig, data: Splits, world: World, *, test: bool = True, chain: TrainConfig | None = None
) -> RunPlan:
    """Derive a run's plan, without reading a model; a UsageError if settings and data do not go together."""
    # 1. Settings
    derived = tuple(name for name in _DERIVED if not getattr(config, name))
    config = resolve(config, data)
    objective = methods.objective(config)
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard: it is not installed", "pip install 'kdcli[tensorboard]'")
    # 2. Samples and steps: images without labels come after all others
    train = data.trained_on
    labelled, validation = split_validation(data.train.labels, config.val_fraction, data.train.validation)
    samples = np.concatenate([labelled, np.arange(len(data.train), len(train))])
    config = config.model_copy(update={"batch_size": config.batch_size or batch_size_for(len(samples))})
    # a last batch of one image joins the one before: batch norm needs two values
    last_alone = len(samples) % config.batch_size == 1
    steps_per_epoch = max(1, -(-len(samples) // config.batch_size) - last_alone)
    # 3. Teacher
    teacher = None
    if objective.needs_teacher:
        teacher = Teacher.open(
            config.teacher,
            config.cache_dir,
            weights=config.teacher_weight,
            threads=config.threads or torch.get_num_threads(),
            world=world,
            assumed=config.teacher_inputs,
            data=data.train,
            precision=config.teacher_precision,
            top_k=config.cache_top_k,
        )
    instructions = torch.backends.cpu.get_cpu_capability()
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
        cache_mode=cache_mode(config),
        teacher=teacher,
        inputs=identity.input_hashes(config, data, hashed=teacher.hashes if teacher else {}),
        environment={**runtime.environment(), **runtime.describe(world), "instructions": instructions},
        world=world,
        test=test,
        chain=chain,
    )


def open_run(plan: RunPlan, student: Classifier) -> tuple[RunPlan, RunDir]:
    """A new run's plan with its precision settled, and its folder with settings and environment."""

    def make() -> tuple[TrainConfig, RunDir]:
        sample = plan.train_samples[: plan.config.batch_size]
        images = torch.from_numpy(rows.take(plan.train.images, sample)).to(plan.world.device)
        prepared = student.prepare(images)
        precision, step_ms = runtime.choose_precision(plan.config.precision, student.network, prepared)
        config = plan.config.model_copy(update={"precision": precision})
        environment = {**plan.environment, "precision": precision, "precision_step_ms": step_ms}
        return config, RunDir.create(config, environment, plan.derived, plan.chain)

    config, run = plan.world.from_first(make)
    return replace(plan, config=config), run


def batch_size_for(samples: int) -> int:
    """The largest of `_BATCHES` that divides an epoch into 20 or more steps, else the smallest."""
    return next((size for size in _BATCHES if samples > size * (_STEPS - 1)), _BATCHES[-1])


def cache_mode(config: TrainConfig) -> str:
    """`views`, `fixed` or `off`: where the teacher's logits for training images come from.

    With a method of features the teacher runs in each step: features are larger than the images.
    """
    live = config.teacher_dropout > 0 or methods.objective(config).needs_features
    return "off" if live else config.teacher_cache


def resolve(config: TrainConfig, data: Splits | None = None) -> TrainConfig:
    """Check a run's settings, and fill in `views` and, where the methods that read it have one default, `tau`.

    `views`: every distinct view, or, of a random augmentation with a cached teacher, at most `_CACHED_VIEWS`. Without
    a teacher, or with one that is live or sees plain images only, each epoch has a fresh view: a limit for the
    baseline alone would bias a comparison. `data` may be unknown. A UsageError for settings that exclude each other.
    """
    objective = methods.objective(config)
    _check_training(config, objective, data)
    mode = cache_mode(config) if objective.needs_teacher else ""
    if mode:
        _check_teacher(config, objective, mode, data)
    if config.tau is None and objective.default_tau is not None:
        config = config.model_copy(update={"tau": objective.default_tau})
    distinct = augment.distinct_views(config.augment)
    if config.views and distinct and config.views > distinct:
        raise UsageError(
            f"--views {config.views}: augment {config.augment} has {distinct} distinct view(s)",
            f"Use --views {distinct} at most.",
        )
    views = config.views or distinct or (_CACHED_VIEWS if mode == "views" else config.epochs)
    return config.model_copy(update={"views": min(views, config.epochs)})


def _check_training(config: TrainConfig, objective: Objective, data: Splits | None) -> None:
    if config.assistant or config.generations > 1:
        flags = "--assistant" if config.assistant else "--generations"
        raise UsageError(
            f"this trains one student; leave out {flags}",
            "kd train, and fit_chain(), train chains.",
        )
    unlabelled = config.unlabelled is not None or (data is not None and data.unlabelled is not None)
    objective.check(unlabelled=unlabelled)
    if augment.mixes(config.augment) and objective.no_mixup:
        raise UsageError(
            f"method {config.method} needs one class per image, and mixed images have two",
            "Leave mixup and cutmix out of --augment.",
        )


def _check_teacher(config: TrainConfig, objective: Objective, mode: str, data: Splits | None) -> None:
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
    if config.cache_top_k and mode == "off":
        raise UsageError(
            "--cache-top-k is for cached logits, and here the teacher runs in each step",
            "Leave out --cache-top-k, or use a method of logits without --teacher-cache off and --teacher-dropout.",
        )
    if objective.needs_features and len(config.teacher) > 1:
        raise UsageError(
            f"method {config.method} reads features, which are not averaged over several teachers",
            "Name one --teacher, or use a method of logits.",
        )
    if mode == "fixed" and augment.mixes(config.augment):
        raise UsageError(
            "--teacher-cache fixed has logits of unmixed images only; --augment mixes them",
            "Use --teacher-cache views or off.",
        )


def load_data(config: TrainConfig, on_event: OnEvent = ignore) -> Splits:
    """Training and test images; where the student is a file, in its input size and with its `resize`."""
    stored = config.student_file
    if stored is not None and not stored.is_file():
        raise UsageError(f"no such student: {stored}", "--student takes a network's name or a .pt file.")
    model = None if stored is None else models.load(stored)
    if config.student_weights is not None and not config.student_weights.is_file():
        raise UsageError(f"no such file: {config.student_weights}", "--student-weights takes a state_dict.")
    return data_sets.load(
        config.data,
        data_dir=config.data_dir,
        cache_dir=config.cache_dir,
        image_size=config.image_size,
        grey=config.grey,
        fit_to=None if model is None else model.input_size,
        resize=config.resize or (None if model is None else model.resize),
        skip_broken=config.skip_broken,
        test_fraction=config.test_fraction,
        unlabelled=config.unlabelled,
        on_event=on_event,
    )
