"""Base class of settings, fields shared by commands, and validation errors as one line."""

import math
import shlex
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticUndefined

from kdcli.base import code
from kdcli.base.errors import UsageError
from kdcli.base.names import DATA_SETS, nearest
from kdcli.base.results import invalid

DATA, METHOD, OPTIMISER, RUN = "Data", "Method", "Optimiser", "Run"
TEST_FRACTION = 0.2
INPUT = "Input of models from other programs: (pixel 0–255 · scale − mean) / std"
OF_METHODS = "Settings of methods"


def setting(
    default: Any,
    text: str,
    panel: str,
    *flags: str,
    rare: bool = False,
    metavar: str = "",
    **bounds: Any,
) -> Any:
    """A field of a settings class: default, help text, and panel of --help.

    Args:
        flags: further names of the option.
        rare: listed by --help-all only.
        bounds: pydantic constraints such as `ge=1`.
    """
    about = {"panel": panel, "flags": list(flags), "rare": rare, "metavar": metavar}
    extra: dict[str, Any] = {name: entry for name, entry in about.items() if entry}
    return Field(default, description=text, json_schema_extra=extra, **bounds)


rare = partial(setting, rare=True)
option = partial(setting, PydanticUndefined)  # for `Annotated`: each class sets its own default
rare_option = partial(option, rare=True)


class Settings(BaseModel):
    """Frozen settings; unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


Resize = Annotated[
    int | None,
    rare_option(
        "Resize the shorter side to N pixels, then crop the centre, as in torchvision's presets (256 for 224); by "
        "default as recorded, else no crop.",
        DATA,
        ge=4,
        le=4096,
    ),
]
SkipBroken = Annotated[
    bool, rare_option("Skip unreadable images with a note; by default they are an error.", DATA)
]
DataDir = Annotated[Path, rare_option("Folder of downloaded data sets.", DATA)]
CacheDir = Annotated[Path, rare_option("Folder for packed images and teacher logits.", DATA)]
Threads = Annotated[int, option("CPU threads; 0: all available cores.", RUN, ge=0, le=1024)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, lt=1)]
MaxDrop = Annotated[float | None, Field(ge=0, le=100)]  # points of accuracy
TeacherPath = Path("weights/teacher.pt")


def _one_folder(value: str) -> str:
    special = any(mark in value for mark in '/\\:*?"<>|') or not value.isprintable()
    if special or value in (".", "..") or value.startswith("-"):
        raise ValueError("must be a plain folder name")
    return value


FolderName = Annotated[str, AfterValidator(_one_folder)]  # empty: default


class ModelDataSettings(Settings):
    """Data set and folders of a command that evaluates a model."""

    data: Annotated[
        str | None,
        option("Data set; by default the one the model was trained on.", DATA, metavar="NAME|PATH"),
    ] = None
    skip_broken: SkipBroken = False
    test_fraction: Annotated[
        float | None,
        rare_option(
            f"Fraction of test images in data without a split; by default the model's, else {TEST_FRACTION:g}.",
            DATA,
            gt=0,
            lt=1,
        ),
    ] = None
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")

    @property
    def places(self) -> dict[str, Any]:
        """Its folders that are not the default, as options of a command that is printed."""
        return self.model_dump(include={"data_dir", "cache_dir"}, exclude_defaults=True)

    @field_validator("data")
    @classmethod
    def _in_full(cls, data: str | None) -> str | None:
        """`.` and `..` as absolute paths: what a run records is searched from the run's folder upwards."""
        return str(Path(data).resolve()) if data and not data.strip("./") else data


class DataSettings(ModelDataSettings):
    """Data set and folders of a command that reads images."""

    data: Annotated[
        str,
        option(
            f"{', '.join(DATA_SETS)}, or a folder, archive or table of your images (docs/data.md); by default that "
            "of the teacher, else cifar10.",
            DATA,
            metavar="NAME|PATH",
        ),
    ] = "cifar10"
    image_size: Annotated[
        int | None,
        option(
            "Resize images to N × N; by default their own size, or 32 if sizes differ.", DATA, ge=4, le=1024
        ),
    ] = None


def _fraction(text: str) -> float:
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


def _as_numbers(value: Any) -> str | None:
    """Numbers joined by commas, from a text, a number or a list (in a recipe)."""
    if value is None:
        return None
    words = list(map(str, value)) if isinstance(value, list | tuple) else str(value).split(",")
    with suppress(ValueError):
        if all(math.isfinite(float(word)) for word in words):
            return ",".join(word.strip() for word in words)
    raise ValueError("must be a number, or one for each channel joined by commas")


def _as_scale(value: Any) -> str | None:
    if value is None:
        return None
    with suppress(ValueError, ZeroDivisionError):
        if 0 < _fraction(str(value)) < math.inf:
            return str(value).strip()
    raise ValueError("must be a number above 0, or a fraction such as 1/255")


Layout = Annotated[Literal["nchw", "nhwc"] | None, rare_option("Axis order; by default detected.", INPUT)]
ChannelOrder = Annotated[
    Literal["rgb", "bgr"] | None, rare_option("Channel order; by default as recorded, else rgb.", INPUT)
]
Scale = Annotated[
    str | None,
    BeforeValidator(_as_scale),
    rare_option("Factor of the pixels, such as 1/255; by default 1.", INPUT, metavar="NUMBER|FRACTION"),
]
Mean = Annotated[
    str | None,
    BeforeValidator(_as_numbers),
    rare_option(
        "Mean after scaling, a single one or one per channel in the network's order; by default 0.",
        INPUT,
        metavar="M[,M,M]",
    ),
]
Std = Annotated[
    str | None,
    BeforeValidator(_as_numbers),
    rare_option("Standard deviation after scaling, like the mean; by default 1.", INPUT, metavar="S[,S,S]"),
]
ClassNames = Annotated[
    Path | None,
    rare_option("Class names in output order: one per line, or JSON.", INPUT, metavar="FILE"),
]
_class_map = partial(rare_option, "CSV of teacher class, data class; else by name.", INPUT, metavar="FILE")


