"""Base class of settings, fields shared by commands, and validation errors as one line."""

import shlex
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
    default: Any, text: str, panel: str, *flags: str, flag: str = "", metavar: str = "", **bounds: Any
) -> Any:
    """A field of a settings class: default, help text, and panel of --help.

    Args:
        flags: further names of the option.
        flag: name of the option instead of the field's name.
        bounds: pydantic constraints such as `ge=1`.
    """
    about: dict[str, Any] = {"panel": panel, "flags": list(flags), "flag": flag, "metavar": metavar}
    extra: dict[str, Any] = {name: entry for name, entry in about.items() if entry}
    return Field(default, description=text, json_schema_extra=extra, **bounds)


option = partial(setting, PydanticUndefined)  # for `Annotated`: each class sets its own default


class Settings(BaseModel):
    """Frozen settings; unknown names are errors."""

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
    str | None, option("Data set; by default the one the model was trained on.", DATA, metavar="NAME|PATH")
]
ImageSize = Annotated[
    int | None,
    option(
        "Resize images to this many pixels square; by default their size, or 32 if sizes differ.",
        DATA,
        ge=4,
        le=1024,
    ),
]
SkipBroken = Annotated[
    bool, option("Skip unreadable images with a note; by default an unreadable image is an error.", DATA)
]
CacheDir = Annotated[Path, option("Folder for packed images and teacher logits.", DATA)]
DataDir = Annotated[Path, option("Folder of downloaded data sets.", DATA)]
Threads = Annotated[int, option("CPU threads; 0: all available cores.", RUN, ge=0, le=1024)]
TeacherPath = Path("weights/teacher.pt")


def _one_folder(value: str) -> str:
    if value in (".", "..") or any(mark in value for mark in '/\\\0:*?"<>|') or value.startswith("-"):
        raise ValueError("must be a plain folder name")
    return value


FolderName = Annotated[str, AfterValidator(_one_folder)]  # empty: default


class DataSettings(Settings):
    """Data set and folders of a command that reads images."""

    data: DataSpec = "cifar10"
    image_size: ImageSize = None
    skip_broken: SkipBroken = False
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")


class ModelDataSettings(Settings):
    """Data set and folders of a command that evaluates a model."""

    data: ModelDataSpec = None
    skip_broken: SkipBroken = False
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")


def option_flag(name: str) -> str:
    """`batch_size` → `--batch-size`."""
    return "--" + name.replace("_", "-")


def shell_command(command: str, options: Mapping[str, Any]) -> str:
    """`kd COMMAND` with options by field name, quoted for a shell; several values repeat an option.

    None and False are left out, True is the flag alone.
    """
    words = ["kd", command]
    for name, value in options.items():
        for one in value if isinstance(value, list | tuple) else (value,):
            if one is None or one is False:
                continue
            words.append(option_flag(name))
            if one is not True:
                words.append(one.as_posix() if isinstance(one, Path) else str(one))
    return shlex.join(words)


S = TypeVar("S", bound=Settings)
_SEE_HELP = "See --help for what each option takes."


def make(kind: type[S], values: Mapping[str, Any]) -> S:
    """Build settings from values.

    Raises:
        UsageError: an unknown or invalid value; the message names the option, the value and what is allowed.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        if first["type"] == "extra_forbidden":
            raise UsageError(
                f"unknown setting: {name}", f"Known are {', '.join(kind.model_fields)}."
            ) from error
        if not first["loc"]:  # a constraint between settings, named in the message
            message, _, more = first["msg"].removeprefix("Value error, ").partition("; ")
            raise UsageError(message, f"{more[:1].upper()}{more[1:]}." if more else _SEE_HELP) from error
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise UsageError(
            f"{option_flag(name)} {first.get('input')!s}: must be {message.removeprefix('must be ')}",
            _SEE_HELP,
        ) from error
