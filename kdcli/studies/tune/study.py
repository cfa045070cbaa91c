"""A study: which trials there are, who works on them, and that each is done once.

A trial counts if it is finished, pruned, or failed by its own fault (it has a `reason`). One whose process was
stopped or has died is marked as failed without a reason, and its values wait for the next who asks. Numbers decide
who was first: a trial is taken up only if fewer than those wanted have a lower number, so that there are never too
many, whoever asks at the same time. With SQLite, whose transactions do not exclude each other enough, all of this
is done under a lock of files.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from kdcli.base import files
from kdcli.base.errors import UsageError
from kdcli.studies.tune import storage
from kdcli.studies.tune.sampler import ByNumber
from kdcli.studies.tune.space import Choice, Range, Space, Value, read_by

if TYPE_CHECKING:
    from sqlalchemy import URL

RECORD = "kd"  # the study's attribute with its settings
_DEATHS = 3  # a trial that its process has not survived so often is not tried again
_CLOCKS_APART_S = 5.0


@dataclass(frozen=True)
class Trial:
    """One trial of a study.

    Attributes:
        state: `complete`, `pruned`, `failed`, `running` or `waiting`.
        values: its settings.
        accuracy: mean validation accuracy, per cent; of one that was pruned the last; None before.
        accuracies: of each seed.
        reason: why it failed.
        precision: what the runs were computed in.
    """

    number: int
    state: str
    values: dict[str, Value]
    accuracy: float | None
    accuracies: tuple[float, ...] = ()
    reason: str = ""
    precision: str = ""


class TakenAway(Exception):
    """Another process has given this trial up for dead, and queued it again."""


class Study:
    """A study in its storage, as one process sees it."""

    def __init__(self, url: URL, name: str, space: Space, *, pruner: str, sampler: str, seed: int) -> None:
        """Open or make it.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: see `storage.faults_told`.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.name = name
        self.space = space
        file = storage.database_file(url)
        self._lock = None if file is None else file.with_name(f".{file.name}.lock")
        self._given_up: set[int] = set()  # by this process, so that it queues them again
        self._nameless: dict[int, float] = {}  # when trials that nobody owns were first seen
        self._pruner: optuna.pruners.BasePruner = (
            optuna.pruners.MedianPruner() if pruner == "median" else optuna.pruners.NopPruner()
        )
        self._sampler = ByNumber(sampler, seed)
        with self._alone():
            self._storage = storage.connect(url, lambda _, trial: self._given_up.add(trial.number))
            self._study = self._create()

    def settle(self, record: Mapping[str, Any]) -> None:
        """Record the study's settings, or see to it that they are these. One without trials takes new ones.

        Raises:
            UsageError: they differ, or the study is of another program.
        """
        with self._alone():
            known = self._study.user_attrs.get(RECORD)
            if known == record:
                return
            trials = self._study.get_trials(deepcopy=False)
            if known is None and trials:
                raise UsageError(
                    f"study {self.name} is in that storage, and is not one of kd tune",
                    "Choose another --study.",
                )
            if any(_counts(trial) for trial in trials):
                raise UsageError(
                    f"study {self.name} was begun with other settings: {_difference(known or {}, record)}",
                    "Type those to go on with it, or choose another --study.",
                )
            if trials:
                optuna.delete_study(study_name=self.name, storage=self._storage)
                self._study = self._create()
            self._study.set_user_attr(RECORD, dict(record))

    def claim(self, wanted: int) -> optuna.Trial | None:
        """A trial for this process alone, its values drawn; None if all that are wanted are done or under way."""
        with self._alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # heartbeats are called experimental
            self._bury()
            self._queue_again()
            while self._taken() < wanted:
                trial = self._study.ask()
                self._storage.record_heartbeat(trial._trial_id)
                trial.set_user_attr("owner", _owner())
                if self._before(trial.number) >= wanted:
                    self.drop(trial)
                    continue
                self._draw(trial)
                return trial
        return None

    @contextmanager
    def at_work(self, trial: optuna.Trial) -> Iterator[None]:
        """Let others hear of this process while it works on a trial."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(storage.HEARTBEAT_S):
                with suppress(Exception):  # the next one may get through
                    self._storage.record_heartbeat(trial._trial_id)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def report(self, trial: optuna.Trial, accuracy: float, step: int, *, last: bool) -> bool:
        """Record where a trial stands; whether it had better end here.

        Raises:
            TakenAway: it is another's by now.
        """
        try:
            trial.report(accuracy, step)
        except UpdateFinishedTrialError:
            raise TakenAway from None
        return not last and trial.should_prune()

    def complete(self, trial: optuna.Trial, accuracies: list[float], precision: str) -> None:
        """Record a trial's result: the mean over its seeds."""
        self._end(
            trial,
            TrialState.COMPLETE,
            sum(accuracies) / len(accuracies),
            accuracies=accuracies,
            precision=precision,
        )

    def prune(self, trial: optuna.Trial) -> None:
        """Record that a trial was ended early."""
        self._end(trial, TrialState.PRUNED)

    def fail(self, trial: optuna.Trial, reason: str) -> None:
        """Record that a trial's own settings did not work; it counts, and is not tried again."""
        self._end(trial, TrialState.FAIL, reason=reason)

    def drop(self, trial: optuna.Trial) -> None:
        """Record that a trial is none: it was one too many, or could not begin."""
        self._end(trial, TrialState.FAIL, dropped=True)

    def interrupt(self, trial: optuna.Trial) -> None:
        """Give a trial back; its values wait for whoever goes on."""
        with self._alone(), suppress(TakenAway):
            self._end(trial, TrialState.FAIL)
            self._given_up.add(trial.number)
            self._queue_again()

    def trials(self) -> tuple[Trial, ...]:
        """Those that count, and those that run or wait, by number."""
        return tuple(_as_trial(trial) for trial in self._study.get_trials(deepcopy=False) if _counts(trial))

    def numbers_over(self) -> set[int]:
        """Numbers of the trials that nobody works on any more."""
        return {trial.number for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished()}

    @property
    def optuna_study(self) -> optuna.Study:
        """For what Optuna has to say of it."""
        return self._study

    # --- inside ------------------------------------------------------------------------------------------

    def _create(self) -> optuna.Study:
        return optuna.create_study(
            storage=self._storage,
            study_name=self.name,
            direction="maximize",
            load_if_exists=True,
            pruner=self._pruner,
            sampler=self._sampler,
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out while a database in a file is read and changed; servers do so by themselves."""
        if self._lock is None:
            yield
            return
        with files.locked(self._lock, lambda: None):
            yield

    def _taken(self) -> int:
        trials = self._study.get_trials(deepcopy=False)
        return sum(_counts(trial) and trial.state != TrialState.WAITING for trial in trials)

    def _before(self, number: int) -> int:
        return sum(
            _counts(trial) and trial.number < number for trial in self._study.get_trials(deepcopy=False)
        )

    def _draw(self, trial: optuna.Trial) -> None:
        """Values for all settings that the trial's method reads; the method itself first."""
        by_name = {part.name: part for part in self.space}
        own = self.space
        if "method" in by_name:
            own = read_by(self.space, str(_suggest(trial, by_name["method"])))
        for part in own:
            _suggest(trial, part)

    def _bury(self) -> None:
        """Mark the trials of dead processes as failed."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in running:
            if not self._is_dead(trial):
                continue
            deaths = trial.user_attrs.get("deaths", 0) + 1
            with suppress(UpdateFinishedTrialError, ValueError):  # another process was faster
                if deaths >= _DEATHS and "reason" not in trial.user_attrs:
                    reason = f"its process was killed, {deaths} times"
                    self._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
                self._study.tell(trial.number, state=TrialState.FAIL)
                self._given_up.add(trial.number)
        optuna.storages.fail_stale_trials(self._study)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Whether nobody works on a running trial: decided for processes of this host, and for none at all."""
        owner = trial.user_attrs.get("owner")
        if owner is None:  # claims are made under the lock: with one, its maker has died within
            first = self._nameless.setdefault(trial.number, time.monotonic())
            return self._lock is not None or time.monotonic() - first > storage.GRACE_S
        if owner["host"] != files.host_name():
            return False
        try:
            process = psutil.Process(owner["process"])
            over = process.status() == psutil.STATUS_ZOMBIE  # dead, and not yet asked after by its parent
            another = abs(process.create_time() - owner["started"]) > _CLOCKS_APART_S
        except psutil.NoSuchProcess:
            return True
        return bool(over or another)

    def _queue_again(self) -> None:
        """Let the values of trials that were given up wait, once each.

        Under the lock whoever comes by makes up for one that died in between; else it is for who gave it up.
        """
        trials = self._study.get_trials(deepcopy=False)
        queued = {trial.user_attrs.get("again") for trial in trials}
        for trial in trials:
            mine = self._lock is not None or trial.number in self._given_up
            attributes = trial.user_attrs
            if trial.state != TrialState.FAIL or not mine or trial.number in queued or not trial.params:
                continue
            if "reason" in attributes or "dropped" in attributes:
                continue
            deaths = attributes.get("deaths", 0) + ("stopped" not in attributes)
            self._study.enqueue_trial(trial.params, user_attrs={"again": trial.number, "deaths": deaths})
            self._given_up.discard(trial.number)

    def _end(
        self, trial: optuna.Trial, state: TrialState, value: float | None = None, **attributes: Any
    ) -> None:
        try:
            if state == TrialState.FAIL and not attributes:
                attributes = {"stopped": True}
            for name, content in attributes.items():
                trial.set_user_attr(name, content)
            self._study.tell(trial, value, state)
        except (UpdateFinishedTrialError, ValueError):
            raise TakenAway from None


def _suggest(trial: optuna.Trial, part: Range | Choice) -> Any:
    if isinstance(part, Choice):
        return trial.suggest_categorical(part.name, part.values)
    if isinstance(part.low, int) and isinstance(part.high, int):
        return trial.suggest_int(part.name, part.low, part.high, log=part.log)
    return trial.suggest_float(part.name, part.low, part.high, log=part.log)


def _counts(trial: FrozenTrial) -> bool:
    return trial.state != TrialState.FAIL or "reason" in trial.user_attrs


def _as_trial(trial: FrozenTrial) -> Trial:
    state = "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()
    ended = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    return Trial(
        number=trial.number,
        state=state,
        values=dict(trial.params),
        accuracy=trial.value if ended else None,
        accuracies=tuple(trial.user_attrs.get("accuracies", ())),
        reason=str(trial.user_attrs.get("reason", "")),
        precision=str(trial.user_attrs.get("precision", "")),
    )


def _owner() -> dict[str, Any]:
    return {
        "host": files.host_name(),
        "process": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _difference(known: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The first setting in which two records differ, and how."""
    for name in [*record, *known]:
        then, now = known.get(name), record.get(name)
        if then == now:
            continue
        if isinstance(then, dict) and isinstance(now, dict):
            return _difference(then, now)
        return f"{name.replace('_', ' ')} was {then}, now {now}"
    return "none"
