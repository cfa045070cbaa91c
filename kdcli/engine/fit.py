"""Training of one student: the parts of a run, made from its plan, and the run."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdcli import models
from kdcli.base import runtime
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Note, OnEvent, Progress, ignore
from kdcli.base.names import NETWORKS
from kdcli.base.runtime import StopFlag, World
from kdcli.base.text import reason
from kdcli.data import Splits, rows
from kdcli.engine.feed import Feed, TeacherOutputs, example_images, make_teacher_outputs, note_other_networks
from kdcli.engine.identity import check_unchanged, differences
from kdcli.engine.plan import RunPlan, make_plan
from kdcli.engine.preflight import check_teacher
from kdcli.engine.records import RunResult, cut_metrics
from kdcli.engine.run_dir import RunDir, resume_command
from kdcli.engine.state import Recorder, State
from kdcli.engine.step import Ema, Step, make_optimizer
from kdcli.engine.student import OutputScale, make_student
from kdcli.engine.trainer import Trainer
from kdcli.methods import Shapes, TrainConfig, Training
from kdcli.models import Classifier, checkpoint
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.feature_extractor import FeatureExtractor, find_stages
from kdcli.models.reproducible import DropoutKeys, use_global_batch_norm, use_sample_dropout

_ADAPTER_SEED = 0x5EED  # beside the run's: adapters do not take the student's initial weights


def fit(
    config: TrainConfig,
    data: Splits,
    *,
    resume: RunDir | None = None,
    world: World | None = None,
    test: bool = True,
    on_event: OnEvent = ignore,
    chain: TrainConfig | None = None,
) -> RunResult:
    """Train a student as the settings say, and measure it once on the test data.

    An exception from `on_event` ends a run of one process; files written by then are complete.

    Args:
        resume: an interrupted run to continue; `config` is then that run's own.
        world: the processes that share the work, from `runtime.launch`; by default this one alone.
        test: False leaves the test images unread, for a search among runs: the result has no `evaluation`.
        chain: the settings of the whole chain that this is a link of, for its folder; see `fit_chain`.

    Raises:
        UsageError: another process trains the run.
        KdError: teacher and data do not fit, the loss stopped being finite, or a file cannot be written.
        Interrupted: SIGINT or SIGTERM; the state is in `last.pt`.
    """
    world = world or single_process(config)
    on_event = on_event if world.first else ignore
    with runtime.stop_on_signals() as stop, world.report_lost_process(), ExitStack() as stack:
        if resume is not None and world.first:
            stack.enter_context(resume.held())
        on_event(Progress("preparing", 0, 0))
        runtime.set_threads(config.threads, world.local_size)
        runtime.keep_freed_memory()
        trainer = _build(make_plan(config, data, world, test=test, chain=chain), resume, on_event, stop)
        if resume is None and world.first:
            stack.enter_context(trainer.run.held())
        try:
            return trainer.train()
        except OSError as error:
            path = trainer.run.path
            raise KdError(
                f"cannot write to {path}: {reason(error)}",
                f"Free some space, then: {resume_command(path, config)}",
            ) from error
        finally:
            trainer.recorder.close()


def single_process(config: TrainConfig) -> World:
    """The world of this process alone; a UsageError if the settings name several devices."""
    if config.devices > 1:
        raise UsageError(
            f"--devices {config.devices}: without a `world` training runs in one process",
            "Start the others with runtime.launch, or use kd train.",
        )
    return World.alone(config.accelerator)


def _build(plan: RunPlan, resume: RunDir | None, on_event: OnEvent, stop: StopFlag) -> Trainer:
    """Make or restore all parts of a run. A user's mistakes are found before the folder is made."""
    config, world = plan.config, plan.world
    if resume is None:
        on_event(Note(plan.summary))
    # 1. The saved state, of the same inputs; student, with its preprocessing
    saved = None if resume is None else _load_newest(plan, resume, on_event)
    student = make_student(config, plan.data.train, plan.labelled_samples, world.device, on_event)
    if student.file_sha256 != plan.inputs.get("student", ""):
        raise KdError(f"student {config.student} was replaced while it was read", "Rerun the same command.")
    if resume is None and world.first:
        RunDir.check_free(config)
    # 2. Teacher: cached views, or live; its figures on a sample of the batches
    feed = Feed(plan.train, config.augment, config.augment_seed, plan.train_samples, world.device)
    outputs = make_teacher_outputs(plan, on_event, stop)
    teacher = world.broadcast(check_teacher(plan, outputs, feed, on_event) if world.first else None)
    note_other_networks(plan, student.arch, on_event)
    # 3. Adapters, optimizer, output scale of a regressing student whose last layer is linear
    stages, adapters = _make_adapters(plan, student, outputs)
    optimizer = make_optimizer(config, student.network, *adapters.values())
    scale = None
    if outputs.views and plan.objective.regresses and models.final_linear(student.network) is not None:
        scale = OutputScale.of_logits(outputs.views[0], plan.train_samples, world.device)
        if config.student_file is not None:
            scale.unfold(student.network)
    # 4. Precision and the run's folder
    plan, run = _open_run(plan, student) if resume is None else (plan, resume)
    # 5. Layers that train the same however a batch is divided, and wherever a run was stopped
    keys = DropoutKeys(config.seed, reseeds=student.arch not in NETWORKS)
    use_sample_dropout(student.network, keys)
    if world.size > 1:
        for module in (student.network, *adapters.values()):
            use_global_batch_norm(module)
    # 6. The saved state
    ema = Ema(student.network, config.ema) if config.ema else None
    parts = (student.network, adapters, optimizer, ema)
    state, saved_step = (State(), None) if resume is None else _restore(plan, run, saved, *parts, on_event)
    # 7. Batches, step and records
    return Trainer(
        plan=plan,
        run=run,
        student=student,
        outputs=outputs,
        adapters=adapters,
        optimizer=optimizer,
        ema=ema,
        scale=scale,
        feed=feed,
        teacher=teacher,
        step=Step(plan, student, adapters, stages, optimizer, scale, keys),
        recorder=Recorder(plan.config, run, plan.objective.terms, state, world),
        state=state,
        saved_step=saved_step,
        on_event=on_event,
        stop=stop,
    )