class PixelSettings(Settings):
    """Scale, mean and std of a network's input, (pixel 0–255 · scale − mean) / std; None: as recorded."""

    prefix: ClassVar[str] = ""  # of the options' names

    scale: Scale = None
    mean: Mean = None
    std: Std = None

    @model_validator(mode="after")
    def _of_one_unit(self) -> Self:
        if self.mean_std is None:
            return self
        mean, std = self.mean_std
        scale, flag = _fraction(self.scale or "1"), self.flag
        if min(std) <= 0:
            raise ValueError(f"{flag('std')} {self.std}: must be above 0")
        small = any(
            max(map(abs, numbers)) <= 1 and numbers != (fill,) * len(numbers)
            for numbers, fill in ((mean, 0.0), (std, 1.0))
        )
        if self.scale is None and small:
            raise ValueError(
                f"{flag('mean')} and {flag('std')} are those of pixels in 0–1, and no scale is set; "
                f"add {flag('scale')} 1/255, or {flag('scale')} 1 if intended"
            )
        if max(map(abs, mean)) > 256:
            raise ValueError(
                f"{flag('mean')} {self.mean} after {flag('scale')} {scale:.4g} is outside the pixels; "
                f"the input is (pixel · scale − mean) / std, so that the mean is in scaled units"
            )
        return self

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation in units of 0–255, each (1,) or (C,); None without scale, mean and std."""
        if not (self.scale or self.mean or self.std):
            return None
        scale = _fraction(self.scale or "1")
        mean, std = (
            tuple(float(word) / scale for word in text.split(","))
            for text in (self.mean or "0", self.std or "1")
        )
        return mean, std

    def flag(self, name: str) -> str:
        return option_flag(self.prefix + name)


class InputSettings(PixelSettings):
    """Assumptions about an ONNX file of another program; None: as recorded, or unknown."""

    layout: Layout = None
    channel_order: ChannelOrder = None
    class_names: ClassNames = None
    class_map: Annotated[Path | None, _class_map()] = None
    resize: Resize = None
    image_size: Annotated[
        int | None,
        rare_option("Input size of a file with dynamic size.", INPUT, ge=1, le=4096),
    ] = None

    @property
    def given(self) -> dict[str, str | float]:
        """The assumptions that were made, as JSON values; the size of the images is that of the data."""
        names = set(InputSettings.model_fields) - {"image_size"}
        return self.model_dump(mode="json", include=names, exclude_none=True)

    @property
    def described(self) -> list[str]:
        """Options given for unrecorded properties of an ONNX file of another program."""
        return [self.flag(name) for name in self.given if name != "class_map"]


NO_ASSUMPTIONS = InputSettings()


class TeacherInputs(InputSettings):
    """`InputSettings` of a teacher, set by the options of `TeacherInputSettings`."""

    prefix: ClassVar[str] = "teacher_"


class TeacherInputSettings(Settings):
    """The options of `InputSettings` for a teacher, in addition to those of a model."""

    teacher_layout: Layout = None
    teacher_channel_order: ChannelOrder = None
    teacher_scale: Scale = None
    teacher_mean: Mean = None
    teacher_std: Std = None
    teacher_class_names: ClassNames = None
    teacher_class_map: Annotated[Path | None, _class_map("--class-map")] = None

    @model_validator(mode="after")
    def _of_a_teacher(self) -> Self:
        try:
            _ = self.teacher_inputs
        except ValidationError as error:
            raise ValueError(invalid(error)) from error
        return self

    @property
    def teacher_inputs(self) -> TeacherInputs:
        names = TeacherInputSettings.model_fields
        return TeacherInputs(**{name.removeprefix("teacher_"): getattr(self, name) for name in names})


def option_flag(name: str) -> str:
    """`batch_size` → `--batch-size`, `from_` → `--from`."""
    return "--" + name.rstrip("_").replace("_", "-")


def shell_command(command: str, options: Mapping[str, Any], *arguments: Path | None) -> str:
    """`kd COMMAND` with arguments and options by field name; None and False are left out, True is the flag alone."""
    words = ["kd", command, *(path.as_posix() for path in arguments if path is not None)]
    for name, value in options.items():
        for one in value if isinstance(value, list | tuple) else (value,):
            if one is None or one is False:
                continue
            words.append(option_flag(name))
            if one is not True:
                words.append(one.as_posix() if isinstance(one, Path) else str(one))
    return code.assignment() + shlex.join(words)


S = TypeVar("S", bound=Settings)


def make(kind: type[S], values: Mapping[str, Any]) -> S:
    """Build settings from values; UsageError names the option, the value and the allowed values."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        if first["type"] == "extra_forbidden":
            raise UsageError(f"unknown setting: {name}", nearest(name, kind.model_fields)) from error
        if not first["loc"]:  # a constraint between settings, named in the message
            message, _, more = first["msg"].removeprefix("Value error, ").partition("; ")
            raise UsageError(message, f"{more[:1].upper()}{more[1:]}." if more else "") from error
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise UsageError(
            f"{option_flag(name)} {first.get('input')!s}: must be {message.removeprefix('must be ')}"
        ) from error
