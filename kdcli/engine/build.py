"""The parts of a run, made from its plan."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from kdcli.base import runtime
from kdcli.base.events import Note, OnEvent
from kdcli.base.runtime import StopFlag
from kdcli.data import rows
from kdcli.engine.adapters import make_adapters
from kdcli.engine.feed import Feed
from kdcli.engine.output_scale import OutputScale
from kdcli.engine.plan import RunPlan
from kdcli.engine.recorder import Recorder
from kdcli.engine.run_dir import RunDir
from kdcli.engine.schedule import make_optimizer
from kdcli.engine.state import State, restore
from kdcli.engine.step import Step
from kdcli.engine.student import make_student
from kdcli.engine.targets import Targets, make_targets, warn_of_other_networks
from kdcli.models import Classifier
from kdcli.models.reproducible import DropoutKeys, use_global_batch_norm, use_sample_dropout

_FEW_STEPS, _SMALL_BATCH = 50, 32


@dataclass
class Parts:
    """Parts of a run.

    Attributes:
        plan: the plan, with the precision settled.
        scale: the student's output in the teacher's units; None where it needs none.
        state: the position; of a resumed run, that of its newest saved state.
        saved_step: step of the present `last.pt`; None without one.
    """

    plan: RunPlan
    run: RunDir
    student: Classifier
    targets: Targets
    adapters: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    scale: OutputScale | None
    feed: Feed
    step: Step
    recorder: Recorder
    state: State
    saved_step: int | None


def build(plan: RunPlan, resume: RunDir | None, on_event: OnEvent, stop: StopFlag) -> Parts:
    """Make or restore all parts of a run. A user's mistakes are found before the folder is made.

    Raises:
        KdError, UsageError, Interrupted: see `engine.fit`.
    """
    config, world = plan.config, plan.world
    if resume is None and plan.steps < _FEW_STEPS and config.batch_size > _SMALL_BATCH:
        count = f"{len(plan.train_samples):,} images in batches of {config.batch_size}"
        advice = "--batch-size 32 or more --epochs make more"
        on_event(Note(f"{plan.steps} steps are few to learn from: {count}; {advice}"))
    # 1. Student, with its preprocessing
    student = make_student(config, plan.data.train, plan.labelled_samples, world.device, on_event)
    if resume is None and world.first:
        RunDir.check_free(config)
    # 2. Teacher: cached views, or live
    targets = make_targets(plan, on_event, stop)
    warn_of_other_networks(plan, student.arch, on_event)
    # 3. Adapters, optimizer, output scale
    stages, adapters = make_adapters(plan, student, targets)
    optimizer = make_optimizer(config, student.network, *adapters.values())
    scale = targets.output_scale(student.network)
    if scale is not None and config.student_file is not None:
        scale.unfold(student.network)
    # 4. Precision and the run's folder
    plan, run = _open_run(plan, student, resume)
    # 5. Layers that train the same however a batch is divided, and wherever a run was stopped
    keys = DropoutKeys(config.seed)
    use_sample_dropout(student.network, keys)
    if world.size > 1:
        for module in (student.network, *adapters.values()):
            use_global_batch_norm(module)
    # 6. The saved state
    state, saved_step = State(), None
    if resume is not None:
        state, saved_step = restore(plan, run, student.network, adapters, optimizer, on_event)
    # 7. Batches, step and records
    return Parts(
        plan=plan,
        run=run,
        student=student,
        targets=targets,
        adapters=adapters,
        optimizer=optimizer,
        scale=scale,
        feed=Feed(plan.train, config.augment, config.augment_seed, plan.train_samples, world.device),
        step=Step(plan, student, adapters, stages, optimizer, scale, keys),
        recorder=Recorder(plan.config, run, list(plan.objective.terms), state, world),
        state=state,
        saved_step=saved_step,
    )


def _open_run(plan: RunPlan, student: Classifier, resume: RunDir | None) -> tuple[RunPlan, RunDir]:
    """The run's folder, with its settings and environment; a new run's precision is settled first."""
    if resume is not None:
        return plan, resume
    config, world, made = plan.config, plan.world, None
    if world.first:
        sample = plan.train_samples[: config.batch_size]
        images = torch.from_numpy(rows.take(plan.train.images, sample)).to(world.device)
        precision, step_ms = runtime.choose_precision(
            config.precision, student.network, student.prepare(images), len(student.classes)
        )
        config = config.model_copy(update={"precision": precision})
        environment = {**plan.environment, "precision": precision, "precision_step_ms": step_ms}
        made = RunDir.create(config, environment, plan.derived, plan.chain), config
    run, config = world.broadcast(made) or (RunDir(config.runs_dir), config)
    return replace(plan, config=config), run