def _open_run(plan: RunPlan, student: Classifier) -> tuple[RunPlan, RunDir]:
    """A new run's plan with its precision settled, and its folder with settings and environment."""
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


def _restore(
    plan: RunPlan,
    run: RunDir,
    newest: tuple[Path, Checkpoint] | None,
    network: nn.Module,
    adapters: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    on_event: OnEvent,
) -> tuple[State, int | None]:
    """Load the newest saved state into network, adapters, optimizer and average, and cut the metrics after it.

    Returns the position, and the step of `last.pt` if that is readable.
    """
    state, saved_step = State(), None
    if newest is not None:
        path, stored = newest
        training = stored.training or {}
        try:
            network.load_state_dict(stored.state_dict)
            for name, module in adapters.items():
                module.load_state_dict(training["adapters"][name])
            optimizer.load_state_dict(training["optimizer"])
            if ema is not None:
                ema.load(training["ema"])
            state = State(**training["state"])
            changes = differences(training["made_with"], plan.made_with)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise KdError(f"{path} does not fit its run: {error}", "Start the run anew.") from error
        for change in changes:
            on_event(Note(f"{change}: the result will not be bit-identical to an uninterrupted run's"))
        state.marks += [change for change in changes if change not in state.marks]
        saved_step = state.step if path == run.last else None
    if plan.world.first:
        cut_metrics(run.metrics_file, state.step, state.epoch)
    plan.world.barrier()
    if newest is not None:
        on_event(Note(f"continuing {run.path.as_posix()} after step {state.step} of {plan.steps}"))
    return state, saved_step


def _load_newest(plan: RunPlan, run: RunDir, on_event: OnEvent) -> tuple[Path, Checkpoint] | None:
    """The newest readable state, if the run's inputs are still those it began with; None if none was ever saved."""
    saved = run.saved()
    for path in saved:
        try:
            stored = checkpoint.load(path)
        except KdError as error:
            on_event(Note(f"{error.message}; trying the one before it"))
            continue
        inputs = (stored.training or {}).get("inputs")
        check_unchanged(inputs if isinstance(inputs, dict) else {}, plan.inputs, run.path.as_posix())
        return path, stored
    if saved:
        raise KdError(f"no saved state of {run.path} can be read", "Start the run anew under another --name.")
    return None


def _make_adapters(
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
    _, features = outputs.live.features(images, 0, plan.train_samples[:1].repeat(2))
    shapes = (_shapes(maps, embedding), _shapes(features.stages, features.embedding))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed ^ _ADAPTER_SEED)
        adapters = plan.objective.adapters(Training(*shapes, plan.train.labels, plan.train_samples))
    return stages, {name: module.to(device).train() for name, module in adapters.items()}


def _shapes(maps: Sequence[Tensor], embedding: Tensor) -> Shapes:
    sizes = [stage.shape[1:] for stage in maps]
    return Shapes(tuple((channels, height, width) for channels, height, width in sizes), embedding.shape[1])
