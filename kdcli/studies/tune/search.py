"""The search: trials are claimed and trained one after the other until the study has as many as are wanted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcli import methods, models
from kdcli.base import runtime
from kdcli.base.config import make
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Epoch, Event, Note, OnEvent, Progress, ignore
from kdcli.base.files import sha256_file
from kdcli.base.text import reason
from kdcli.data import Splits
from kdcli.data.split import split
from kdcli.engine import fit
from kdcli.engine.plan import check as check_run
from kdcli.methods import TrainConfig
from kdcli.studies.tune import figures, storage, summary
from kdcli.studies.tune.settings import TuneConfig
from kdcli.studies.tune.space import UNSEEN, Choice, Space, Value, apply, methods_of, tried
from kdcli.studies.tune.study import Study, TakenAway, Trial

if TYPE_CHECKING:
    import optuna

_OTHERWISE_KNOWN = (
    "data",
    "unlabelled",
    "teacher",
    "student",
)  # by content; where it lies may differ from machine to machine
_STUDY_FILE = "study.db"


class Pruned(Exception):
    """This trial had better end here."""


@dataclass(frozen=True)
class Tuned:
    """What a study has found.

    Attributes:
        folder: where its trials' runs and its figures are.
        storage: address of its database, without secrets.
        trials: those that count, and those under way elsewhere.
        best: the finished trial with the highest validation accuracy; None if none is finished.
        config: settings of its run, of the first where it had several seeds.
        run: that run's folder on this machine; None if it was trained on another.
        importance: each setting's share, largest first; empty if `why_not`.
        figures: files that were drawn.
    """

    study: str
    folder: Path
    storage: str
    trials: tuple[Trial, ...]
    best: Trial | None
    config: TrainConfig | None
    run: Path | None
    importance: dict[str, float]
    why_not: str
    figures: tuple[Path, ...]

    def count(self, state: str) -> int:
        """How many trials are in a state."""
        return sum(trial.state == state for trial in self.trials)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "study": self.study,
            "folder": self.folder.as_posix(),
            "storage": self.storage,
            "best": vars(self.best) if self.best else None,
            "command": summary.command_of(self.config) if self.config else None,
            "run": self.run.as_posix() if self.run else None,
            "importance": self.importance,
            "trials": [vars(trial) for trial in self.trials],
            "figures": [path.as_posix() for path in self.figures],
        }


def tune(config: TuneConfig, space: Space, data: Splits, *, on_event: OnEvent = ignore) -> Tuned:
    """Do the trials that a study lacks, beside any other process that does the same. Test images are not read.

    Args:
        space: what is searched, from `read_space`.

    Raises:
        UsageError: settings that do not go together, or other ones than the study was begun with.
        KdError: the storage cannot be used, or a trial could not begin.
        Interrupted: SIGINT or SIGTERM; the trial in hand is given back.
    """
    check(config, space)
    if len(split(data.train.labels, config.val_fraction)[1]) == 0:
        raise UsageError(f"--val-fraction {config.val_fraction} keeps no image for validation", "Raise it.")
    _check_dropout(config, space)
    folder = config.runs_dir / config.study_name
    url = storage.read_url(config.storage, folder / _STUDY_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with storage.faults_told(url):
            study = Study(
                url,
                config.study_name,
                space,
                pruner="none" if any(part.name == "epochs" for part in space) else config.pruner,
                sampler=config.sampler,
                seed=config.seed,
            )
            search = _Search(config, data, study, folder, on_event)
            study.settle(_record(config, space, data))
            search.go()
            return search.result(storage.shown(url))
    except OSError as error:
        where = error.filename or folder
        raise KdError(
            f"{where}: {reason(error)}", "Check the path, its permissions and free space."
        ) from error


def check(config: TuneConfig, space: Space) -> None:
    """Raise UsageError for what can be seen to be wrong before anything is loaded."""
    if config.val_fraction == 0:
        raise UsageError(
            "--val-fraction 0: trials are judged by validation images", "Keep some: --val-fraction 0.1"
        )
    if config.name:
        raise UsageError("--name: a study has many runs", "Name the study: --study")
    if config.devices > 1:
        raise UsageError(
            "--devices: a trial is trained in one process",
            "Start kd tune once for each device, with the same settings.",
        )
    for settings in tried(space, config.train):
        check_run(settings)


def _check_dropout(config: TuneConfig, space: Space) -> None:
    """Raise UsageError if what is tuned has no effect on any of the networks in question."""
    choices = [part.values for part in space if isinstance(part, Choice) and part.name == "student"]
    students = [
        make(TrainConfig, {"student": name}) for name in (choices[0] if choices else (config.student,))
    ]
    names = {part.name for part in space}
    if "dropout" in names and not any(
        one.student_file is None and models.takes_dropout(one.student) for one in students
    ):
        raise UsageError(f"--tune dropout: {config.student} has none to set", "Leave it out.")
    if "preprocess" in names and all(one.student_file is not None for one in students):
        raise UsageError("--tune preprocess: a student's file brings its own", "Leave it out.")


def _record(config: TuneConfig, space: Space, data: Splits) -> dict[str, Any]:
    """What must be the same for all processes of a study, as plain values."""
    tuned = {part.name for part in space}
    fixed = config.train.model_dump(mode="json", exclude={*UNSEEN, *tuned, *_OTHERWISE_KNOWN})
    code = {
        name: sha256
        for method in methods_of(space, config.train)
        for name, sha256 in methods.sources(method).items()
    }
    files: dict[str, Path | None] = {}
    if "student" not in tuned:
        files["student"] = config.student_file
    if "teacher" not in tuned and ("method" in tuned or methods.get(config.method).needs_teacher):
        files |= {f"teacher {number}": path for number, path in enumerate(config.train.teacher, 1)}
    return json.loads(  # type: ignore[no-any-return]
        json.dumps(
            {
                "tune": sorted(map(str, space)),
                "settings": fixed,
                "data": data.train.fingerprint,
                "images without labels": data.unlabelled.fingerprint if data.unlabelled else None,
                "code": code,
                "files": {name: _content(path) if path else config.student for name, path in files.items()},
                "sampler": config.sampler,
                "pruner": config.pruner,
                "seeds": config.seeds,
            }
        )
    )


def _content(path: Path) -> str:
    return sha256_file(path) if path.is_file() else path.as_posix()


class _Search:
    """One process at work on a study."""

    def __init__(
        self, config: TuneConfig, data: Splits, study: Study, folder: Path, on_event: OnEvent
    ) -> None:
        self.config = config
        self.base = config.train
        self.data = data
        self.study = study
        self.folder = folder
        self.on_event = on_event
        self.told: set[str] = set()
        self.tidied: set[int] = set()
        if not study.trials() and any(folder.glob("trial-*")):
            raise UsageError(
                f"{folder} holds trials of a study that is not in the storage",
                "Choose another --study, or remove it.",
            )
        if config.pruner != "none" and any(part.name == "epochs" for part in study.space):
            self._note("no trial is ended early, for --epochs differ: their epochs cannot be compared")

    def go(self) -> None:
        """Claim and train until there is nothing left to do."""
        started = time.monotonic()
        with runtime.stop_on_signals() as stop:
            while True:
                if stop:
                    raise self._stopped(stop.exit_code)
                if self.config.timeout and time.monotonic() - started >= 60 * self.config.timeout:
                    self._note(f"{self.config.timeout:g} minutes are over, so no further trial is begun")
                    return
                trial = self.study.claim(self.config.trials)
                if trial is None:
                    return
                with self.study.at_work(trial):
                    try:
                        self._try(trial)
                    except TakenAway:
                        self._note(
                            f"trial {trial.number} was given up for dead elsewhere, and is queued again"
                        )
                self._tidy()

    def result(self, address: str) -> Tuned:
        """What the study says by now; its figures are drawn."""
        trials = self.study.trials()
        running = sum(trial.state == "running" for trial in trials)
        if running:
            self._note(f"{running} trial(s) are still under way elsewhere; type the same command again later")
        best = summary.best_of(trials)
        shares, why_not = summary.importance(self.study.optuna_study, trials)
        drawn = []
        if best is not None:
            figures.history(trials, self.folder / "trials.svg")
            drawn.append(self.folder / "trials.svg")
        if shares:
            figures.importances(shares, self.folder / "importance.svg")
            drawn.append(self.folder / "importance.svg")
        run = None if best is None else self._runs(best.number, self.base.seed)
        return Tuned(
            study=self.study.name,
            folder=self.folder,
            storage=address,
            trials=trials,
            best=best,
            config=None if best is None else summary.config_of(best, self.base),
            run=run if run is not None and run.is_dir() else None,
            importance=shares,
            why_not=why_not,
            figures=tuple(drawn),
        )

    # --- one trial ---------------------------------------------------------------------------------------

    def _try(self, trial: optuna.Trial) -> None:
        """Train a trial's runs and record how it ended, whatever happens."""
        try:
            accuracies, precision = self._train(trial)
        except Pruned:
            self.study.prune(trial)
            self._tell_end(trial.number)
        except TakenAway:
            raise
        except Interrupted as stopped:
            self.study.interrupt(trial)
            raise self._stopped(stopped.exit_code, trial.number) from stopped
        except KdError as problem:
            begun = self._place(trial.number).exists()
            if not begun or isinstance(problem, UsageError):
                self.study.drop(trial)
                raise
            if isinstance(problem.__cause__, OSError):  # a full disk is no fault of the trial's
                self.study.interrupt(trial)
                raise KdError(problem.message, "Mend it, then type the same command again.") from problem
            self.study.fail(trial, problem.message)
            self._tell_end(trial.number)
        except Exception as problem:
            if _out_of_memory(problem):
                self.study.fail(trial, "out of memory")
                self._tell_end(trial.number)
                return
            with suppress(Exception):  # it is the storage itself, perhaps
                self.study.interrupt(trial)
            raise
        else:
            self.study.complete(trial, accuracies, precision)
            self._tell_end(trial.number)

    def _train(self, trial: optuna.Trial) -> tuple[list[float], str]:
        """The validation accuracy of each seed, and the precision that was settled for."""
        accuracies: list[float] = []
        precision = ""
        settings = apply(self.base, trial.params)
        for index in range(self.config.seeds):
            seed = self.base.seed + index
            run = self._runs(trial.number, seed)
            config = apply(
                settings,
                # a trial that is killed is begun anew, so there is no use for states on the way
                {"seed": seed, "runs_dir": run.parent, "name": run.name, "save_every": "0", "keep": 1},
            )
            result = fit(config, self.data, test=False, on_event=self._listen(trial, index, accuracies))
            assert result.val_accuracy is not None
            accuracies.append(result.val_accuracy)
            precision = result.config.precision
        return accuracies, precision

    def _listen(self, trial: optuna.Trial, index: int, before: list[float]) -> Callable[[Event], None]:
        """Pass on what a run tells, and judge it after each epoch, by the mean over the seeds so far."""
        title = f"trial {trial.number}"
        if self.config.seeds > 1:
            title += f", seed {index + 1} of {self.config.seeds}"

        def hear(event: Event) -> None:
            if isinstance(event, Note):
                self._note(event.text)
            elif isinstance(event, Progress):
                group = f"{title}: {event.group or event.task}"
                self.on_event(replace(event, task=f"{title}: {event.task}", group=group))
            else:
                self._judge(event, trial, index, before)

        return hear

    def _judge(self, event: Epoch, trial: optuna.Trial, index: int, before: list[float]) -> None:
        assert event.val_accuracy is not None  # the split has been seen not to be empty
        mean = (sum(before) + event.val_accuracy) / (index + 1)
        last = event.epoch == event.epochs and index + 1 == self.config.seeds
        if self.study.report(trial, mean, index * event.epochs + event.epoch, last=last):
            raise Pruned

    # --- folders and words -------------------------------------------------------------------------------

    def _place(self, number: int) -> Path:
        return self.folder / f"trial-{number:04d}"

    def _runs(self, number: int, seed: int) -> Path:
        place = self._place(number)
        return place if self.config.seeds == 1 else place / f"seed-{seed}"

    def _tidy(self) -> None:
        """Of trials that are over keep records, and the student of the best alone: many would fill the disk."""
        # in this order: what ends in between, elsewhere, is not among these, and may be the best
        over = self.study.numbers_over() - self.tidied
        best = summary.best_of(self.study.trials())
        for number in over:
            place = self._place(number)
            kept = best is not None and best.number == number
            for path in (*place.glob("**/last*.pt"), *place.glob("**/student.pt")):
                if not kept or path.name != "student.pt":
                    path.unlink(missing_ok=True)
            if not kept:
                self.tidied.add(number)

    def _tell_end(self, number: int) -> None:
        trials = self.study.trials()
        best = summary.best_of(trials)
        trial = next(one for one in trials if one.number == number)
        end = {
            "complete": f"{trial.accuracy or 0:.2f} %",
            "pruned": f"ended early at {trial.accuracy or 0:.2f} %",
            "failed": f"failed, {trial.reason}",
        }[trial.state]
        so_far = f"; best so far {best.accuracy:.2f} % in trial {best.number}" if best else ""
        self.on_event(Note(f"trial {number}: {end} with {settings_text(trial.values)}{so_far}"))

    def _note(self, text: str) -> None:
        """Tell once what every trial would tell."""
        if text not in self.told:
            self.told.add(text)
            self.on_event(Note(text))

    def _stopped(self, exit_code: int, number: int | None = None) -> Interrupted:
        over = sum(trial.state in ("complete", "pruned", "failed") for trial in self.study.trials())
        where = "" if number is None else f" in trial {number}, which will be begun anew"
        return Interrupted(
            f"stopped{where}; {over} of {self.config.trials} trials are done",
            "Type the same command again.",
            exit_code=exit_code,
        )


def settings_text(values: dict[str, Value]) -> str:
    """`tau 3.2, lamda 0.1`."""
    return ", ".join(
        f"{name.replace('_', '-')} {value:.4g}"
        if isinstance(value, float)
        else f"{name.replace('_', '-')} {value}"
        for name, value in values.items()
    )


def _out_of_memory(problem: Exception) -> bool:
    return isinstance(problem, MemoryError | torch.OutOfMemoryError) or (
        isinstance(problem, RuntimeError) and "DefaultCPUAllocator" in str(problem)
    )
