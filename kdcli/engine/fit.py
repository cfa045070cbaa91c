"""Training: one loop for every method, student and teacher."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcli import __version__, augment, checkpoint, methods, metrics, models, preprocess, runtime
from kdcli.config import TrainConfig
from kdcli.data import Splits
from kdcli.engine.evaluate import Evaluation, measure
from kdcli.engine.output import Output
from kdcli.engine.plan import FILLED, resolve, split
from kdcli.engine.result import Epoch, Result
from kdcli.engine.run_dir import RunDir
from kdcli.engine.schedule import learning_rate, make_optimizer
from kdcli.errors import Interrupted, KdError
from kdcli.events import Note, OnEvent, Progress, ignore
from kdcli.models import Classifier
from kdcli.teacher import Teacher, teacher_tensor

Int64 = npt.NDArray[np.int64]
_SHOW_EVERY_S = 0.5


@dataclass
class _State:
    """What changes while training; with the weights and the optimizer, all that a resume needs."""

    epoch: int = 0  # the pass under way, from 0
    step: int = 0  # steps done in all
    step_in_epoch: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of losses over the images of this epoch
    images: int = 0
    seconds: float = 0.0


def fit(
    config: TrainConfig, data: Splits, *, resume: RunDir | None = None, on_event: OnEvent = ignore
) -> Result:
    """Train a student as the settings say, and measure it once on the test data.

    Args:
        resume: an interrupted run to continue from its `last.pt`; `config` is then that run's own.

    Raises:
        KdError: teacher and data do not fit, the loss stopped being finite, or a file cannot be written.
        Interrupted: SIGINT or SIGTERM; the state is in `last.pt`.
    """
    with runtime.stop_on_signals() as stop:
        return _Run(config, data, resume, on_event, stop).go()


class _Run:
    """The parts of one run, made in `__init__`, used in `go`."""

    def __init__(
        self,
        config: TrainConfig,
        data: Splits,
        resume: RunDir | None,
        on_event: OnEvent,
        stop: runtime.StopFlag,
    ) -> None:
        self.on_event = on_event
        self.stop = stop
        self.data = data
        self.method = methods.get(config.method)
        filled = [name for name in FILLED if not getattr(config, name)]
        self.config = config = resolve(config)
        self.weights = self.method.weights(config)
        runtime.set_threads(config.threads)
        train = data.train
        self.train_samples, self.val_samples = split(train.labels, config.val_fraction)
        self.steps_per_epoch = -(-len(self.train_samples) // config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        # everything that can be wrong with what the user asked for comes before a folder is made
        self.teacher = (
            Teacher.open(config.teacher, config.cache_dir, config.threads) if "kd" in self.weights else None
        )
        self.live = self.teacher is not None and config.teacher_dropout > 0
        self.student = self._make_student()
        self.optimizer = make_optimizer(config, self.student.network)
        if resume is None:
            RunDir.check_free(config)
        if self.teacher is not None and self.method.regresses and self.teacher.gives_probabilities:
            raise KdError(
                f"teacher {config.teacher} gives probabilities, and method {config.method} regresses logits",
                "Use --method kd, or a teacher that gives logits.",
            )
        self.live_teacher: Classifier | None = None
        if self.teacher is not None and self.live:
            self.teacher.check(self.data.train)
            self.live_teacher = self.teacher.live(config.teacher_dropout)
        self.views = self._teacher_views()
        self.val_accuracy: float | None = None
        self.output: Output | None = None
        if self.views and self.method.regresses and models.head_of(self.student.network) is not None:
            self.output = Output.of(self.views[0][self.train_samples])
        self.state = _State()
        if resume is None:
            self.config, environment = self._settle_precision()
            self.run = RunDir.create(self.config, environment, filled)
        else:
            self.run = resume
        torch.manual_seed(config.seed)  # dropout's draws, from the same point whatever came before
        if resume is not None:
            self._restore()

    def _make_student(self) -> Classifier:
        config, train = self.config, self.data.train
        arguments: dict[str, Any] = (
            {"dropout": config.dropout} if models.takes_dropout(config.student) else {}
        )
        torch.manual_seed(config.seed)
        network = models.build(
            config.student, classes=len(train.classes), input_size=train.input_size, **arguments
        )
        own = preprocess.fit(config.preprocess, train.images, self.train_samples, on_event=self.on_event)
        student = Classifier(
            network.to(memory_format=torch.channels_last),
            own,
            arch=config.student,
            arch_args=arguments,
            classes=train.classes,
            input_size=train.input_size,
        )
        return student.train()

    def _settle_precision(self) -> tuple[TrainConfig, dict[str, Any]]:
        """The settings with `auto` resolved, and what `environment.json` says."""
        config = self.config
        example = self.student.prepare(_rows(self.data.train.images, self.train_samples[: config.batch_size]))
        precision, timings = runtime.choose_precision(
            config.precision, self.student.network, example, len(self.student.classes)
        )
        environment = {**runtime.environment(), "precision": precision, "precision_step_ms": timings}
        return config.model_copy(update={"precision": precision}), environment

    # --- the teacher -------------------------------------------------------------------------------------

    def _teacher_views(self) -> list[npt.NDArray[np.floating[Any]]]:
        """Logits of the training images for each view; empty without a teacher, or with a live one."""
        if self.teacher is None or self.live:
            return []
        config = self.config
        views = self.teacher.logits(
            self.data.train,
            augment_name=config.augment,
            seed=config.seed,
            views=config.views,
            task="teacher on train images",
            on_event=self.on_event,
            stop=lambda: bool(self.stop),
        )
        if len(views) < config.views:
            raise Interrupted(
                f"stopped after {len(views)} of {config.views} views of the teacher; they are kept",
                "Type the same command again.",
                exit_code=self.stop.exit_code,
            )
        return views

    def _teacher_on_test(self) -> Tensor | None:
        if self.teacher is None:
            return None
        kept = self.teacher.logits(
            self.data.test,
            exact=True,
            task="teacher on test images",
            on_event=self.on_event,
            stop=lambda: bool(self.stop),
        )
        if not kept:
            self._interrupted("training is finished, only the test is missing")
        return teacher_tensor(kept[0])

    # --- the loop ----------------------------------------------------------------------------------------

    def go(self) -> Result:
        """Train, then test once."""
        history: list[Epoch] = []
        while self.state.epoch < self.config.epochs:
            history.append(self._epoch())
        val_accuracy = self._validate()
        self.student.eval()
        if self.output is not None:
            self.output.fold(self.student.network)
        logits = models.predict(self.student, self.data.test.images, task="testing", on_event=self.on_event)
        evaluation = measure(logits, torch.tensor(self.data.test.labels), self._teacher_on_test())
        self.student.provenance = self._provenance(evaluation)
        self.student.save(self.run.student)
        seconds = self.state.seconds
        result = Result(
            run=self.run,
            config=self.config,
            evaluation=evaluation,
            val_accuracy=val_accuracy,
            epochs=tuple(history),
            parameters=models.parameter_count(self.student.network),
            teacher_passes=self.teacher.passes if self.teacher else 0,
            seconds=seconds,
            images_per_s=len(self.train_samples) * self.config.epochs / seconds if seconds else 0.0,
        )
        self.run.write_result(result.to_json())
        return result

    def _epoch(self) -> Epoch:
        """One pass, or the rest of one that was interrupted."""
        config, state = self.config, self.state
        targets = teacher_tensor(self.views[state.epoch % config.views]) if self.views else None
        order = augment.order(config.seed, state.epoch, self.train_samples)
        started, shown, images_before = time.perf_counter(), time.monotonic(), state.images
        seconds_before = state.seconds
        sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.sums.items()}
        rate = config.lr
        for number in range(state.step_in_epoch, self.steps_per_epoch):
            samples = order[number * config.batch_size : (number + 1) * config.batch_size]
            rate = learning_rate(config.schedule, config.lr, state.step, self.steps)
            terms = self._step(samples, rate, targets)
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value * len(samples)
            state.step += 1
            state.step_in_epoch = number + 1
            state.images += len(samples)
            now = time.monotonic()
            if now - shown >= _SHOW_EVERY_S or state.step_in_epoch == self.steps_per_epoch:
                shown = now
                self._show(sums, state.images - images_before, time.perf_counter() - started)
            if self.stop and state.step_in_epoch < self.steps_per_epoch:
                state.sums = {name: float(value) for name, value in sums.items()}
                state.seconds = seconds_before + time.perf_counter() - started
                self._save_last()
                self._interrupted("the state is saved")
        means = {name: float(value) / state.images for name, value in sums.items()}
        loss = sum(weight * means[name] for name, weight in self.weights.items())
        if not np.isfinite(loss):
            raise KdError(
                f"the loss is no longer finite (epoch {state.epoch + 1})",
                "Lower --lr; for logits and noisy also --kd-weight.",
            )
        elapsed = time.perf_counter() - started
        state.seconds = seconds_before + elapsed
        epoch = Epoch(
            epoch=state.epoch + 1,
            step=state.step,
            loss=loss,
            terms=means,
            val_accuracy=self._validate(),
            lr=rate,
            images_per_s=(state.images - images_before) / elapsed,
            seconds=state.seconds,
        )
        self.run.append_metrics(epoch.to_json())
        state.epoch, state.step_in_epoch, state.images, state.sums = epoch.epoch, 0, 0, {}
        last = state.epoch == config.epochs
        if last or self.stop or (config.save_every and state.epoch % config.save_every == 0):
            self._save_last()
        if self.stop and not last:
            self._interrupted("the state is saved")
        return epoch

    def _step(self, samples: Int64, rate: float, targets: Tensor | None) -> dict[str, Tensor]:
        """One optimizer step; returns the unweighted terms, detached."""
        config, train, epoch = self.config, self.data.train, self.state.epoch
        images = augment.apply(
            config.augment, _rows(train.images, samples), config.seed, epoch % config.views, samples
        )
        teacher_logits = None
        if targets is not None:
            teacher_logits = targets[torch.from_numpy(samples)]
        elif self.live_teacher is not None:
            with torch.inference_mode():
                teacher_logits = self.live_teacher(images).float()
            teacher_logits = teacher_logits.clone()  # an inference tensor cannot be saved for backward
        prepared = self.student.prepare(images)  # in float32, as in evaluation and in the export
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            logits = self.student.network(prepared)
        logits = logits.float() if self.output is None else self.output(logits.float())
        terms = self.method.terms(
            methods.Batch(
                student_logits=logits,
                teacher_logits=teacher_logits,
                labels=torch.tensor(train.labels[samples]),
                samples=samples,
                epoch=epoch,
                config=config,
            )
        )
        total = sum((self.weights[name] * value for name, value in terms.items()), torch.zeros(()))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return {name: value.detach() for name, value in terms.items()}

    def _validate(self) -> float | None:
        """Accuracy on the validation split, per cent; leaves the student as it was."""
        if len(self.val_samples) == 0:
            return None
        training = self.student.training
        self.student.eval()
        images = np.asarray(self.data.train.images[self.val_samples])
        logits = models.predict(self.student, images)
        if self.output is not None:
            logits = self.output(logits)
        self.student.train(training)
        self.val_accuracy = metrics.accuracy(logits, torch.tensor(self.data.train.labels[self.val_samples]))
        return self.val_accuracy

    def _show(self, sums: dict[str, Tensor], images: int, seconds: float) -> None:
        state = self.state
        loss = sum(weight * float(sums[name]) for name, weight in self.weights.items()) / state.images
        seen = {} if self.val_accuracy is None else {"val_accuracy": self.val_accuracy}
        self.on_event(
            Progress(
                f"epoch {state.epoch + 1}/{self.config.epochs}",
                state.epoch * len(self.train_samples) + state.images,
                self.config.epochs * len(self.train_samples),
                values={"loss": loss, **seen, "images_per_s": images / seconds},
                group="training",
            )
        )

    # --- state -------------------------------------------------------------------------------------------

    def _save_last(self) -> None:
        training = {
            "optimizer": self.optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "state": asdict(self.state),
            "data": [self.data.train.fingerprint, self.data.test.fingerprint],
            "teacher": self.teacher.sha256 if self.teacher else None,
        }
        checkpoint.save(self.run.last, self.student.to_checkpoint(training))

    def _restore(self) -> None:
        """Continue where `last.pt` left off; anything that does not fit is an error, never a warning."""
        if not self.run.last.exists():
            self.run.cut_metrics(0)  # stopped before its first checkpoint: from the start
            return
        stored = checkpoint.load(self.run.last)
        training = stored.training or {}
        try:
            if training["data"] != [self.data.train.fingerprint, self.data.test.fingerprint]:
                raise KdError(
                    f"the data is not what {self.run.path} was trained on", "Restore it, or start anew."
                )
            if training["teacher"] != (self.teacher.sha256 if self.teacher else None):
                raise KdError(
                    f"the teacher is not the one {self.run.path} began with", "Restore it, or start anew."
                )
            self.student.network.load_state_dict(stored.state_dict)
            self.optimizer.load_state_dict(training["optimizer"])
            self.state = _State(**training["state"])
            torch.set_rng_state(training["torch_rng"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise KdError(f"{self.run.last} does not fit its run: {error}", "Start the run anew.") from error
        self.run.cut_metrics(self.state.epoch)
        self.on_event(
            Note(f"continuing {self.run.path.as_posix()} after step {self.state.step} of {self.steps}")
        )

    def _interrupted(self, kept: str) -> None:
        raise Interrupted(
            f"stopped at epoch {min(self.state.epoch + 1, self.config.epochs)} of {self.config.epochs}; {kept}",
            f"kd train --resume {shlex.quote(self.run.path.as_posix())}",
            exit_code=self.stop.exit_code,
        )

    def _provenance(self, evaluation: Evaluation) -> dict[str, Any]:
        config, teacher = self.config, self.teacher
        return {
            "kind": "student" if teacher else "model",
            "method": config.method,
            "student": config.student,
            "teacher": {"path": teacher.path.as_posix(), "sha256": teacher.sha256} if teacher else None,
            "data": {
                "spec": self.data.spec,
                "label": self.data.label,
                "image_size": config.image_size,
                "fingerprint_train": self.data.train.fingerprint,
                "fingerprint_test": self.data.test.fingerprint,
            },
            "seed": config.seed,
            "epochs": config.epochs,
            "test_accuracy": evaluation.accuracy,
            "agreement": evaluation.agreement,
            "run": self.run.path.name,
            "kd_version": __version__,
        }


def _rows(images: npt.NDArray[np.uint8], samples: Int64) -> Tensor:
    """The named images, uint8 (B, H, W, C), copied out of what may be a memory map."""
    return torch.from_numpy(np.ascontiguousarray(images[samples]))
