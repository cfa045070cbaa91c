"""Settings of the other commands."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, field_validator, model_validator

from kdcli.base.config.settings import (
    DATA,
    RUN,
    CacheDir,
    DataDir,
    DataSettings,
    FolderName,
    InputSettings,
    MaxDrop,
    ModelDataSettings,
    PixelSettings,
    Resize,
    Seed,
    Settings,
    SkipBroken,
    TeacherInputSettings,
    TeacherPath,
    Threads,
    setting,
)

INT8_RECIPE = re.compile(r"[us]8s8-(channel|tensor)-(minmax|entropy|percentile)(-first)?(-last)?")
INT8_DEFAULT = "u8s8-channel-minmax"
COMPARE = "Comparison"
MOST_SEEDS = 1000


def _entries(value: Any) -> list[str]:
    """Entries of a list, or of a text joined by commas."""
    words = (value or [""]) if isinstance(value, list | tuple) else str(value).split(",")
    return [str(word).strip() for word in words]


def _batch_sizes(value: Any) -> tuple[int, ...]:
    words = _entries(value)
    if not all(word.isdecimal() and len(word) <= 5 and 1 <= int(word) <= 65536 for word in words):
        raise ValueError("must be numbers from 1 to 65536, joined by commas")
    return tuple(sorted(set(map(int, words))))


def _method_names(value: Any) -> tuple[str, ...]:
    names = _entries(value)
    if not all(names) or len(set(names)) < len(names):
        raise ValueError("must be names of methods, each once, joined by commas")
    return tuple(names)


def _seed_numbers(value: Any) -> tuple[int, ...]:
    """`5` → 0 … 4; `3,7,11` and `7,` list seeds."""
    words = _entries(value)
    counted = len(words) == 1 and not isinstance(value, list | tuple)
    listed = words[:-1] if len(words) > 1 and not words[-1] else words
    seeds = [int(word) for word in listed if word.isascii() and word.isdecimal()]
    count = max(seeds, default=0) if counted else len(listed)
    if len(set(seeds)) < len(listed) or max(seeds, default=0) >= 2**63 or not 1 <= count <= MOST_SEEDS:
        raise ValueError(f"must be a number of seeds, 1 to {MOST_SEEDS}, or different seeds joined by commas")
    return tuple(range(count)) if counted else tuple(seeds)


def _no_folder(path: Path | None) -> Path | None:
    if path is not None and path.exists() and not path.is_file():
        raise ValueError("must be a file, not a folder or device")
    return path


def _of_a_figure(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() not in (".png", ".svg"):
        raise ValueError("must be a .png or .svg file")
    return path


_NO_FOLDER = AfterValidator(_no_folder)
OutputFile = Annotated[Path | None, _NO_FOLDER]
Figure = Annotated[OutputFile, AfterValidator(_of_a_figure)]


class ConvertConfig(DataSettings, PixelSettings):
    """`kd convert-caffe`."""

    prototxt: Path | None = setting(None, "Deploy prototxt; by default that of the caffemodel.", "Caffe")
    arch: Literal["auto", "nin", "nin-fc", "lenet"] = setting(
        "auto", "Network of a caffe-tensorflow .npy; auto: recognised by its layer names.", "Caffe"
    )
    preprocess: Literal["auto", "gcn-zca", "mean-std", "mean-image", "none"] = setting(
        "auto", "Preprocessing of the network; auto: known for this file, else its transform_param.", "Caffe"
    )
    channel_order: Literal["auto", "rgb", "bgr"] = setting(
        "auto", "Channel order; auto: known for this file, else bgr as in Caffe.", "Caffe"
    )
    resize: Resize = None
    check: bool = setting(
        False, "Write the file only if OpenCV's Caffe importer agrees on noise and images of --data.", "Check"
    )
    output: Annotated[Path, _NO_FOLDER] = setting(
        TeacherPath, "Output file, a checkpoint (.pt) or ONNX (.onnx).", RUN, "-o"
    )

    @model_validator(mode="after")
    def _one_preprocessing(self) -> Self:
        if self.preprocess != "auto" and self.mean_std is not None:
            raise ValueError("--preprocess cannot be combined with --scale, --mean and --std")
        return self


class DataConfig(Settings):
    """`kd data`."""

    sheet: Figure = setting(None, "Contact sheet: up to eight images of each class (.png or .svg).", "Output")
    skip_broken: SkipBroken = False
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")


class ValidateConfig(DataSettings, InputSettings):
    """`kd validate`."""

    teacher: Path = setting(TeacherPath, "Teacher; if the default is absent, the only one found.", "Check")
    against: Path | None = setting(
        None, "Original caffemodel: compare logits with OpenCV's Caffe importer.", "Check"
    )
    prototxt: Path | None = setting(None, "Prototxt of --against, if not recorded in it.", "Check")
    images: int = setting(256, "Test images for the comparison with --against.", "Check", ge=1)
    probe: bool = setting(
        False,
        "Measure likely input formats of FILE.onnx on labelled images; the best is written to FILE.onnx.toml.",
        "Check",
    )
    threads: Threads = 0


class TestConfig(ModelDataSettings, InputSettings, TeacherInputSettings):
    """`kd test`."""

    teacher: Path | None = setting(
        None, "Teacher to compare with; by default the one recorded in the student.", "Check"
    )
    plot: Figure = setting(None, "Plot the confusion matrix (.png or .svg).", "Check")
    threads: Threads = 0


class LogitsConfig(Settings):
    """`kd teacher-logits`, in addition to `TrainSettings`."""

    top_k: int = setting(0, "Store the K largest logits of each image; 0: all.", "Output", ge=0, le=65535)
    output: Path = setting(Path("pack"), "Folder to write.", "Output", "-o")


class ExportConfig(ModelDataSettings):
    """`kd export`."""

    output: Path | None = setting(None, "ONNX file; by default exports/<run or file>.onnx.", "Export", "-o")
    int8: bool = setting(False, "Quantise to int8 (static QDQ, calibrated on training images).", "Export")
    int8_recipe: str | None = setting(
        None,
        f"Recipe of --int8, which it implies; by default {INT8_DEFAULT}. Form: u8s8|s8s8 - channel|tensor - "
        "minmax|entropy|percentile, with -first, -last to keep that layer float32. auto: the best of several, "
        "or float32 if none is faster here.",
        "Export",
        metavar="auto|RECIPE",
    )
    max_drop: MaxDrop = setting(
        None, "Maximum loss of validation accuracy, in points; otherwise no file and exit 1.", "Export"
    )
    with_preprocessing: bool = setting(
        False, "Include preprocessing and softmax: uint8 (N, H, W, C) images in, probabilities out.", "Export"
    )
    batch: int | None = setting(None, "Fixed batch size; by default dynamic.", "Export", ge=1, le=4096)
    opset: int = setting(18, "ONNX opset version.", "Export", ge=18, le=25)
    calibration_images: int = setting(512, "Training images for int8 calibration.", "Export", ge=1)
    parity_images: int = setting(256, "Images for verifying the exported file.", "Export", ge=7)

    @property
    def recipe(self) -> str | None:
        """The int8 recipe or `auto`; None for float32."""
        return self.int8_recipe or (INT8_DEFAULT if self.int8 else None)

    @field_validator("int8_recipe")
    @classmethod
    def _known_recipe(cls, value: str | None) -> str | None:
        if value is not None and value != "auto" and not INT8_RECIPE.fullmatch(value):
            raise ValueError(f"must be auto, or a recipe such as {INT8_DEFAULT} or s8s8-tensor-entropy-last")
        return value


class InfoConfig(InputSettings):
    """`kd info`."""

    classes: int = setting(10, "Classes, for a network given by name.", "Network", ge=1, le=1_000_000)
    image_size: int | None = setting(
        None,
        "Input size of a network given by name (by default 32), or of an ONNX file with dynamic size.",
        "Network",
        ge=4,
        le=1024,
    )
    grey: bool = setting(False, "Greyscale input, for a network given by name.", "Network")


class PredictConfig(InputSettings):
    """`kd predict`."""

    top_k: int = setting(3, "Number of classes to show for each image.", "Output", ge=1, le=1_000_000)
    skip_broken: SkipBroken = False
    threads: Threads = 0


class BenchConfig(ModelDataSettings, InputSettings):
    """`kd bench`."""

    batch: Annotated[tuple[int, ...], BeforeValidator(_batch_sizes)] = setting(
        "1,8,64", "Batch sizes for throughput.", "Measure", metavar="N,N,…"
    )
    rounds: int = setting(
        480,
        "Maximum number of interleaved rounds; stops early when all ratios are known to 1 %.",
        "Measure",
        ge=3,
        le=100_000,
    )
    max_seconds: float = setting(60, "Time limit of all rounds, in seconds.", "Measure", ge=1, le=86_400)
    engine: Literal["both", "all", "torch", "compiled", "onnxruntime"] = setting(
        "both", "Engine for .pt files; both: torch and onnxruntime; all: also torch.compile.", "Measure"
    )
    no_memory: bool = setting(False, "Skip memory and load time (a process for each model).", "Measure")
    budget_ms: float | None = setting(
        None, "Maximum median latency of one image, in ms; exit 1 if all models are slower.", "Check", gt=0
    )
    max_drop: MaxDrop = setting(
        None,
        "Maximum loss of accuracy, in points; exit 1 if all models (within --budget-ms) lose more.",
        "Check",
    )
    teacher: Path = setting(
        TeacherPath, "Reference of all ratios; if the default is absent, the only teacher found.", "Measure"
    )
    data: str | None = setting(
        None, "Data set whose test images measure accuracy and agreement.", DATA, metavar="NAME|PATH"
    )
    details: bool = setting(
        False, "Show all engines, percentiles, intervals, operations, memory and start-up.", "Output"
    )
    plot: Figure = setting(None, "Plot accuracy against latency (.png or .svg).", "Output")
    csv: OutputFile = setting(None, "Write all measurements as CSV.", "Output")
    markdown: OutputFile = setting(None, "Write the table as Markdown.", "Output")
    threads: Threads = 0


class CompareConfig(Settings):
    """`kd compare`, in addition to `TrainSettings`."""

    methods: Annotated[tuple[str, ...], BeforeValidator(_method_names)] = setting(
        "ce,kd", "Methods, joined by commas; to add some later, set --name.", COMPARE, metavar="NAME,NAME,…"
    )
    seeds: Annotated[tuple[int, ...], BeforeValidator(_seed_numbers)] = setting(
        "5",
        "Number of seeds, from 0 on; or a list of seeds, such as 3,7,11, or 7, for a single one.",
        COMPARE,
        metavar="N|S,S,…",
    )
    baseline: str = setting(
        "", "Method that others are compared with; by default ce, else the first.", COMPARE, metavar="NAME"
    )
    name: FolderName = setting("", "Name of the comparison; by default its methods, student and data.", RUN)
    out: Path = setting(Path("comparisons"), "Folder of the comparisons.", RUN)
    csv: OutputFile = setting(None, "Write all figures as CSV.", "Output")
    markdown: OutputFile = setting(None, "Write the table as Markdown.", "Output")


class ReproduceConfig(Settings):
    """`kd reproduce`."""

    method: str = setting(
        "",
        "The run's method if it is custom: code is imported only if named on the command line.",
        "Check",
        metavar="MODULE:FUNCTION",
    )
    tolerance: float = setting(
        0.5, "Allowed difference in test accuracy, in points, if bits differ.", "Check", ge=0, le=100
    )


class ReportConfig(ModelDataSettings):
    """`kd report`."""

    output: Annotated[Path, _NO_FOLDER] = setting(Path("report.html"), "Output file.", "Page", "-o")
    thumbnails: int = setting(
        24, "Images per run on which student and teacher disagree; 0: none.", "Page", ge=0, le=500
    )
    bench: Path | None = setting(
        None, "Output of kd bench --json with latencies; by default measured.", "Measure", metavar="FILE"
    )
    no_bench: bool = setting(False, "Omit latencies and sizes.", "Measure")
    teacher: Path | None = setting(
        None, "Teacher to compare with; by default the one recorded in each student.", "Measure"
    )
    threads: Threads = 0


class DownloadConfig(Settings):
    """`kd download`."""

    from_: str | None = setting(
        None,
        "Source of the files: URL of a mirror, or a local file or folder.",
        "Download",
        metavar="FILE|URL",
    )
    dry_run: bool = setting(
        False, "List files, sources, sizes and present files without downloading.", "Download"
    )
    data_dir: Path = setting(Path("data"), "Folder for data sets.", "Download")
    weights_dir: Path = setting(Path("weights"), "Folder for networks.", "Download")


class CleanConfig(Settings):
    """`kd clean`."""

    yes: bool = setting(False, "Delete without asking.", RUN, "-y")
    dry_run: bool = setting(False, "List files to delete, and their sizes.", RUN)
    cache_dir: CacheDir = Path("cache")


class DemoConfig(Settings):
    """`kd demo`."""

    output: Path = setting(Path("demo"), "Output folder.", RUN, "-o")
    seed: Seed = setting(0, "Seed of all runs.", RUN)
    threads: Threads = 0
