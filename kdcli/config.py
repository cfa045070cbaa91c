"""Settings: every default, bound and help text, once. The command line and the recipe files are made from these.

A field's `description` is its help text; `json_schema_extra` may give `panel` (where --help lists it), `flag`
(in place of the field's own name), `flags` (further spellings) and `metavar`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kdcli.errors import UsageError

DATA, METHOD, OPTIMISER, RUN = "Data", "Method", "Optimiser", "Run"
AUGMENT_STEPS = ("flip", "crop", "cutout", "mixup")
_SAVE_EVERY = re.compile(r"(\d{1,9}) ?(epochs?|steps?|min|)")


def _extra(panel: str, *flags: str, metavar: str | None = None) -> dict[str, Any]:
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
        description="cifar10, digits, or a folder or archive with train/<class>/* and test/<class>/*.",
        json_schema_extra=_extra(DATA, metavar="NAME|PATH"),
    ),
]
ImageSize = Annotated[
    int | None,
    Field(
        ge=4,
        le=1024,
        description="Resize images to this many pixels square; by default their own size, 32 if they differ.",
        json_schema_extra=_extra(DATA),
    ),
]
CacheDir = Annotated[
    Path,
    Field(description="Packed images and teacher outputs are kept here.", json_schema_extra=_extra(DATA)),
]
DataDir = Annotated[
    Path, Field(description="Where kd download puts datasets.", json_schema_extra=_extra(DATA))
]
Threads = Annotated[
    int,
    Field(
        ge=0, le=1024, description="CPU threads; 0: all cores of the quota.", json_schema_extra=_extra(RUN)
    ),
]
TeacherPath = Path("weights/teacher.pt")


class DataSettings(Settings):
    """Where images come from."""

    data: DataSpec = "cifar10"
    image_size: ImageSize = None
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")


class TrainConfig(DataSettings):
    """`kd train`."""

    method: str = Field("kd", description="How the student learns.", json_schema_extra=_extra(METHOD))
    student: str = Field(
        "lenet",
        description="The network that is trained: lenet, lenet-caffe, nin, nin-fc, "
        "convnet-tiny, convnet-small or convnet-large.",
        json_schema_extra=_extra(METHOD),
    )
    teacher: Path = Field(
        TeacherPath,
        description="A checkpoint (.pt) or an ONNX file whose logits the student learns from.",
        json_schema_extra=_extra(METHOD),
    )
    tau: float = Field(
        3.0,
        gt=0,
        le=1000,
        description="kd: temperature of the soft targets.",
        json_schema_extra=_extra(METHOD),
    )
    lamda: float = Field(
        0.3,
        ge=0,
        le=1,
        description="kd: share of cross-entropy; the soft term gets the rest.",
        json_schema_extra=_extra(METHOD, "--lambda"),
    )
    noisy_ratio: float = Field(
        0.5,
        ge=0,
        le=1,
        description="noisy: probability that a sample's target is perturbed.",
        json_schema_extra=_extra(METHOD),
    )
    noisy_sigma: float = Field(
        0.9,
        ge=0,
        le=100,
        description="noisy: standard deviation of the relative noise.",
        json_schema_extra=_extra(METHOD),
    )
    noise_scope: Literal["sample", "logit"] = Field(
        "sample",
        description="noisy: one draw for all logits of a sample, or one for each.",
        json_schema_extra=_extra(METHOD),
    )
    ce_weight: float | None = Field(
        None,
        ge=0,
        description="Weight of cross-entropy on the labels; by default the method's own.",
        json_schema_extra=_extra(METHOD),
    )
    kd_weight: float | None = Field(
        None,
        ge=0,
        description="Weight of the teacher's term; by default the method's own.",
        json_schema_extra=_extra(METHOD),
    )
    teacher_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout left on in the teacher; above 0 it runs live at each step.",
        json_schema_extra=_extra(METHOD),
    )
    teacher_cache: Literal["views", "fixed", "off"] = Field(
        "views",
        description="views: the teacher is run once on each of --views variants; fixed: once on the plain images, "
        "while the student sees a fresh variant each epoch; off: in each step.",
        json_schema_extra=_extra(METHOD),
    )
    cache_top_k: int = Field(
        0,
        ge=0,
        le=65535,
        description="Keep only the K largest of the teacher's logits, for many classes; 0: all.",
        json_schema_extra=_extra(METHOD),
    )
    teacher_precision: Literal["auto", "32", "bf16"] = Field(
        "auto",
        description="auto: what is fastest here and gives 99.9 % of images the same class as float32.",
        json_schema_extra=_extra(METHOD),
    )

    grey: bool = Field(
        False, description="Turn colour images to grey, one channel.", json_schema_extra=_extra(DATA)
    )
    augment: str = Field(
        "none",
        description="How training images are varied: any of flip, crop, cutout and mixup, joined by hyphens.",
        json_schema_extra=_extra(DATA, metavar="none|flip|flip-crop|…"),
    )
    views: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Distinct variants of each image, cycled over the epochs; 0: as many as make sense.",
        json_schema_extra=_extra(DATA),
    )
    preprocess: Literal["mean-std", "mean-image", "gcn-zca", "none"] = Field(
        "mean-std", description="What the student does to its pixels.", json_schema_extra=_extra(DATA)
    )
    val_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the training data kept for validation.",
        json_schema_extra=_extra(DATA),
    )

    epochs: int = Field(
        100,
        ge=1,
        le=1_000_000,
        description="Passes over the training data.",
        json_schema_extra=_extra(OPTIMISER),
    )
    batch_size: int = Field(
        256, ge=1, le=1_000_000, description="Images a step.", json_schema_extra=_extra(OPTIMISER)
    )
    lr: float = Field(
        1e-3, gt=0, le=100, description="Learning rate at its highest.", json_schema_extra=_extra(OPTIMISER)
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="sgd has Nesterov momentum 0.9.", json_schema_extra=_extra(OPTIMISER)
    )
    schedule: Literal["step", "cosine", "onecycle"] = Field(
        "onecycle",
        description="step: ÷10 at 80 % of the epochs; cosine: to 0; onecycle: up for 30 %, then to 0.",
        json_schema_extra=_extra(OPTIMISER),
    )
    weight_decay: float = Field(
        0.0, ge=0, le=1, description="L2 penalty (adamw: decoupled).", json_schema_extra=_extra(OPTIMISER)
    )
    dropout: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Dropout of the network that is trained, where it has any.",
        json_schema_extra=_extra(OPTIMISER),
    )

    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="Initial weights, order, views and noise all follow from it.",
        json_schema_extra=_extra(RUN),
    )
    precision: Literal["auto", "32", "bf16"] = Field(
        "auto", description="auto measures which is faster here.", json_schema_extra=_extra(RUN)
    )
    compile: bool = Field(
        False, description="Compile the student's step (torch.compile).", json_schema_extra=_extra(RUN)
    )
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="What to train on; auto: a GPU if there is one.", json_schema_extra=_extra(RUN)
    )
    devices: int = Field(
        1,
        ge=1,
        le=1024,
        description="GPUs, or on a CPU processes, that share each batch. Under torchrun it decides.",
        json_schema_extra=_extra(RUN),
    )
    threads: Threads = 0
    name: str = Field(
        "",
        description="Name of the run; by default method, student and a number.",
        json_schema_extra=_extra(RUN),
    )
    runs_dir: Path = Field(Path("runs"), description="Runs are written here.", json_schema_extra=_extra(RUN))
    save_every: str = Field(
        "1",
        description="How often last.pt is written: N epochs, or as in 500steps or 10min; 0: only at the end.",
        json_schema_extra=_extra(RUN, metavar="N|Nsteps|Nmin"),
    )
    keep: int = Field(
        2,
        ge=1,
        le=10_000,
        description="Saved states to keep: last.pt and those before it.",
        json_schema_extra=_extra(RUN),
    )
    log_every: int = Field(
        50,
        ge=0,
        description="Steps between lines of metrics.jsonl; 0: a line an epoch only.",
        json_schema_extra=_extra(RUN),
    )
    tensorboard: bool = Field(
        False,
        description="Also write metrics for TensorBoard (pip install 'kdcli[tensorboard]').",
        json_schema_extra=_extra(RUN),
    )

    @field_validator("augment")
    @classmethod
    def _augment_of_known_steps(cls, value: str) -> str:
        steps = value.split("-")
        if value != "none" and (len(set(steps)) < len(steps) or not set(steps) <= set(AUGMENT_STEPS)):
            raise ValueError(f"must be none, or some of {', '.join(AUGMENT_STEPS)} joined by hyphens")
        return value if value == "none" else "-".join(step for step in AUGMENT_STEPS if step in steps)

    @field_validator("save_every", mode="before")
    @classmethod
    def _save_every_in_known_units(cls, value: Any) -> str:
        found = _SAVE_EVERY.fullmatch(str(value).strip())
        if found is None:
            raise ValueError("must be a number of epochs, or as in 500steps or 10min")
        unit = found[2].rstrip("s")
        return found[1] + {"epoch": "", "step": "steps"}.get(unit, unit)

    @property
    def saving(self) -> tuple[int, str]:
        """How often the state is saved: a number, and `epochs`, `steps` or `min`; number 0: only at the end."""
        found = _SAVE_EVERY.fullmatch(self.save_every)
        assert found is not None
        return int(found[1]), found[2] or "epochs"

    @field_validator("name")
    @classmethod
    def _name_is_one_folder(cls, value: str) -> str:
        if value in (".", "..") or any(mark in value for mark in '/\\\0:*?"<>|') or value.startswith("-"):
            raise ValueError("must be a plain folder name")
        return value


class ConvertConfig(DataSettings):
    """`kd convert-caffe`."""

    prototxt: Path | None = Field(
        None,
        description="The network as text; by default the one recorded in the caffemodel.",
        json_schema_extra=_extra("Caffe"),
    )
    arch: Literal["auto", "nin", "nin-fc", "lenet"] = Field(
        "auto",
        description="For a caffe-tensorflow .npy: its network; auto reads it off the layer names.",
        json_schema_extra=_extra("Caffe"),
    )
    preprocess: Literal["auto", "gcn-zca", "mean-std", "mean-image", "none"] = Field(
        "auto",
        description="What the network expects of its pixels; auto: what is known of it, else its transform_param.",
        json_schema_extra=_extra("Caffe"),
    )
    channel_order: Literal["auto", "rgb", "bgr"] = Field(
        "auto",
        description="Order of the colour planes; auto: as known, else bgr as in Caffe.",
        json_schema_extra=_extra("Caffe"),
    )
    output: Path = Field(
        TeacherPath, description="The checkpoint to write.", json_schema_extra=_extra(RUN, "-o")
    )


class ValidateConfig(DataSettings):
    """`kd validate`."""

    teacher: Path = Field(
        TeacherPath, description="The converted teacher.", json_schema_extra=_extra("Check")
    )
    against: Path | None = Field(
        None,
        description="The caffemodel it came from: logits are compared with OpenCV's own importer.",
        json_schema_extra=_extra("Check"),
    )
    prototxt: Path | None = Field(
        None,
        description="The network of --against, if it is not recorded there.",
        json_schema_extra=_extra("Check"),
    )
    images: int = Field(
        256, ge=1, description="Real images to compare with --against.", json_schema_extra=_extra("Check")
    )
    threads: Threads = 0


class TestConfig(Settings):
    """`kd test`."""

    data: str | None = Field(
        None,
        description="By default the data the model was trained on.",
        json_schema_extra=_extra(DATA, metavar="NAME|PATH"),
    )
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")
    teacher: Path | None = Field(
        None,
        description="Compare with this teacher; by default the one the student learned from.",
        json_schema_extra=_extra("Check"),
    )
    plot: Path | None = Field(
        None, description="Draw the confusion matrix (.png or .svg).", json_schema_extra=_extra("Check")
    )
    threads: Threads = 0


class ExportConfig(Settings):
    """`kd export`."""

    output: Path | None = Field(
        None,
        description="The ONNX file; by default exports/<run or file name>.onnx.",
        json_schema_extra=_extra("Export", "-o"),
    )
    int8: bool = Field(
        False,
        description="Quantise weights and activations (static QDQ, calibrated on train images).",
        json_schema_extra=_extra("Export"),
    )
    with_preprocessing: bool = Field(
        False,
        description="Take raw uint8 (N, H, W, C) images and give probabilities.",
        json_schema_extra=_extra("Export"),
    )
    opset: int = Field(18, ge=18, le=25, description="ONNX operator set.", json_schema_extra=_extra("Export"))
    calibration_images: int = Field(
        512, ge=1, description="Train images that calibrate int8.", json_schema_extra=_extra("Export")
    )
    parity_images: int = Field(
        256,
        ge=7,
        description="Real images on which the export must equal the checkpoint.",
        json_schema_extra=_extra("Export"),
    )
    data: str | None = Field(
        None,
        description="By default the data the model was trained on.",
        json_schema_extra=_extra(DATA, metavar="NAME|PATH"),
    )
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")


class BenchConfig(Settings):
    """`kd bench`."""

    batch: int = Field(
        64,
        ge=1,
        le=65536,
        description="Batch size of the throughput column.",
        json_schema_extra=_extra("Measure"),
    )
    rounds: int = Field(
        30, ge=3, le=100_000, description="Interleaved rounds.", json_schema_extra=_extra("Measure")
    )
    engine: Literal["both", "torch", "onnxruntime"] = Field(
        "both", description="What runs the .pt files.", json_schema_extra=_extra("Measure")
    )
    teacher: Path = Field(
        TeacherPath, description="The model all ratios refer to.", json_schema_extra=_extra("Measure")
    )
    data: str | None = Field(
        None,
        description="Measure accuracy and agreement on this data's test images.",
        json_schema_extra=_extra(DATA, metavar="NAME|PATH"),
    )
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")
    plot: Path | None = Field(
        None,
        description="Draw accuracy against latency (.png or .svg).",
        json_schema_extra=_extra("Measure"),
    )
    threads: Threads = 0


class DownloadConfig(Settings):
    """`kd download`."""

    source: str | None = Field(
        None,
        description="Take the file from here: a mirror's URL, or a file already on this machine.",
        json_schema_extra={**_extra("Download", metavar="FILE|URL"), "flag": "--from"},
    )
    data_dir: Path = Field(
        Path("data"), description="Datasets go here.", json_schema_extra=_extra("Download")
    )
    weights_dir: Path = Field(
        Path("weights"), description="Networks go here.", json_schema_extra=_extra("Download")
    )


class DemoConfig(Settings):
    """`kd demo`."""

    output: Path = Field(
        Path("demo"),
        description="Everything is written below this folder.",
        json_schema_extra=_extra(RUN, "-o"),
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of all runs.", json_schema_extra=_extra(RUN))
    threads: Threads = 0


S = TypeVar("S", bound=Settings)


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
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise UsageError(
            f"{flag} {first.get('input')!s}: must be {message.removeprefix('must be ')}",
            "See --help for what each option takes.",
        ) from error
