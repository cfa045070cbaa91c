"""The search: Optuna samples settings, `engine.fit` trains with them, validation accuracy decides."""

import json
import math
import shutil
import time
import warnings
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from kdcli import models
from kdcli.base import files, runtime
from kdcli.base.errors import Interrupted, KdError, UsageError, is_out_of_memory
from kdcli.base.events import Epoch, Event, Note, OnEvent, ignore, notes_once, titled
from kdcli.data import Splits
from kdcli.data.split import split_validation
from kdcli.engine import fit
from kdcli.engine.identity import BY_CONTENT, decisive_settings, input_hashes
from kdcli.engine.plan import resolve
from kdcli.methods import TrainConfig
from kdcli.studies.tune.space import Space, TuneConfig, apply, candidates, choices, describe, methods_of
from kdcli.studies.tune.study import (
    PROCESS,
    REASON,
    count,
    draw,
    make_sampler,
    open_study,
    queue_trial,
    read_url,
    readable_errors,
    redacted,
    retry_killed,
    this_process,
    trials_of,
)
from kdcli.studies.tune.summary import TuneResult, best_of, summarize


def tune(config: TuneConfig, space: Space, data: Splits, *, on_event: OnEvent = ignore) -> TuneResult:
    """Train the missing trials of a study, alongside other processes that do the same. Test images are not read.

    A UsageError if the study was started with other settings. If Interrupted, the current values are queued again.
    """
    check(config, space)
    if len(split_validation(data.train.labels, config.val_fraction, data.train.validation)[1]) == 0:
        raise UsageError(
            f"--val-fraction {config.val_fraction} keeps no image for validation",
            "Raise it, with two or more images of each class.",
        )
    folder = config.folder
    url = read_url(config.storage, folder / "study.db")
    comparable = not any(part.name == "epochs" for part in space)
    with readable_errors(url), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of constant_liar
        settings = _shared_settings(config, space, data)
        with files.locked(folder / ".lock", lambda: None):
            study = open_study(url, config.study_name, settings, config.pruner if comparable else "none")
            is_new = not study.get_trials(deepcopy=False)
            retry_killed(study)
        if is_new and any(folder.glob("trial-*")):
            raise UsageError(
                f"{folder} holds trials of a study that is not in the storage",
                "Choose another --study, or remove it.",
            )
        if config.pruner != "none" and not comparable:
            on_event(Note("no trial is pruned: with different --epochs their epochs cannot be compared"))
        _Search(config, space, data, study, notes_once(on_event)).run()
        result = summarize(config, study, redacted(url))
        if running := result.count("running"):
            text = f"{running} trial(s) of other processes are not finished; rerun the same command later"
            on_event(Note(f"{text} for the final result"))
        return result


def check(config: TuneConfig, space: Space) -> None:
    """Raise UsageError for mistakes that show before anything is loaded."""
    for settings in candidates(space, config.train):
        resolve(settings)
    students = [str(name) for name in choices(space, "student", config.student)]
    networks = [name for name in students if not name.lower().endswith(".pt")]
    names = {part.name for part in space}
    for name in names & {"dropout", "width"}:
        if not any(models.accepts(network, name) for network in networks):
            raise UsageError(f"--tune {name}: {', '.join(students)} has no {name}", "Leave it out.")
    if "preprocess" in names and not networks:
        raise UsageError("--tune preprocess: a student's file contains its own", "Leave it out.")


def _shared_settings(config: TuneConfig, space: Space, data: Splits) -> dict[str, Any]:
    """Plain values that must be equal for all processes of a study, by name."""
    tuned = {part.name for part in space}
    # a tuned teacher's files are no inputs of the study
    by_content = BY_CONTENT - ({"teacher_class_names", "teacher_class_map"} if "teacher" in tuned else set())
    settings: dict[str, Any] = {
        "--tune": sorted(map(str, space)),
        "--student": None if "student" in tuned or config.student_file else config.student,
        "--sampler": config.sampler,
        "--pruner": config.pruner,
        "--seeds": config.seeds,
        **decisive_settings(config.train, tuned | by_content | {"student"}),
    }
    for method in methods_of(space, config.train):  # inputs last: a student's file counts by its content
        values: dict[str, Any] = {"method": method} | ({"teacher": ()} if "teacher" in tuned else {})
        settings |= input_hashes(config.train.model_copy(update=values), data)
    return json.loads(json.dumps(settings))


