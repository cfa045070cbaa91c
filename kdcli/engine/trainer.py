"""A run of one student: the training loop, for every method, student and teacher."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcli import __version__, models
from kdcli.base import metrics
from kdcli.base.errors import Interrupted, KdError
from kdcli.base.events import Epoch, Note, OnEvent, Progress
from kdcli.base.files import write_json
from kdcli.base.names import NETWORKS
from kdcli.base.runtime import StopFlag
from kdcli.data import augment
from kdcli.engine.feed import Feed, Minibatch, make_teacher_outputs, note_other_networks
from kdcli.engine.identity import differences
from kdcli.engine.plan import RunPlan, open_run
from kdcli.engine.preflight import check_teacher
from kdcli.engine.records import Evaluation, RunResult, Unlabelled, cut_metrics, measure
from kdcli.engine.run_dir import RunDir, resume_command
from kdcli.engine.state import Recorder, SaveSchedule, State, load_newest
from kdcli.engine.step import Ema, Step, learning_rate, make_optimizer
from kdcli.engine.student import OutputScale, make_adapters, make_student
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.reproducible import DropoutKeys, use_global_batch_norm, use_sample_dropout

_SHOW_EVERY_S = 0.5
_AGREE_STEPS = 8


class Trainer:
    """One run: its parts, made from the plan or restored, and the training loop."""

    def __init__(self, plan: RunPlan, resume: RunDir | None, on_event: OnEvent, stop: StopFlag) -> None:
        """Make or restore all parts. A user's mistakes are found before the folder is made."""
        config, world = plan.config, plan.world
        self.world, self.on_event, self.stop = world, on_event, stop
        if resume is None:
            on_event(Note(plan.summary))
        # 1. The saved state, of the same inputs; student, with its preprocessing
        saved = None if resume is None else load_newest(resume, plan.inputs, on_event)
        student = make_student(config, plan.data.train, plan.labelled_samples, world.device, on_event)
        if student.file_sha256 != plan.inputs.get("student", ""):
            raise KdError(
                f"student {config.student} was replaced while it was read", "Rerun the same command."
            )
        if resume is None and world.first:
            RunDir.check_free(config)
        # 2. Teacher: cached views, or live; its figures on a sample of the batches
        self.feed = Feed(plan.train, config.augment, config.augment_seed, plan.train_samples, world.device)
        self.outputs = make_teacher_outputs(plan, on_event, stop)
        self.teacher = world.from_first(lambda: check_teacher(plan, self.outputs, self.feed, on_event))
        note_other_networks(plan, student.arch, on_event)
        # 3. Adapters, optimizer, output scale of a regressing student whose last layer is linear
        stages, self.adapters = make_adapters(plan, student, self.outputs)
        self.optimizer = make_optimizer(config, student.network, *self.adapters.values())
        self.scale: OutputScale | None = None
        if (
            self.outputs.views
            and plan.objective.regresses
            and models.final_linear(student.network) is not None
        ):
            self.scale = OutputScale.of_logits(self.outputs.views[0], plan.train_samples, world.device)
            if config.student_file is not None:
                self.scale.unfold(student.network)
        # 4. Precision and the run's folder
        self.student = student
        self.plan, self.run = open_run(plan, student) if resume is None else (plan, resume)
        self.config = self.plan.config
        # 5. Layers that train the same however a batch is divided, and wherever a run was stopped
        keys = DropoutKeys(config.seed, reseeds=student.arch not in NETWORKS)
        use_sample_dropout(student.network, keys)
        if world.size > 1:
            for module in (student.network, *self.adapters.values()):
                use_global_batch_norm(module)
        # 6. The position; of a resumed run, that of its newest saved state
        self.ema = Ema(student.network, config.ema)
        self.state = State()
        self.saved_step: int | None = None  # of the present `last.pt`; None without a readable one
        if resume is not None:
            self._restore(saved)
        # 7. Step and records
        self.step = Step(self.plan, student, self.adapters, stages, self.optimizer, self.scale, keys)
        self.recorder = Recorder(self.config, self.run, plan.objective.terms, self.state, world)
        self.schedule = SaveSchedule(self.config)
        self.val_accuracy: float | None = None  # on the validation split, per cent

    def _restore(self, saved: tuple[Path, Checkpoint] | None) -> None:
        """Load a saved state, if there is one, into all parts, and cut the metrics after it."""
        if saved is not None:
            path, stored = saved
            training = stored.training or {}
            try:
                self.student.network.load_state_dict(stored.state_dict)
                for name, module in self.adapters.items():
                    module.load_state_dict(training["adapters"][name])
                self.optimizer.load_state_dict(training["optimizer"])
                self.ema.load(training["ema"])
                self.state = State(**training["state"])
                changes = differences(training["made_with"], self.plan.made_with)
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise KdError(f"{path} does not fit its run: {error}", "Start the run anew.") from error
            for change in changes:
                self.on_event(
                    Note(f"{change}: the result will not be bit-identical to an uninterrupted run's")
                )
            self.state.marks += [change for change in changes if change not in self.state.marks]
            self.saved_step = self.state.step if path == self.run.last else None
        if self.world.first:
            cut_metrics(self.run.metrics_file, self.state.step, self.state.epoch)
        self.world.barrier()
        if saved is None:
            self.on_event(
                Note(f"{self.run.path.as_posix()} has no saved state: it starts from the beginning")
            )
        else:
            where = f"step {self.state.step} of {self.plan.steps}"
            self.on_event(Note(f"continuing {self.run.path.as_posix()} after {where}"))

    def train(self) -> RunResult:
        """Train to the end, measure the student on the test images, and write checkpoint and result."""
        # 1. Epochs
        while self.state.epoch < self.config.epochs:
            self._epoch()
        # 2. Figures
        if self.val_accuracy is None:  # of a run that is resumed after its last epoch
            self._validate()
        self.student.eval()
        self.ema.swap()
        if self.scale is not None:
            self.scale.fold(self.student.network)
        evaluation = self._evaluate() if self.plan.test else None
        # 3. Files
        result = self._result(evaluation)
        self.student.provenance = self._provenance(result)
        if self.world.first:
            self.student.save(self.run.student)
            write_json(self.run.result_file, result.to_dict())
        self.world.barrier()
        return result

    def _evaluate(self) -> Evaluation:
        """Figures on the test images; no other code of training evaluates a model on them."""
        plan, test = self.plan, self.plan.data.test
        teacher_logits = None
        if plan.teacher is not None and not plan.teacher.reason_unavailable(test):
            teacher_logits = plan.teacher.test_logits(test, self.on_event, lambda: bool(self.stop))
            if teacher_logits is None:
                raise self._interrupted("training is finished, only the test is missing")
        logits = models.predict_logits(self.student, test.images, task="testing", on_event=self.on_event)
        return measure(logits, torch.tensor(test.labels), teacher_logits)

    def _epoch(self) -> None:
        """One pass, or the rest of one that was interrupted."""
        config, state = self.config, self.state
        started, reported = time.perf_counter(), time.monotonic()
        seconds_before, images_before = state.seconds, state.images
        rate = config.lr
        for batch in self._batches():
            # 1. Update the student
            rate = learning_rate(config.schedule, config.lr, state.step, self.plan.steps)
            teacher = self.outputs(batch, state.epoch)
            done = state.step / self.plan.steps
            self.recorder.sums += self.step(batch, state.epoch, rate, done, teacher)
            self.ema.update(state.step)
            # 2. Advance the position
            state.step += 1
            state.step_in_epoch += 1
            state.images += batch.count
            state.seconds = seconds_before + time.perf_counter() - started
            last = state.step_in_epoch == self.plan.steps_per_epoch
            # 3. Log, report and save
            if config.log_every and state.step % config.log_every == 0:
                self.recorder.steps(rate)
            if time.monotonic() - reported >= _SHOW_EVERY_S or last:
                reported = time.monotonic()
                self._report((state.images - images_before) / (time.perf_counter() - started))
            stop, save = self._agree(state.step, self.schedule.due(state, epoch_ended=False))
            if (stop or save) and not last:
                self._save_state()
                if stop:
                    raise self._interrupted("the state is saved")
        self.recorder.total()  # waits for the device: the time includes its work
        state.seconds = seconds_before + time.perf_counter() - started
        self._end_epoch(rate)

    def _batches(self) -> Iterator[Minibatch]:
        """This process's part of each batch that is left of the epoch."""
        state, size = self.state, self.config.batch_size
        order = augment.order(self.config.seed, state.epoch, self.plan.train_samples)
        batches = np.split(order, range(size, self.plan.steps_per_epoch * size, size))
        parts = [(*self.world.share(batch), len(batch)) for batch in batches[state.step_in_epoch :]]
        return self.feed.batches(state.epoch % self.config.views, parts)

    def _end_epoch(self, rate: float) -> None:
        """Validate, log, report and save."""
        config, state = self.config, self.state
        self._validate()
        loss = self.recorder.epoch(rate, self.val_accuracy)
        self.on_event(Epoch(state.epoch, config.epochs, loss, self.val_accuracy))
        last = state.epoch == config.epochs
        stop, save = self._agree(0, self.schedule.due(state, epoch_ended=True))
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
        if number:
            self.stop.signal = number
        return bool(number), bool(save)

    def _validate(self) -> None:
        """Set the accuracy on the validation split, per cent; the student's mode stays as it is."""
        samples, data = self.plan.val_samples, self.plan.data.train
        if len(samples) == 0:
            return
        training = self.student.training
        self.student.eval()
        mine, weight = self.world.share(samples)
        self.ema.swap()
        logits = models.predict_logits(self.student, data.images, mine)
        self.ema.swap()
        if self.scale is not None:
            logits = self.scale(logits.to(self.world.device)).cpu()
        self.student.train(training)
        accuracy = metrics.accuracy(logits, torch.tensor(data.labels[mine]))
        if self.world.size > 1:
            weighted = torch.tensor([accuracy * weight], dtype=torch.float64, device=self.world.device)
            accuracy = float(self.world.mean(weighted))
        self.val_accuracy = accuracy

    def _save_state(self) -> None:
        self.state.sums = self.world.rows(self.recorder.sums)  # of all processes
        if self.world.first:
            training = {
                "optimizer": self.optimizer.state_dict(),
                "adapters": {name: dict(module.state_dict()) for name, module in self.adapters.items()},
                "ema": self.ema.values,
                "state": asdict(self.state),
                "inputs": dict(self.plan.inputs),
                "made_with": self.plan.made_with,
            }
            checkpoint = self.student.to_checkpoint(training)
            self.run.save_state(checkpoint, self.config.keep, self.saved_step)
        self.world.barrier()  # a process that ends early would end the one that writes
        self.saved_step = self.state.step
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
                values={"loss": self.recorder.loss_here(), **known, "images_per_s": images_per_s},
                group="training",
            )
        )

    def _interrupted(self, kept: str) -> Interrupted:
        return Interrupted(
            f"stopped at epoch {min(self.state.epoch + 1, self.config.epochs)} of {self.config.epochs}; {kept}",
            resume_command(self.run.path, self.config),
            exit_code=self.stop.exit_code,
        )

    def _provenance(self, result: RunResult) -> dict[str, Any]:
        """Origin of a student: plain JSON values, read again by `identity.recorded_inputs`."""
        plan, config, teacher, data = self.plan, self.config, self.plan.teacher, self.plan.data
        return {
            "kind": "student" if teacher else "model",
            "method": config.method,
            "student": config.student,
            "inputs": dict(plan.inputs),
            "teacher": teacher.record() if teacher else None,
            "data": {
                "spec": data.spec,
                "label": data.label,
                "image_size": config.image_size,
                "resize": data.train.resize or None,
                "grey": config.grey,
                "val_fraction": config.val_fraction,
                "test_fraction": data.test_fraction,
                "skip_broken": config.skip_broken,
                "fingerprint_train": data.train.fingerprint,
                "fingerprint_test": data.test.fingerprint,
                "unlabelled": result.unlabelled.to_dict() if result.unlabelled else None,
            },
            "seed": config.seed,
            "epochs": config.epochs,
            "test_accuracy": result.test.accuracy if result.test else None,
            "agreement": result.test.agreement if result.test else None,
            "run": self.run.path.name,
            "kd_version": __version__,
        }

    def _result(self, evaluation: Evaluation | None) -> RunResult:
        """Figures of a finished run."""
        plan, config, seconds = self.plan, self.config, self.state.seconds
        unlabelled, images = None, plan.data.unlabelled
        if images is not None:
            spec = None if config.unlabelled is None else config.unlabelled.as_posix()
            unlabelled = Unlabelled(spec=spec, count=len(images), fingerprint=images.fingerprint)
        return RunResult(
            run=self.run,
            method=config.method,
            student=config.student,
            seed=config.seed,
            epochs=config.epochs,
            parameters=models.parameter_count(self.student.network),
            val_accuracy=self.val_accuracy,
            val_images=len(plan.val_samples),
            test=evaluation,
            test_in_train=plan.data.overlap,
            test_fraction=plan.data.test_fraction,
            teacher=self.teacher,
            teacher_passes=plan.teacher.views_computed if plan.teacher else 0,
            seconds=seconds,
            images_per_s=len(plan.train_samples) * config.epochs / seconds if seconds else 0.0,
            unlabelled=unlabelled,
            resumed_with_differences=tuple(self.state.marks),
        )
