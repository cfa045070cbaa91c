"""What is searched: which of kd train's settings, between which bounds or among which values."""

from __future__ import annotations

import itertools
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from kdcli import methods
from kdcli.base.config import make
from kdcli.base.errors import UsageError
from kdcli.methods import TrainConfig

Value = bool | int | float | str

# What is no part of how a student learns, and why.
_OF_DATA = "it says which images there are, so accuracies could not be compared"
_OF_PLACE = "it says where or on what a run works, and not how a student learns"
_OF_RECORD = "it says what is kept of a run, and not how a student learns"
_OF_CHAINS = "a trial trains a single student, and no chain"
FIXED = {
    **dict.fromkeys(("data", "unlabelled", "image_size", "skip_broken", "grey"), _OF_DATA),
    **dict.fromkeys(
        ("data_dir", "cache_dir", "runs_dir", "threads", "devices", "accelerator", "compile"), _OF_PLACE
    ),
    **dict.fromkeys(("name", "save_every", "keep", "log_every", "tensorboard"), _OF_RECORD),
    **dict.fromkeys(("assistant", "generations"), _OF_CHAINS),
    "view_seed": "the luckiest views are no better setting",
    "teacher_weight": "it is a list, a weight for each teacher",
    "weight": "it is a list, a weight for each term; ce-weight and kd-weight can be tuned",
    "val_fraction": "the validation split is what trials are judged by",
    "seed": "the luckiest seed is no better setting; --seeds K takes the mean over several",
}
UNSEEN = {
    name for name, why in FIXED.items() if why in (_OF_PLACE, _OF_RECORD)
}  # in what a student has learned
BY_RATIO = (
    "lr",
    "weight_decay",
)  # twice as much means the same anywhere: logarithmic unless `:linear` says otherwise
_MOST_TRIED = 256
_RANGE = re.compile(r"([^:|]+):([^:|]+)(?::(log|linear))?")


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
    """One of some values; paths are text."""

    name: str
    values: tuple[Value, ...]

    def __str__(self) -> str:
        return f"{self.name}={'|'.join(map(str, self.values))}"


Space = tuple[Range | Choice, ...]


def read_space(texts: Sequence[str], config: TrainConfig) -> Space:
    """The search space from `NAME=LOW:HIGH`, `NAME=LOW:HIGH:log` (or `:linear`) and `NAME=a|b|c`.

    Names are those of kd train's options. Bounds and values must be what the option itself takes.

    Args:
        config: the settings that all trials share.

    Raises:
        UsageError: a text that is none of these, a value out of bounds, a setting that cannot be tuned or is not
            read by the method.
    """
    if not texts:
        raise UsageError("nothing to tune", "Name settings: --tune tau=1:10 --tune 'optimizer=adam|sgd'")
    space = tuple(_read(text, config) for text in texts)
    names = [part.name for part in space]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--tune {name} is given twice", "Join them: one range, or values joined by |.")
    _check_read(space, config)
    return space


def names_of(texts: Sequence[str]) -> set[str]:
    """Names of the settings that are searched; nothing is made of their values, nor any method looked up.

    Raises:
        UsageError: kd train has no such setting.
    """
    return {_setting(text.partition("=")[0].strip()) for text in texts if "=" in text}


def methods_of(space: Space, config: TrainConfig) -> tuple[str, ...]:
    """The methods that trials may have."""
    tuned = next((part.values for part in space if isinstance(part, Choice) and part.name == "method"), None)
    return tuple(map(str, tuned or (config.method,)))


def tried(space: Space, config: TrainConfig) -> Iterator[TrainConfig]:
    """Settings that trials may have: each method with all choices, at most so many, and the upper ends of ranges."""
    for method in methods_of(space, config):
        parts = [part for part in read_by(space, method) if part.name != "method"]
        values = [part.values if isinstance(part, Choice) else (part.high,) for part in parts]
        for chosen in itertools.islice(itertools.product(*values), _MOST_TRIED):
            named = dict(zip((part.name for part in parts), chosen, strict=True))
            yield apply(config, {**named, "method": method})


def read_by(space: Space, method: str) -> Space:
    """The part of a space that a method reads."""
    without = methods.unread(method, [part.name for part in space])
    return tuple(part for part in space if part.name not in without)


def apply(config: TrainConfig, values: Mapping[str, Value | Path]) -> TrainConfig:
    """The settings with those of a trial put in."""
    return make(
        TrainConfig, {**{name: getattr(config, name) for name in type(config).model_fields}, **values}
    )