class _Search:
    def __init__(
        self, config: TuneConfig, space: Space, data: Splits, study: optuna.Study, on_event: OnEvent
    ) -> None:
        self.config, self.base, self.space, self.data = config, config.train, space, data
        self.study, self.on_event = study, on_event

    def run(self) -> None:
        """Train trials until the study has enough, the time is over, or a signal arrives."""
        config = self.config
        end = time.monotonic() + 60 * config.timeout if config.timeout else math.inf
        with runtime.stop_on_signals() as stop:
            while count(self.study) < config.trials and not stop and time.monotonic() < end:
                # SQLite lets two processes take one trial
                with files.locked(config.folder / ".lock", lambda: None):
                    queue_trial(self.study)
                    trial = self.study.ask()
                self._train_and_store(trial)
                self._clear()
            if stop:
                raise self._stopped(stop.exit_code)
        self._clear()
        if config.timeout and count(self.study) < config.trials:
            self.on_event(Note(f"--timeout {config.timeout:g}: no further trial was started"))

    def _train_and_store(self, trial: optuna.Trial) -> None:
        """Train a trial, and store its accuracy or state."""
        try:
            self.study.tell(trial, self._objective(trial))
        except optuna.TrialPruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        except (Exception, KeyboardInterrupt):
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        self._note_end(trial.number)

    def _objective(self, trial: optuna.Trial) -> float:
        """Mean validation accuracy of a trial's runs; TrialPruned if it is low, or with `REASON` if it failed."""
        trial.set_user_attr(PROCESS, this_process())
        self.study.sampler = make_sampler(self.config.sampler, self.config.seed, self.study, trial.number)
        settings = apply(self.base, draw(trial, self.space))
        try:
            return self._train(trial, settings)
        except Interrupted as error:
            self.study.enqueue_trial(trial.params)
            raise self._stopped(error.exit_code, trial.number) from error
        except KdError as error:
            if isinstance(error, UsageError) or not self.config.trial_folder(trial.number).exists():
                raise  # a mistake in the command
            if isinstance(error.__cause__, OSError):  # such as a full disk
                self.study.enqueue_trial(trial.params)
                raise KdError(error.message, "Fix it, then rerun the same command to continue.") from error
            failure = error.message
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            failure = "out of memory"
        trial.set_user_attr(REASON, failure)
        raise optuna.TrialPruned

    def _train(self, trial: optuna.Trial, settings: TrainConfig) -> float:
        accuracies: list[float] = []
        for index in range(self.config.seeds):
            seed = self.base.seed + index
            run = self.config.run_folder(trial.number, seed)
            config = apply(
                settings,
                # an interrupted trial starts anew, so states on the way are of no use
                {"seed": seed, "runs_dir": run.parent, "name": run.name, "save_every": "0", "keep": 1},
            )
            result = fit(config, self.data, test=False, on_event=self._listener(trial, index, accuracies))
            assert result.val_accuracy is not None
            accuracies.append(result.val_accuracy)
        trial.set_user_attr("accuracies", accuracies)
        trial.set_user_attr("precision", result.config.precision)
        return sum(accuracies) / len(accuracies)

    def _listener(self, trial: optuna.Trial, index: int, before: list[float]) -> OnEvent:
        """Forward a run's events; after each epoch report the mean over this seed and those `before`, or prune."""
        seeds = self.config.seeds
        title = f"trial {trial.number}" + (f", seed {index + 1} of {seeds}" if seeds > 1 else "")

        forward = titled(title, self.on_event)

        def on_event(event: Event) -> None:
            if not isinstance(event, Epoch):
                forward(event)
                return
            assert event.val_accuracy is not None  # the validation split is not empty
            mean = (sum(before) + event.val_accuracy) / (index + 1)
            trial.report(mean, index * event.epochs + event.epoch)
            last = event.epoch == event.epochs and index + 1 == seeds
            if not last and trial.should_prune():
                raise optuna.TrialPruned

        return on_event

    def _note_end(self, number: int) -> None:
        """Note how a trial ended."""
        trials = trials_of(self.study)
        best = best_of(trials)
        trial = next(one for one in trials if one.number == number)
        end = {
            "complete": f"{trial.accuracy or 0:.2f} %",
            "pruned": f"pruned at {trial.accuracy or 0:.2f} %",
            "failed": f"failed, {trial.reason}",
        }[trial.state]
        so_far = f"; best so far {best.accuracy:.2f} % in trial {best.number}" if best else ""
        self.on_event(Note(f"trial {number}: {end} with {describe(trial.values)}{so_far}"))

    def _clear(self) -> None:
        """Remove interrupted runs, and the checkpoints of all other ended trials but the best."""
        best = best_of(trials_of(self.study))
        for ended in self.study.get_trials(deepcopy=False):
            folder = self.config.trial_folder(ended.number)
            if ended.state == TrialState.FAIL:
                shutil.rmtree(folder, ignore_errors=True)
            for path in folder.glob("**/*.pt") if ended.state.is_finished() else ():
                if best is None or ended.number != best.number or path.name != "student.pt":
                    path.unlink(missing_ok=True)

    def _stopped(self, exit_code: int, number: int | None = None) -> Interrupted:
        current = "" if number is None else f" in trial {number}, which will start anew"
        return Interrupted(
            f"stopped{current}; {count(self.study)} of {self.config.trials} trials are done",
            "Rerun the same command to continue.",
            exit_code=exit_code,
        )
