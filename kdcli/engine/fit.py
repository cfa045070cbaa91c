"""Training: one loop for every method, student and teacher."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcli import __version__, methods, models
from kdcli.base import metrics, runtime
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Epoch, Note, OnEvent, Progress, ignore
from kdcli.base.runtime import World
from kdcli.base.text import reason
from kdcli.data import Splits, augment, rows
from kdcli.data.split import split
from kdcli.engine import identity, tensorboard
from kdcli.engine.adapters import make_adapters, states_of
from kdcli.engine.evaluate import measure
from kdcli.engine.feed import Feed
from kdcli.engine.plan import FILLED, check, resolve
from kdcli.engine.record import Record
from kdcli.engine.records import Evaluation, RunResult, Unlabelled, cut_metrics, write_result
from kdcli.engine.run_dir import RunDir, resume_command
from kdcli.engine.schedule import learning_rate, make_optimizer
from kdcli.engine.state import Due, State, newest, restore
from kdcli.engine.step import Step
from kdcli.engine.student import make_student
from kdcli.engine.targets import Targets
from kdcli.methods import TrainConfig
from kdcli.models.reproducible import DropoutKeys, use_global_batch_norm, use_sample_dropout

Int64 = npt.NDArray[np.int64]
_SHOW_EVERY_S = 0.5
_AGREE_STEPS = 8
_FEW_STEPS, _SMALL_BATCH = 50, 32


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

    What `on_event` raises ends a run of one process there: what has been written by then is whole.

    Args:
        resume: an interrupted run to continue from its newest state; `config` is then that run's own.
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
    with runtime.stop_on_signals() as stop, world.report_lost_process():
        run = _Run(config, data, resume, world, test, on_event if world.first else ignore, stop, chain)
        try:
            return run.go()
        except OSError as error:
            raise KdError(
                f"cannot write to {run.run.path}: {reason(error)}",
                f"Free some space; then {resume_command(run.run.path, config.method)}",
            ) from error
        finally:
            run.record.close()


class _Run:
    """The parts of one run, made in `__init__`, used in `go`."""

    def __init__(
        self,
        config: TrainConfig,
        data: Splits,
        resume: RunDir | None,
        world: World,
        test: bool,
        on_event: OnEvent,
        stop: runtime.StopFlag,
        chain: TrainConfig | None,
    ) -> None:
        check(config, data)
        self.test = test
        self.on_event = on_event
        self.stop = stop
        self.chain = chain
        self.data = data
        self.world = world
        self.method = methods.objective(config)
        self.sources = methods.source_digests(
            config.method
        )  # as they are now: the files may change meanwhile
        tensorboard.require(config)
        if not config.compile:
            runtime.spare_the_compiler()
        filled = [name for name in FILLED if not getattr(config, name)]
        self.config = config = resolve(config)
        runtime.set_threads(config.threads, world.local_size)
        runtime.keep_freed_memory()
        self.train = train = data.trained_on
        labelled, self.val_samples = split(data.train.labels, config.val_fraction)
        self.train_samples = np.concatenate([labelled, np.arange(len(data.train), len(train))])
        self.steps_per_epoch = -(-len(self.train_samples) // config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        if self.steps < _FEW_STEPS and config.batch_size > _SMALL_BATCH and resume is None:
            count = f"{len(self.train_samples):,} images in batches of {config.batch_size}"
            text = f"{self.steps} steps are few to learn from: {count}; --batch-size 32 or more --epochs make more"
            on_event(Note(text))
        # everything that can be wrong with what the user asked for comes before a folder is made
        self.targets = Targets(
            config, self.method, train, data.test, self.train_samples, world, on_event, stop
        )
        self.teacher = self.targets.teacher
        self.student = make_student(config, data.train, labelled, world.device, on_event)
        self.inputs = identity.input_hashes(config, data)
        self.environment = identity.environment(world)
        if resume is None and world.first:
            RunDir.check_free(config)
        self.targets.prepare()
        self.targets.note_other_networks(self.student.arch)
        stages, self.adapters = make_adapters(
            config, self.method, self.student, self.targets, train, self.train_samples
        )
        self.optimizer = make_optimizer(config, self.student.network, *self.adapters.values())
        self.output = self.targets.output_for(self.student.network)
        if self.output is not None and config.student_file is not None:
            self.output.unfold(self.student.network)
        self.val_accuracy: float | None = None
        self.run = self._open_run(resume, filled)
        self.made_with = identity.made_with(self.config, self.environment)
        self.draw = DropoutKeys(config.seed)
        use_sample_dropout(self.student.network, self.draw)
        if world.size > 1:
            for module in (self.student.network, *self.adapters.values()):
                use_global_batch_norm(module)
        self.state = State()
        self.saved_step: int | None = None
        if resume is not None:
            self._restore()
        self.due = Due(self.config)
        self.feed = Feed(
            train, self.config.augment, self.config.augment_seed, self.train_samples, world.device
        )
        self.step = Step(
            self.config,
            self.method,
            self.student,
            self.adapters,
            stages,
            self.optimizer,
            self.output,
            self.draw,
            world,
        )
        self.record = Record(self.config, self.run, list(self.method.terms), self.state, world)

    def _open_run(self, resume: RunDir | None, filled: list[str]) -> RunDir:
        """The run's folder, with its settings and what they depend on in it; `auto` is settled by now."""
        world = self.world
        if resume is not None:
            return resume
        made = None
        if world.first:
            config = self.config
            sample = self.train_samples[: config.batch_size]
            example = self.student.prepare(
                torch.from_numpy(rows.take(self.train.images, sample)).to(world.device)
            )
            precision, timings = runtime.choose_precision(
                config.precision, self.student.network, example, len(self.student.classes)
            )
            config = config.model_copy(update={"precision": precision})
            measured = {"precision": precision, "precision_step_ms": timings}
            made = RunDir.create(config, {**self.environment, **measured}, filled, self.chain), config
        run, self.config = world.broadcast(made) or (RunDir(self.config.runs_dir), self.config)
        return run

    # --- the loop ----------------------------------------------------------------------------------------

    def go(self) -> RunResult:
        """Train, then test once, if at all."""
        while self.state.epoch < self.config.epochs:
            self._epoch()
        val_accuracy = self._validate()
        self.student.eval()
        if self.output is not None:
            self.output.fold(self.student.network)
        evaluation = self._evaluate() if self.test else None
        self.student.provenance = self._provenance(evaluation)
        seconds = self.state.seconds
        result = RunResult(
            run=self.run,
            method=self.config.method,
            student=self.config.student,
            seed=self.config.seed,
            epochs=self.config.epochs,
            val_accuracy=val_accuracy,
            test=evaluation,
            parameters=models.parameter_count(self.student.network),
            teacher_passes=self.teacher.passes if self.teacher else 0,
            seconds=seconds,
            images_per_s=len(self.train_samples) * self.config.epochs / seconds if seconds else 0.0,
            resumed_with_differences=tuple(self.state.marks),
            unlabelled=self._unlabelled(),
        )
        if self.world.first:
            self.student.save(self.run.student)
            write_result(result)
        self.world.barrier()
        return result

    def _evaluate(self) -> Evaluation:
        """The one look at the test images."""
        teacher_logits = None if self.teacher is None else self.targets.on_test(self.teacher)
        if self.teacher is not None and teacher_logits is None:
            self._interrupted("training is finished, only the test is missing")
        logits = models.predict_logits(
            self.student, self.data.test.images, task="testing", on_event=self.on_event
        )
        return measure(logits, torch.tensor(self.data.test.labels), teacher_logits)

    def _epoch(self) -> None:
        """One pass, or the rest of one that was interrupted."""
        config, state = self.config, self.state
        order = augment.order(config.seed, state.epoch, self.train_samples)
        starts = range(state.step_in_epoch * config.batch_size, len(order), config.batch_size)
        batches = [order[start : start + config.batch_size] for start in starts]
        parts = [(*self.world.share(batch), len(batch)) for batch in batches]
        started, shown = time.perf_counter(), time.monotonic()
        seconds_before, images_before = state.seconds, state.images
        rate = config.lr
        for inputs in self.feed.batches(state.epoch % config.views, parts):
            rate = learning_rate(config.schedule, config.lr, state.step, self.steps)
            told = self.targets.of(inputs, state.epoch)
            self.record.add(self.step(inputs, state.epoch, rate, state.step / self.steps, told))
            state.step += 1
            state.step_in_epoch += 1
            state.images += inputs.count
            state.seconds = seconds_before + time.perf_counter() - started
            ends = state.step_in_epoch == self.steps_per_epoch
            if config.log_every and state.step % config.log_every == 0:
                self.record.steps(rate)
            if time.monotonic() - shown >= _SHOW_EVERY_S or ends:
                shown = time.monotonic()
                speed = (state.images - images_before) / (time.perf_counter() - started)
                self._show(speed)
            stop, save = self._agreed(state.step, self.due.after_step(state.step))
            if (stop or save) and not ends:
                self._save_state()
                if stop:
                    self._interrupted("the state is saved")
        self.record.total()  # waits for the device, so that the time is that of the work
        state.seconds = seconds_before + time.perf_counter() - started
        self._end_epoch(rate)

    def _end_epoch(self, rate: float) -> None:
        """Look at the epoch's loss, validate, log, tell and save."""
        config, state = self.config, self.state
        val_accuracy = self._validate()
        loss = self.record.epoch(rate, val_accuracy)
        self.on_event(Epoch(state.epoch, config.epochs, loss, val_accuracy))
        last = state.epoch == config.epochs
        stop, save = self._agreed(0, self.due.after_epoch(state.epoch, state.step))
        if last or stop or save:
            self._save_state()
        if stop and not last:
            self._interrupted("the state is saved")

    def _agreed(self, step: int, due: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether to save; the same answer in all processes.

        GPUs are not made to wait for one another after each step.
        """
        if self.world.size == 1:
            return bool(self.stop), due
        if self.world.device.type != "cpu" and step % _AGREE_STEPS and (not due or self.due.unit == "min"):
            return False, False
        number, save = self.world.all_max(self.stop.signal or 0, int(due))
        self.stop.signal = number or None
        return bool(number), bool(save)

    def _validate(self) -> float | None:
        """Accuracy on the validation split, per cent; leaves the student as it was."""
        if len(self.val_samples) == 0:
            return None
        training = self.student.training
        self.student.eval()
        mine, weight = self.world.share(self.val_samples)
        logits = models.predict_logits(self.student, self.data.train.images, mine)
        if self.output is not None:
            logits = self.output(logits.to(self.world.device)).cpu()
        self.student.train(training)
        accuracy = metrics.accuracy(logits, torch.tensor(self.data.train.labels[mine]))
        if self.world.size > 1:
            shared = self.world.mean(
                torch.tensor([accuracy * weight], dtype=torch.float64, device=self.world.device)
            )
            accuracy = float(shared)
        self.val_accuracy = accuracy
        return accuracy

    # --- state -------------------------------------------------------------------------------------------

    def _save_state(self) -> None:
        self.record.store()
        if self.world.first:
            training = {
                "optimizer": self.optimizer.state_dict(),
                "adapters": states_of(self.adapters),
                "state": self.state.to_json(),
                "inputs": self.inputs,
                "made_with": self.made_with,
            }
            self.run.save_state(self.student.to_checkpoint(training), self.config.keep, self.saved_step)
        self.saved_step = self.state.step
        self.due.done()

    def _restore(self) -> None:
        """Continue where the newest state left off; anything that does not fit is an error, never a warning."""
        found = newest(self.run, self.on_event)
        if found is not None:
            path, stored = found
            self.state = restore(
                stored,
                path,
                self.student.network,
                self.adapters,
                self.optimizer,
                self.inputs,
                self.made_with,
                lambda text: self.on_event(Note(text)),
            )
            self.saved_step = self.state.step if path == self.run.last else None
        if self.world.first:
            cut_metrics(self.run.metrics_file, self.state.step, self.state.epoch)
        self.world.barrier()
        if found is not None:
            self.on_event(
                Note(f"continuing {self.run.path.as_posix()} after step {self.state.step} of {self.steps}")
            )

    def _show(self, images_per_s: float) -> None:
        state = self.state
        seen = {} if self.val_accuracy is None else {"val_accuracy": self.val_accuracy}
        self.on_event(
            Progress(
                f"epoch {state.epoch + 1}/{self.config.epochs}",
                state.epoch * len(self.train_samples) + state.images,
                self.config.epochs * len(self.train_samples),
                values={"loss": self.record.loss_here(), **seen, "images_per_s": images_per_s},
                group="training",
            )
        )

    def _interrupted(self, kept: str) -> None:
        raise Interrupted(
            f"stopped at epoch {min(self.state.epoch + 1, self.config.epochs)} of {self.config.epochs}; {kept}",
            resume_command(self.run.path, self.config.method),
            exit_code=self.stop.exit_code,
        )

    def _unlabelled(self) -> Unlabelled | None:
        images, path = self.data.unlabelled, self.config.unlabelled
        if images is None:
            return None
        spec = None if path is None else path.as_posix()
        return Unlabelled(spec=spec, count=len(images), fingerprint=images.fingerprint)

    def _provenance(self, evaluation: Evaluation | None) -> dict[str, Any]:
        config, teacher, unlabelled = self.config, self.teacher, self._unlabelled()
        return {
            "kind": "student" if teacher else "model",
            "method": config.method,
            "method_sha256": self.sources,
            "student": config.student,
            "student_sha256": self.inputs.get("student"),
            "teacher": teacher.record() if teacher else None,
            "data": {
                "spec": self.data.spec,
                "label": self.data.label,
                "image_size": config.image_size,
                "val_fraction": config.val_fraction,
                "skip_broken": config.skip_broken,
                "fingerprint_train": self.data.train.fingerprint,
                "fingerprint_test": self.data.test.fingerprint,
                "unlabelled": unlabelled.to_json() if unlabelled else None,
            },
            "seed": config.seed,
            "epochs": config.epochs,
            "test_accuracy": evaluation.accuracy if evaluation else None,
            "agreement": evaluation.agreement if evaluation else None,
            "run": self.run.path.name,
            "kd_version": __version__,
        }
