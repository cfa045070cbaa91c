"""Settings of `kd tune`, and its search space: the settings of kd train that vary, with bounds or choices."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdcli import methods
from kdcli.base.config import make, option_flag
from kdcli.base.config.settings import FolderName, setting
from kdcli.base.errors import UsageError
from kdcli.base.results import value_text
from kdcli.methods import TrainConfig

SEARCH = "Search"  # panel of --help
Value = bool | int | float | str

_OF_DATA = ("data", "unlabelled", "image_size", "resize", "skip_broken", "test_fraction", "grey")
_OF_PLACE = ("data_dir", "cache_dir", "runs_dir", "threads", "devices", "accelerator", "compile")
_OF_RECORD = ("name", "save_every", "keep", "log_every", "tensorboard")
# settings that cannot be tuned, and why
FIXED = {
    **dict.fromkeys(_OF_DATA, "it selects the images, so accuracies could not be compared"),
    **dict.fromkeys(_OF_PLACE, "it selects hardware and folders, not how a student learns"),
    **dict.fromkeys(_OF_RECORD, "it selects what is recorded, not how a student learns"),
    **dict.fromkeys(("assistant", "generations"), "a trial trains a single student, not a chain"),
    "view_seed": "differences between seeds are noise",
    "teacher_weight": "it is a list, a weight for each teacher",
    "weight": "it is a list, a weight for each term; ce-weight and kd-weight can be tuned",
    "val_fraction": "it selects the images that rank the trials",
    "seed": "differences between seeds are noise; --seeds K takes the mean over several",
}
LOG_BY_DEFAULT = ("lr", "weight_decay")  # logarithmic unless `:linear` is added
_MOST_CANDIDATES = 256  # combinations checked before the search, per method
_RANGE = re.compile(r"([^:|]+):([^:|]+)(?::(log|linear))?")


class TuneConfig(TrainConfig):
    """`kd tune`: the settings of kd train that all trials share, and those of the search."""

    trials: int = setting(
        20, "Total number of trials; rerun the command to train missing ones.", SEARCH, ge=1, le=100_000
    )
    study: FolderName = setting(
        "",
        "Name of the study and of its folder in --runs-dir; by default its method and student.",
        SEARCH,
        max_length=200,
    )
    storage: str = setting(
        "",
        "The study's database, an SQLAlchemy URL that several machines can share; by default SQLite "
        "in the study's folder.",
        SEARCH,
        metavar="URL",
    )
    sampler: Literal["tpe", "random"] = setting("tpe", "Optuna's sampler, seeded by --seed.", SEARCH)
    pruner: Literal["median", "none"] = setting(
        "median", "median: stop a trial whose best epoch so far is below the median of the others.", SEARCH
    )
    seeds: int = setting(1, "Runs of each trial, with seeds from --seed on, averaged.", SEARCH, ge=1, le=1000)
    timeout: float | None = setting(
        None, "Start no trial after this many minutes.", SEARCH, gt=0, metavar="MINUTES"
    )

    @property
    def study_name(self) -> str:
        """The study's name, by default made of its method and student."""
        return self.study or f"tune-{self.method_name}-{self.student_name}"

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.study_name

    def trial_folder(self, number: int) -> Path:
        return self.folder / f"trial-{number:04d}"

    def run_folder(self, number: int, seed: int) -> Path:
        return self.trial_folder(number) if self.seeds == 1 else self.trial_folder(number) / f"seed-{seed}"

    @property
    def train(self) -> TrainConfig:
        return make(TrainConfig, {name: getattr(self, name) for name in TrainConfig.model_fields})


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; drawn by their logarithm if `log`."""

    name: str
    low: int | float
    high: int | float
    log: bool

    def __str__(self) -> str:
        return f"{self.name}={self.low}:{self.high}:{'log' if self.log else 'linear'}"


@dataclass(frozen=True)
class Choice:
    """One of several values; paths are text."""

    name: str
    values: tuple[Value, ...]

    def __str__(self) -> str:
        return f"{self.name}={'|'.join(map(str, self.values))}"


Space = tuple[Range | Choice, ...]


def read_space(texts: Sequence[str], config: TrainConfig) -> Space:
    """The search space from `NAME=LOW:HIGH`, `NAME=LOW:HIGH:log` (or `:linear`) and `NAME=a|b|c`.

    Names are those of kd train's options, and so are the bounds of values; else a UsageError.
    """
    if not texts:
        raise UsageError("nothing to tune", "Name settings: --tune tau=1:10 --tune 'optimizer=adam|sgd'")
    space = tuple(_read(text, config) for text in texts)
    names = [part.name for part in space]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--tune {name} is given twice", "Join them: one range, or values joined by |.")
    trained = methods_of(space, config)
    for part in space:
        if all(methods.unread(method, [part.name]) for method in trained):
            raise UsageError(
                f"--tune {part}: {option_flag(part.name)} is not read by {', '.join(trained)}",
                "Tune what it reads (docs/methods.md), or choose another --method.",
            )
    return space


def names_of(texts: Sequence[str]) -> set[str]:
    """Names of the tuned settings; their values are not looked at."""
    return {_setting(text.partition("=")[0].strip()) for text in texts if "=" in text}


def choices(space: Space, name: str, default: Value) -> tuple[Value, ...]:
    """The values of a setting that is a choice, else its one value `default`."""
    return next((part.values for part in space if isinstance(part, Choice) and part.name == name), (default,))


def methods_of(space: Space, config: TrainConfig) -> tuple[str, ...]:
    return tuple(map(str, choices(space, "method", config.method)))


def candidates(space: Space, config: TrainConfig) -> Iterator[TrainConfig]:
    """Settings of possible trials: each method with all choices (capped) and the upper ends of ranges."""
    for method in methods_of(space, config):
        parts = [part for part in read_by(space, method) if part.name != "method"]
        values = [part.values if isinstance(part, Choice) else (part.high,) for part in parts]
        for chosen in itertools.islice(itertools.product(*values), _MOST_CANDIDATES):
            named = dict(zip((part.name for part in parts), chosen, strict=True))
            yield apply(config, {**named, "method": method})


def read_by(space: Space, method: str) -> Space:
    without = methods.unread(method, [part.name for part in space])
    return tuple(part for part in space if part.name not in without)


def apply(config: TrainConfig, values: Mapping[str, Value | Path]) -> TrainConfig:
    return make(TrainConfig, {**dict(config), **values})


def describe(values: Mapping[str, Value]) -> str:
    """`tau 3.2, lamda 0.1`."""
    return ", ".join(f"{option_flag(name)[2:]} {value_text(value)}" for name, value in values.items())


def _read(text: str, config: TrainConfig) -> Range | Choice:
    typed, _, rest = (part.strip() for part in text.partition("="))
    name = _setting(typed)
    if name in FIXED:
        raise UsageError(f"--tune {typed}: {FIXED[name]}", "Leave it out of --tune.")
    if "|" in rest:
        values = tuple(_value(name, word.strip(), config, text) for word in rest.split("|"))
        if len(set(values)) < len(values):
            raise UsageError(f"--tune {text}: a value occurs twice", "Give each value once.")
        return Choice(name, values)
    match = _RANGE.fullmatch(rest)
    ends = [_value(name, word.strip(), config, text) for word in match.groups()[:2]] if match else []
    numbers = [value for value in ends if isinstance(value, int | float) and not isinstance(value, bool)]
    if match is None or len(numbers) < 2:
        raise UsageError(
            f"--tune {text}: neither a range nor a choice",
            "Write NAME=LOW:HIGH, NAME=LOW:HIGH:log or 'NAME=a|b|c'.",
        )
    low, high = numbers
    if not low < high:
        raise UsageError(f"--tune {text}: {low} is not below {high}", "The lower bound comes first.")
    log = match[3] == "log" or (match[3] is None and name in LOG_BY_DEFAULT and low > 0)
    if log and low <= 0:
        raise UsageError(
            f"--tune {text}: a logarithmic range starts above 0", "Raise LOW, or leave out :log."
        )
    return Range(name, low, high, log)


def _setting(typed: str) -> str:
    """The field of an option, written with hyphens or underscores."""
    name = typed.removeprefix("--").replace("-", "_")
    name = "lamda" if name == "lambda" else name
    if name not in TrainConfig.model_fields:
        known = [option_flag(one)[2:] for one in TrainConfig.model_fields if one not in FIXED]
        raise UsageError(
            f"--tune {typed}: kd train has no such setting",
            f"Settings that can be tuned: {', '.join(known)}.",
        )
    return name


def _value(name: str, word: str, config: TrainConfig, text: str) -> Value:
    """A value, parsed and checked by the option itself; the first of an option that may be repeated."""
    try:
        if name == "method":
            methods.parse(word)
        value = getattr(apply(config, {name: word}), name)
    except UsageError as error:
        raise UsageError(f"--tune {text}: {error.message}", error.hint) from error
    value = value[0] if isinstance(value, tuple) else value
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"--tune {text}: {word} is not finite", "Write a number.")
    return value.as_posix() if isinstance(value, Path) else value
