"""What all settings share: the base class, fields of several commands, and how mistakes are told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from kdcli.base.errors import UsageError

DATA, METHOD, OPTIMISER, RUN = "Data", "Method", "Optimiser", "Run"
OF_METHODS = "Settings of methods"


def about(panel: str, *flags: str, metavar: str | None = None) -> dict[str, Any]:
    extra: dict[str, Any] = {"panel": panel}
    if flags:
        extra["flags"] = list(flags)
    if metavar:
        extra["metavar"] = metavar
    return extra


class Settings(BaseModel):
    """Frozen, and strict about names: a misspelt key in a recipe is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


DataSpec = Annotated[
    str,
    Field(
        description="cifar10, cifar100, svhn, mnist, fashion-mnist, digits, or a folder or archive with "
        "train/<class>/* and test/<class>/*.",
        json_schema_extra=about(DATA, metavar="NAME|PATH"),
    ),
]
ModelDataSpec = Annotated[
    str | None,
    Field(
        description="By default the data the model was trained on.",
        json_schema_extra=about(DATA, metavar="NAME|PATH"),
    ),
]
ImageSize = Annotated[
    int | None,
    Field(
        ge=4,
        le=1024,
        description="Resize images to this many pixels square; by default their own size, 32 if they differ.",
        json_schema_extra=about(DATA),
    ),
]
SkipBroken = Annotated[
    bool,
    Field(
        description="Leave out images that cannot be read, and say which; by default one is an error.",
        json_schema_extra=about(DATA),
    ),
]
CacheDir = Annotated[
    Path,
    Field(description="Packed images and teacher outputs are kept here.", json_schema_extra=about(DATA)),
]
DataDir = Annotated[
    Path, Field(description="Where kd download puts datasets.", json_schema_extra=about(DATA))
]
Threads = Annotated[
    int,
    Field(ge=0, le=1024, description="CPU threads; 0: all cores of the quota.", json_schema_extra=about(RUN)),
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
