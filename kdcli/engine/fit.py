"""Training: one loop for every method, student and teacher."""

import time
from collections.abc import Iterator

import torch

from kdcli import models
from kdcli.base import metrics, runtime
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Epoch, OnEvent, Progress, ignore
from kdcli.base.runtime import World
from kdcli.base.text import reason
from kdcli.data import Splits, augment
from kdcli.engine.build import Parts, build
from kdcli.engine.evaluate import measure
from kdcli.engine.feed import Minibatch
from kdcli.engine.outcome import provenance_of, result_of
from kdcli.engine.plan import RunPlan, make_plan
from kdcli.engine.records import Evaluation, RunResult, write_result
from kdcli.engine.run_dir import RunDir, resume_command
from kdcli.engine.schedule import learning_rate
from kdcli.engine.state import SaveSchedule
from kdcli.engine.targets import test_logits
from kdcli.methods import TrainConfig

_SHOW_EVERY_S = 0.5
_AGREE_STEPS = 8


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
        KdError: teacher and data do not fit, the loss stopped being finite, or a file cannot be written.
        Interrupted: SIGINT or SIGTERM; the state is in `last.pt`.
    """
    if world is None:
        if config.devices > 1:
            raise UsageError(
                "fit() runs in one process", "Start the others with runtime.launch, or use kd train."
            )
        world = World.alone(config.accelerator)
    on_event = on_event if world.first else ignore
    with runtime.stop_on_signals() as stop, world.report_lost_process():
        runtime.set_threads(config.threads, world.local_size)
        runtime.keep_freed_memory()
        plan = make_plan(config, data, world, test=test, chain=chain)
        trainer = Trainer(build(plan, resume, on_event, stop), on_event, stop)
        try:
            return trainer.train()
        except OSError as error:
            path = trainer.parts.run.path
            raise KdError(
                f"cannot write to {path}: {reason(error)}",
                f"Free some space; then {resume_command(path, config.method)}",
            ) from error
        finally:
            trainer.parts.recorder.close()


class Trainer:
    """The training loop of one run."""

    def __init__(self, parts: Parts, on_event: OnEvent, stop: runtime.StopFlag) -> None:
        self.parts = parts
        self.plan: RunPlan = parts.plan
        self.config = parts.plan.config
        self.world = parts.plan.world
        self.student = parts.student
        self.state = parts.state
        self.on_event = on_event
        self.stop = stop
        self.schedule = SaveSchedule(self.config)
        self.val_accuracy: float | None = None

    def train(self) -> RunResult:
        """Train to the end, measure the student on the test images, and write checkpoint and result."""
        parts, plan = self.parts, self.plan
        # 1. Epochs
        while self.state.epoch < self.config.epochs:
            self._epoch()
        # 2. Figures
        self._validate()
        self.student.eval()
        if parts.scale is not None:
            parts.scale.fold(self.student.network)
        evaluation = self._evaluate() if plan.test else None
        # 3. Files
        self.student.provenance = provenance_of(plan, parts.run, evaluation)
        result = result_of(plan, parts.run, self.student, self.state, self.val_accuracy, evaluation)
        if self.world.first:
            self.student.save(parts.run.student)
            write_result(result)
        self.world.barrier()
        return result

    def _evaluate(self) -> Evaluation:
        """Figures on the test images, which are read here and nowhere else."""
        plan = self.plan
        teacher_logits = test_logits(plan, self.on_event, self.stop)
        if plan.teacher is not None and teacher_logits is None:
            raise self._interrupted("training is finished, only the test is missing")
        logits = models.predict_logits(
            self.student, plan.data.test.images, task="testing", on_event=self.on_event
        )
        return measure(logits, torch.tensor(plan.data.test.labels), teacher_logits)

    def _epoch(self) -> None:
        """One pass, or the rest of one that was interrupted."""
        config, state, parts = self.config, self.state, self.parts
        started, reported = time.perf_counter(), time.monotonic()
        seconds_before, images_before = state.seconds, state.images
        rate = config.lr
        for batch in self._batches():
            # 1. Update the student
            rate = learning_rate(config.schedule, config.lr, state.step, self.plan.steps)
            targets = parts.targets.teacher_targets(batch, state.epoch)
            done = state.step / self.plan.steps
            parts.recorder.add(parts.step(batch, state.epoch, rate, done, targets))
            # 2. Advance the position
            state.step += 1
            state.step_in_epoch += 1
            state.images += batch.count
            state.seconds = seconds_before + time.perf_counter() - started
            last = state.step_in_epoch == self.plan.steps_per_epoch
            # 3. Log, report and save
            if config.log_every and state.step % config.log_every == 0:
                parts.recorder.steps(rate)
            if time.monotonic() - reported >= _SHOW_EVERY_S or last:
                reported = time.monotonic()
                self._report((state.images - images_before) / (time.perf_counter() - started))
            stop, save = self._agree(state.step, self.schedule.after_step(state.step))
            if (stop or save) and not last:
                self._save_state()
                if stop:
                    raise self._interrupted("the state is saved")
        parts.recorder.total()  # waits for the device: the time includes its work
        state.seconds = seconds_before + time.perf_counter() - started
        self._end_epoch(rate)

    def _batches(self) -> Iterator[Minibatch]:
        """This process's part of each batch that is left of the epoch."""
        state, size = self.state, self.config.batch_size
        order = augment.order(self.config.seed, state.epoch, self.plan.train_samples)
        starts = range(state.step_in_epoch * size, len(order), size)
        batches = [order[start : start + size] for start in starts]
        parts = [(*self.world.share(batch), len(batch)) for batch in batches]
        return self.parts.feed.batches(state.epoch % self.config.views, parts)

    def _end_epoch(self, rate: float) -> None:
        """Validate, log, report and save."""
        config, state = self.config, self.state
        self._validate()
        loss = self.parts.recorder.epoch(rate, self.val_accuracy)
        self.on_event(Epoch(state.epoch, config.epochs, loss, self.val_accuracy))
        last = state.epoch == config.epochs
        stop, save = self._agree(0, self.schedule.after_epoch(state.epoch, state.step))
        if last or stop or save:
            self._save_state()
        if stop and not last:
            raise self._interrupted("the state is saved")

    def _agree(self, step: int, due: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether to save; the same answer in all processes.

        Processes on GPUs synchronise every few steps only.
        """
        if self.world.size == 1:
            return bool(self.stop), due
        by_clock = self.schedule.unit == "min"
        if self.world.device.type != "cpu" and step % _AGREE_STEPS and (not due or by_clock):
            return False, False
        number, save = self.world.all_max(self.stop.signal or 0, int(due))
        self.stop.signal = number or None
        return bool(number), bool(save)

    def _validate(self) -> None:
        """Set the accuracy on the validation split, per cent; the student's mode stays as it is."""
        samples, data = self.plan.val_samples, self.plan.data.train
        if len(samples) == 0:
            return
        training = self.student.training
        self.student.eval()
        mine, weight = self.world.share(samples)
        logits = models.predict_logits(self.student, data.images, mine)
        if self.parts.scale is not None:
            logits = self.parts.scale(logits.to(self.world.device)).cpu()
        self.student.train(training)
        accuracy = metrics.accuracy(logits, torch.tensor(data.labels[mine]))
        if self.world.size > 1:
            weighted = torch.tensor([accuracy * weight], dtype=torch.float64, device=self.world.device)
            accuracy = float(self.world.mean(weighted))
        self.val_accuracy = accuracy

    def _save_state(self) -> None:
        parts = self.parts
        parts.recorder.store()
        if self.world.first:
            training = {
                "optimizer": parts.optimizer.state_dict(),
                "adapters": {name: dict(module.state_dict()) for name, module in parts.adapters.items()},
                "state": self.state.to_json(),
                "inputs": dict(self.plan.inputs),
                "made_with": self.plan.made_with,
            }
            checkpoint = self.student.to_checkpoint(training)
            parts.run.save_state(checkpoint, self.config.keep, parts.saved_step)
        parts.saved_step = self.state.step
        self.schedule.saved()

    def _report(self, images_per_s: float) -> None:
        """Send an event of the progress."""
        state, per_epoch = self.state, len(self.plan.train_samples)
        known = {} if self.val_accuracy is None else {"val_accuracy": self.val_accuracy}
        self.on_event(
            Progress(
                f"epoch {state.epoch + 1}/{self.config.epochs}",
                state.epoch * per_epoch + state.images,
                self.config.epochs * per_epoch,
                values={"loss": self.parts.recorder.loss_here(), **known, "images_per_s": images_per_s},
                group="training",
            )
        )

    def _interrupted(self, kept: str) -> Interrupted:
        return Interrupted(
            f"stopped at epoch {min(self.state.epoch + 1, self.config.epochs)} of {self.config.epochs}; {kept}",
            resume_command(self.parts.run.path, self.config.method),
            exit_code=self.stop.exit_code,
        )
