"""The search space: which of kd train's settings vary, between which bounds or among which values."""

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

_OF_DATA = "it selects the images, so accuracies could not be compared"
_OF_PLACE = "it is about where a run works, not about how a student learns"
_OF_RECORD = "it is about what is kept of a run, not about how a student learns"
_OF_CHAINS = "a trial trains a single student, not a chain"
# settings that cannot be tuned, and why
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
LOG_BY_DEFAULT = ("lr", "weight_decay")  # logarithmic unless `:linear` is added
_MOST_CANDIDATES = 256  # combinations checked before the search, per method
_RANGE = re.compile(r"([^:|]+):([^:|]+)(?::(log|linear))?")
_WRITE_RANGE = "Write NAME=LOW:HIGH."


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

    Names are those of kd train's options, and so are the bounds of values.

    Args:
        config: the settings that all trials share.

    Raises:
        UsageError: malformed text, a value out of bounds, or a setting that cannot be tuned or that no method reads.
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
    """Names of the tuned settings; their values are not looked at.

    Raises:
        UsageError: kd train has no such setting.
    """
    return {_setting(text.partition("=")[0].strip()) for text in texts if "=" in text}


def choices(space: Space, name: str, default: Value) -> tuple[Value, ...]:
    """The values of a setting that is a choice, else its one value `default`."""
    return next((part.values for part in space if isinstance(part, Choice) and part.name == name), (default,))


def methods_of(space: Space, config: TrainConfig) -> tuple[str, ...]:
    """The methods of the trials."""
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
    """The part of a space that a method reads."""
    without = methods.unread(method, [part.name for part in space])
    return tuple(part for part in space if part.name not in without)


def apply(config: TrainConfig, values: Mapping[str, Value | Path]) -> TrainConfig:
    """The settings with the values of a trial."""
    return make(
        TrainConfig, {**{name: getattr(config, name) for name in type(config).model_fields}, **values}
    )


def describe(values: Mapping[str, Value]) -> str:
    """`tau 3.2, lamda 0.1`."""
    return ", ".join(
        f"{name.replace('_', '-')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in values.items()
    )


def _read(text: str, config: TrainConfig) -> Range | Choice:
    typed, equals, rest = text.partition("=")
    if not equals or not rest.strip():
        raise UsageError(
            f"--tune {text}: no range", "Write NAME=LOW:HIGH, NAME=LOW:HIGH:log or 'NAME=a|b|c'."
        )
    name = _setting(typed.strip())
    if name in FIXED:
        is_option = FIXED[name] != _OF_CHAINS
        raise UsageError(
            f"--tune {typed}: {FIXED[name]}",
            f"Set it for all trials: {_flag(name)}" if is_option else "Leave it out.",
        )
    kind = _kind(TrainConfig.model_fields[name])
    numeric = kind in (int, float)
    match = _RANGE.fullmatch(rest.strip())
    part: Range | Choice
    if "|" in rest:
        part = Choice(name, tuple(_parse(word.strip(), kind, text) for word in rest.split("|")))
        if len(set(part.values)) < len(part.values):
            raise UsageError(f"--tune {text}: a value occurs twice", "Name each once.")
    elif match is not None and numeric:
        part = _range(name, match, kind, text)
    else:
        shape = "NAME=LOW:HIGH or 'NAME=a|b|c'" if numeric else "'NAME=a|b|c'"
        raise UsageError(f"--tune {text}: neither a range nor a choice", f"Write {shape}.")
    return _within_bounds(part, config, text)


def _range(name: str, match: re.Match[str], kind: type, text: str) -> Range:
    low, high = (_parse(match[group].strip(), kind, text) for group in (1, 2))
    assert not isinstance(low, str) and not isinstance(high, str)
    if not low < high:
        raise UsageError(f"--tune {text}: {low} is not below {high}", "The lower bound comes first.")
    log = match[3] == "log" or (match[3] is None and name in LOG_BY_DEFAULT and low > 0)
    if log and low <= 0:
        raise UsageError(
            f"--tune {text}: a logarithmic range starts above 0", "Raise LOW, or leave out :log."
        )
    return Range(name, low, high, log)


def _setting(typed: str) -> str:
    """The field of an option: hyphens or underscores, and the option's further spellings."""
    wanted = _flag(typed.removeprefix("--"))
    for name, field in TrainConfig.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        aliases = extra.get("flags", [])
        if wanted in (_flag(name), *(map(str, aliases) if isinstance(aliases, list) else ())):
            return name
    known = [_flag(name)[2:] for name in TrainConfig.model_fields if name not in FIXED]
    raise UsageError(
        f"--tune {typed}: kd train has no such setting", f"Those to tune are {', '.join(known)}."
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(field: FieldInfo) -> type:
    """The type of a setting's values: bool, int, float, or str for names and paths."""
    parts: list[Any] = [field.annotation]
    if get_origin(field.annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(field.annotation) if part is not type(None)]
    if get_origin(field.annotation) is tuple:  # an option that may be repeated: a trial has one
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
        expected = "a whole number" if kind is int else "a number"
        raise UsageError(f"--tune {text}: {word} is not {expected}", _WRITE_RANGE) from None
    if not math.isfinite(number):
        raise UsageError(f"--tune {text}: {word} is not finite", _WRITE_RANGE)
    return number


def _within_bounds(part: Range | Choice, config: TrainConfig, text: str) -> Range | Choice:
    """The part, if the option accepts its ends or values; values in the option's own spelling."""
    accepted: list[Value] = []
    for value in part.values if isinstance(part, Choice) else (part.low, part.high):
        try:
            if part.name == "method":
                methods.parse(str(value))
            one = getattr(apply(config, {part.name: value}), part.name)
        except UsageError as error:
            raise UsageError(f"--tune {text}: {error.message}", error.hint) from error
        one = one[0] if isinstance(one, tuple) else one
        accepted.append(one.as_posix() if isinstance(one, Path) else one)
    return part if isinstance(part, Range) else Choice(part.name, tuple(accepted))


def _check_read(space: Space, config: TrainConfig) -> None:
    """Raise UsageError if none of the methods reads a setting."""
    names = methods_of(space, config)
    for part in space:
        if all(methods.unread(method, [part.name]) for method in names):
            subject = f"method {names[0]} does" if len(names) == 1 else f"methods {', '.join(names)} do"
            raise UsageError(
                f"--tune {part}: {subject} not read {_flag(part.name)}",
                "Tune what it reads (docs/methods.md), or choose another --method.",
            )
