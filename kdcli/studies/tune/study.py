"""An Optuna study of kd tune: its database, its recorded settings, its trials, and drawing values for one."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import psutil
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import host_name
from kdcli.base.text import first_line
from kdcli.engine.identity import differences
from kdcli.studies.tune.space import Choice, Range, Space, Value, read_by

# user attributes: of a study, its settings; of a trial, why it failed, `<host> <process>`, the number it repeats
SETTINGS, REASON, PROCESS, RETRY_OF = "kd", "reason", "process", "retry of"
_LOCK_TIMEOUT_S = 60  # SQLite: how long another process may hold the write lock
# a trial whose own settings fail counts as pruned, so that samplers avoid its values; FAIL is one to repeat
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
_SECRET = re.compile(r"pass|pwd|secret|token|key", re.IGNORECASE)  # names of secrets in a URL


@dataclass(frozen=True)
class Trial:
    """One trial of a study."""

    number: int
    state: str  # `complete`, `pruned`, `failed`, `running` or `waiting`
    values: dict[str, Value]
    accuracy: float | None  # mean validation accuracy, per cent; of a pruned trial the last one; else None
    accuracies: tuple[float, ...] = ()  # of each seed
    reason: str = ""
    precision: str = ""  # of its runs


def open_study(
    url: URL, name: str, settings: Mapping[str, Any], pruner: Literal["median", "none"]
) -> optuna.Study:
    """The study of that name, created if need be; UsageError for other settings, unless it has no trials.

    `settings` are plain values that all processes of a study must share.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    is_sqlite = url.get_backend_name() == "sqlite"
    database = RDBStorage(
        # Optuna substitutes {…} in an address
        url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),
        engine_kwargs={"connect_args": {"timeout": _LOCK_TIMEOUT_S}} if is_sqlite else {},
    )
    create = partial(
        optuna.create_study,
        storage=database,
        study_name=name,
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner() if pruner == "median" else optuna.pruners.NopPruner(),
    )
    study = create()
    known = study.user_attrs.get(SETTINGS, {})
    changes = differences(known, settings)
    if known and not changes:
        return study
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    if any(state != TrialState.FAIL for state in states) or (states and not known):
        raise UsageError(
            f"study {name} was started with other settings: {changes[0]}",
            "Use the same settings to continue it, or choose another --study.",
        )
    if states:
        optuna.delete_study(study_name=name, storage=database)
        study = create()
    study.set_user_attr(SETTINGS, dict(settings))
    return study


def this_process() -> str:
    return f"{host_name()} {os.getpid()}"


def queue_trial(study: optuna.Study) -> None:
    """Queue a trial unless one is queued; it has this process's name before it runs, for `retry_killed`."""
    if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        own = {PROCESS: this_process()}
        study.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs=own))


def retry_killed(study: optuna.Study) -> None:
    """Queue running trials again whose process on this host was killed; those of other hosts are left alone."""
    trials = study.get_trials(deepcopy=False)
    queued = {trial.user_attrs.get(RETRY_OF) for trial in trials}  # by a process that was killed here
    for trial in trials:
        host, _, process = str(trial.user_attrs.get(PROCESS, "")).partition(" ")
        alive = host != host_name() or not process.isdecimal() or psutil.pid_exists(int(process))
        if trial.state == TrialState.RUNNING and not alive:
            if trial.number not in queued:  # without values: some may be missing, so all are drawn again
                study.enqueue_trial({}, user_attrs={PROCESS: this_process(), RETRY_OF: trial.number})
            study.tell(trial.number, state=TrialState.FAIL)


def make_sampler(
    name: Literal["tpe", "random"], seed: int, study: optuna.Study, number: int
) -> optuna.samplers.BaseSampler:
    """A sampler for one trial.

    Its generator depends on the seed and the number of draws before it: processes that share a study, or continue it,
    repeat no draw. A trial that repeats another has the draws of that one, and does not change the later ones.
    """
    trials = study.get_trials(deepcopy=False)
    number -= sum(trial.number <= number and "fixed_params" in trial.system_attrs for trial in trials)
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    if name == "random":
        return optuna.samplers.RandomSampler(seed=own)
    return optuna.samplers.TPESampler(seed=own, constant_liar=True)


def draw(trial: optuna.Trial, space: Space) -> dict[str, Value]:
    """Values for all settings that the trial's method reads; the method itself first."""
    by_name = {part.name: part for part in space}
    if "method" in by_name:
        space = read_by(space, str(_suggest(trial, by_name["method"])))
    return {part.name: _suggest(trial, part) for part in space}


def count(study: optuna.Study) -> int:
    """How many trials count: finished, pruned, or failed by their own settings."""
    return len(study.get_trials(deepcopy=False, states=COUNTED))


def trials_of(study: optuna.Study) -> tuple[Trial, ...]:
    """All trials by number but those that were interrupted."""
    return tuple(
        Trial(
            number=int(trial.number),
            state="failed" if REASON in trial.user_attrs else trial.state.name.lower(),
            values=dict(trial.params),
            accuracy=_accuracy(trial),
            accuracies=tuple(map(float, trial.user_attrs.get("accuracies", ()))),
            reason=trial.user_attrs.get(REASON, ""),
            precision=trial.user_attrs.get("precision", ""),
        )
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.FAIL
    )


def _accuracy(trial: optuna.trial.FrozenTrial) -> float | None:
    if trial.state not in COUNTED or REASON in trial.user_attrs or trial.value is None:
        return None
    return float(trial.value)


def _suggest(trial: optuna.Trial, part: Range | Choice) -> Any:
    if isinstance(part, Choice):
        return trial.suggest_categorical(part.name, part.values)
    if isinstance(part.low, int) and isinstance(part.high, int):
        return trial.suggest_int(part.name, part.low, part.high, log=part.log)
    return trial.suggest_float(part.name, part.low, part.high, log=part.log)


def read_url(text: str, default: Path) -> URL:
    """The address of the storage, an SQLite file `default` for an empty text; UsageError for other texts."""
    try:
        url = make_url(text) if text else URL.create("sqlite", database=default.as_posix())
    except (ArgumentError, ValueError):  # the text may hold a password, so the message leaves it out
        raise UsageError(
            "--storage: not a database URL",
            "Write sqlite:///FILE.db, postgresql://USER:PASSWORD@HOST/NAME or mysql+pymysql://…",
        ) from None
    in_memory = not url.database or url.database == ":memory:" or url.database.startswith("file:")
    if url.get_backend_name() == "sqlite" and in_memory:
        raise UsageError(
            f"--storage {redacted(url)}: a study needs a plain file or a database server",
            "Write sqlite:///FILE.db, with one more / for an absolute path.",
        )
    return url


def redacted(url: URL) -> str:
    """The address without its secrets."""
    query = {key: "hidden" if _SECRET.search(key) else value for key, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True)


@contextmanager
def readable_errors(url: URL) -> Iterator[None]:
    """Turn errors of the database and its driver into one line without secrets."""
    try:
        yield
    except (ImportError, SQLAlchemyError, StorageInternalError) as error:
        inner = error if isinstance(error, SQLAlchemyError) else error.__cause__ or error
        text = first_line(getattr(inner, "orig", None) or inner)
        for secret in (url.password, *(value for key, value in url.query.items() if _SECRET.search(key))):
            if isinstance(secret, str) and secret:
                text = text.replace(secret, "***")
        raise KdError(
            f"storage {redacted(url)}: {text}",
            "Check --storage, and that its driver is installed and the database can be reached and written.",
        ) from error