def _read(text: str, config: TrainConfig) -> Range | Choice:
    typed, equals, rest = text.partition("=")
    if not equals or not rest.strip():
        raise UsageError(
            f"--tune {text}: no range", "Write NAME=LOW:HIGH, NAME=LOW:HIGH:log or 'NAME=a|b|c'."
        )
    name = _setting(typed.strip())
    if name in FIXED:
        offered = FIXED[name] != _OF_CHAINS
        raise UsageError(
            f"--tune {typed}: {FIXED[name]}",
            f"Give it to all trials: {_flag(name)}" if offered else "Leave it out.",
        )
    kind = _kind(TrainConfig.model_fields[name])
    found = _RANGE.fullmatch(rest.strip())
    made: Range | Choice
    if "|" in rest:
        made = Choice(name, tuple(_parse(word.strip(), kind, text) for word in rest.split("|")))
        if len(set(made.values)) < len(made.values):
            raise UsageError(f"--tune {text}: a value is there twice", "Name each once.")
    elif found is not None and kind in (int, float):
        made = _range(name, found, kind, text)
    else:
        shape = "NAME=LOW:HIGH or 'NAME=a|b|c'" if kind in (int, float) else "'NAME=a|b|c'"
        raise UsageError(f"--tune {text}: that is no range and no choice", f"Write {shape}.")
    return _within_bounds(made, config, text)


def _range(name: str, found: re.Match[str], kind: type, text: str) -> Range:
    low, high = (_parse(found[group].strip(), kind, text) for group in (1, 2))
    assert not isinstance(low, str) and not isinstance(high, str)
    if not low < high:
        raise UsageError(f"--tune {text}: {low} is not below {high}", "The lower bound comes first.")
    log = found[3] == "log" or (found[3] is None and name in BY_RATIO and low > 0)
    if log and low <= 0:
        raise UsageError(
            f"--tune {text}: a logarithmic range begins above 0", "Raise LOW, or leave out :log."
        )
    return Range(name, low, high, log)


def _setting(typed: str) -> str:
    """The field that a name on the command line means: hyphens or underscores, further spellings of the option."""
    wanted = typed.removeprefix("--").replace("_", "-")
    for name, field in TrainConfig.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        more = extra.get("flags", [])
        spellings = [_flag(name), *(str(flag) for flag in (more if isinstance(more, list) else []))]
        if f"--{wanted}" in spellings:
            return name
    known = [_flag(name)[2:] for name in TrainConfig.model_fields if name not in FIXED]
    raise UsageError(
        f"--tune {typed}: kd train has no such setting", f"Those to tune are {', '.join(known)}."
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(field: FieldInfo) -> type:
    """What a setting's values are: bool, int, float or, for names and paths, str."""
    parts: list[Any] = [field.annotation]
    if get_origin(field.annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(field.annotation) if part is not type(None)]
    if get_origin(field.annotation) is tuple:  # one that may be given several times: a trial has one
        parts = [get_args(field.annotation)[0]]
    kinds: tuple[type, ...] = (bool, float, int)
    for kind in kinds:
        if kind in parts:
            return kind
    if get_origin(parts[0]) is Literal or parts[0] in (str, Path):
        return str
    raise UsageError(f"--tune: values of {field.annotation} cannot be tuned")


def _parse(word: str, kind: type, text: str) -> Value:
    if kind is str:
        return word
    if kind is bool:
        if word.lower() not in ("true", "false"):
            raise UsageError(f"--tune {text}: {word} is not true or false", "Write 'NAME=true|false'.")
        return word.lower() == "true"
    try:
        number: int | float = int(word) if kind is int else float(word)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"--tune {text}: {word} is not {what}", "Write NAME=LOW:HIGH.") from None
    if not math.isfinite(number):
        raise UsageError(f"--tune {text}: {word} is not a number to draw to", "Write NAME=LOW:HIGH.")
    return number


def _within_bounds(part: Range | Choice, config: TrainConfig, text: str) -> Range | Choice:
    """The part, if the option takes its ends or values; these as the option understands them."""
    values = part.values if isinstance(part, Choice) else (part.low, part.high)
    understood: list[Value] = []
    for value in values:
        try:
            if part.name == "method":
                methods.get(str(value))
            one = getattr(apply(config, {part.name: value}), part.name)
        except UsageError as error:
            raise UsageError(f"--tune {text}: {error.message}", error.hint) from error
        one = one[0] if isinstance(one, tuple) else one
        understood.append(one.as_posix() if isinstance(one, Path) else one)
    return part if isinstance(part, Range) else Choice(part.name, tuple(understood))


def _check_read(space: Space, config: TrainConfig) -> None:
    """Raise UsageError if a setting is read by none of the methods in question."""
    asked = methods_of(space, config)
    for part in space:
        if all(methods.unread(method, [part.name]) for method in asked):
            names = f"method {asked[0]} does" if len(asked) == 1 else f"methods {', '.join(asked)} do"
            raise UsageError(
                f"--tune {part}: {names} not read {_flag(part.name)}",
                "Tune what it reads (docs/methods.md), or choose another --method.",
            )
