"""What all settings share: the base class, fields of several commands, and how mistakes are told."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

from kdcli.base.errors import UsageError

DATA, METHOD, OPTIMISER, RUN = "Data", "Method", "Optimiser", "Run"
OF_METHODS = "Settings of methods"


def setting(
    default: Any,
    text: str,
    panel: str,
    *flags: str,
    flag: str = "",
    metavar: str = "",
    **bounds: Any,
) -> Any:
    """A field of a settings class: default, help text and panel of --help.

    Args:
        flags: further spellings of the option.
        flag: the option's spelling in place of the field's own name.
        bounds: pydantic's, as `ge=1`.
    """
    about: dict[str, Any] = {"panel": panel, "flags": list(flags), "flag": flag, "metavar": metavar}
    extra: dict[str, Any] = {name: entry for name, entry in about.items() if entry}
    return Field(default, description=text, json_schema_extra=extra, **bounds)


option = partial(setting, PydanticUndefined)  # the same for `Annotated`: each class has a default of its own


class Settings(BaseModel):
    """Frozen, and strict about names: a misspelt key in a recipe is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


DataSpec = Annotated[
    str,
    option(
        "cifar10, cifar100, svhn, mnist, fashion-mnist, digits, or a folder or archive with "
        "train/<class>/* and test/<class>/*.",
        DATA,
        metavar="NAME|PATH",
    ),
]
ModelDataSpec = Annotated[
    str | None,
    option("By default the data the model was trained on.", DATA, metavar="NAME|PATH"),
]
ImageSize = Annotated[
    int | None,
    option(
        "Resize images to this many pixels square; by default their own size, 32 if they differ.",
        DATA,
        ge=4,
        le=1024,
    ),
]
SkipBroken = Annotated[
    bool,
    option("Leave out images that cannot be read, and say which; by default one is an error.", DATA),
]
CacheDir = Annotated[
    Path,
    option("Packed images and teacher outputs are kept here.", DATA),
]
DataDir = Annotated[Path, option("Where kd download puts datasets.", DATA)]
Threads = Annotated[
    int,
    option("CPU threads; 0: all cores of the quota.", RUN, ge=0, le=1024),
]
TeacherPath = Path("weights/teacher.pt")


def _one_folder(value: str) -> str:
    if value in (".", "..") or any(mark in value for mark in '/\\\0:*?"<>|') or value.startswith("-"):
        raise ValueError("must be a plain folder name")
    return value


FolderName = Annotated[str, AfterValidator(_one_folder)]  # empty: none was given


class DataSettings(Settings):
    """Where images come from."""

    data: DataSpec = "cifar10"
    image_size: ImageSize = None
    skip_broken: SkipBroken = False
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")


def words_of(flag: str, value: Any) -> list[str]:
    """What is typed to give an option a value: the flag alone if it is true, once for each of several values."""
    if isinstance(value, bool):
        return [flag] if value else []
    found = value if isinstance(value, list | tuple) else (value,)
    return [word for one in found for word in (flag, one.as_posix() if isinstance(one, Path) else str(one))]


S = TypeVar("S", bound=Settings)
_SEE_HELP = "See --help for what each option takes."


def make(kind: type[S], values: Mapping[str, Any]) -> S:
    """Build settings, turning pydantic's complaint into one line.

    Raises:
        UsageError: names the option, what it got and what it takes.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        flag = "--" + name.replace("_", "-")
        if first["type"] == "extra_forbidden":
            raise UsageError(
                f"unknown setting: {name}", f"Known are {', '.join(kind.model_fields)}."
            ) from error
        if not first["loc"]:  # of several settings together: the message names them
            told, _, more = first["msg"].removeprefix("Value error, ").partition("; ")
            raise UsageError(told, f"{more[:1].upper()}{more[1:]}." if more else _SEE_HELP) from error
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise UsageError(
            f"{flag} {first.get('input')!s}: must be {message.removeprefix('must be ')}",
            _SEE_HELP,
        ) from error
