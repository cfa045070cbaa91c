"""Settings of the commands beside `kd train`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from kdcli.base.config.settings import (
    DATA,
    RUN,
    CacheDir,
    DataDir,
    DataSettings,
    ModelDataSpec,
    Settings,
    SkipBroken,
    TeacherPath,
    Threads,
    setting,
)

INT8_RECIPE = re.compile(r"[us]8s8-(channel|tensor)-(minmax|entropy|percentile)(-first)?(-last)?")
INT8_DEFAULT = "u8s8-channel-minmax"


class ConvertConfig(DataSettings):
    """`kd convert-caffe`."""

    prototxt: Path | None = setting(
        None, "The network as text; by default the one recorded in the caffemodel.", "Caffe"
    )
    arch: Literal["auto", "nin", "nin-fc", "lenet"] = setting(
        "auto", "For a caffe-tensorflow .npy: its network; auto reads it off the layer names.", "Caffe"
    )
    preprocess: Literal["auto", "gcn-zca", "mean-std", "mean-image", "none"] = setting(
        "auto",
        "What the network expects of its pixels; auto: what is known of it, else its transform_param.",
        "Caffe",
    )
    channel_order: Literal["auto", "rgb", "bgr"] = setting(
        "auto", "Order of the colour planes; auto: as known, else bgr as in Caffe.", "Caffe"
    )
    check: bool = setting(
        False,
        "Compare with OpenCV's own importer on noise and on images of --data; write only what agrees.",
        "Check",
    )
    to: Literal["auto", "pt", "onnx"] = setting(
        "auto", "What to write: a checkpoint, or ONNX at once; auto: as --output ends.", RUN
    )
    output: Path = setting(
        TeacherPath, "The file to write; with --to onnx by default exports/<model>.onnx.", RUN, "-o"
    )


class ValidateConfig(DataSettings):
    """`kd validate`."""

    teacher: Path = setting(TeacherPath, "The converted teacher.", "Check")
    against: Path | None = setting(
        None, "The caffemodel it came from: logits are compared with OpenCV's own importer.", "Check"
    )
    prototxt: Path | None = setting(None, "The network of --against, if it is not recorded there.", "Check")
    images: int = setting(256, "Real images to compare with --against.", "Check", ge=1)
    threads: Threads = 0


class TestConfig(Settings):
    """`kd test`."""

    data: ModelDataSpec = None
    skip_broken: SkipBroken = False
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")
    teacher: Path | None = setting(
        None, "Compare with this teacher; by default the one the student learned from.", "Check"
    )
    plot: Path | None = setting(None, "Draw the confusion matrix (.png or .svg).", "Check")
    threads: Threads = 0


class ExportConfig(Settings):
    """`kd export`."""

    output: Path | None = setting(
        None, "The ONNX file; by default exports/<run or file name>.onnx.", "Export", "-o"
    )
    int8: bool = setting(
        False,
        "Quantise weights and activations to int8 (static QDQ, calibrated on training images).",
        "Export",
    )
    int8_recipe: str | None = setting(
        None,
        f"How to quantise; implies --int8, which alone uses {INT8_DEFAULT}. A recipe is "
        "u8s8|s8s8 - channel|tensor - minmax|entropy|percentile, with -first, -last to keep that layer float32. "
        "auto: try several and take the best, or float32 where int8 is not faster on this machine.",
        "Export",
        metavar="auto|RECIPE",
    )
    max_drop: float | None = setting(
        None,
        "Points of accuracy that the file may lose on the validation split; more: exit 1, no file.",
        "Export",
        ge=0,
        le=100,
    )
    with_preprocessing: bool = setting(
        False, "Take raw uint8 (N, H, W, C) images and give probabilities.", "Export"
    )
    batch: int | None = setting(
        None, "Images a run, no more and no fewer; by default any number.", "Export", ge=1, le=4096
    )
    opset: int = setting(18, "ONNX operator set.", "Export", ge=18, le=25)
    calibration_images: int = setting(512, "Train images that calibrate int8.", "Export", ge=1)
    parity_images: int = setting(
        256, "Real images on which the export must equal the checkpoint.", "Export", ge=7
    )
    data: ModelDataSpec = None
    skip_broken: SkipBroken = False
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")

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


class InfoConfig(Settings):
    """`kd info`."""

    classes: int = setting(
        10, "Of a network named without its file: how many it tells apart.", "Network", ge=1, le=1_000_000
    )
    image_size: int = setting(
        32, "Of such a network: pixels of a side of its images.", "Network", ge=4, le=1024
    )
    grey: bool = setting(False, "Of such a network: its images have one channel.", "Network")


class PredictConfig(Settings):
    """`kd predict`."""

    top_k: int = setting(3, "Classes to name for each image.", "Output", ge=1, le=1_000_000)
    skip_broken: SkipBroken = False
    threads: Threads = 0


class BenchConfig(Settings):
    """`kd bench`."""

    batch: str = setting("1,8,64", "Batch sizes of the throughput.", "Measure", metavar="N,N,…")
    rounds: int = setting(
        480,
        "Interleaved rounds at most; fewer where all ratios are known to 1 %.",
        "Measure",
        ge=3,
        le=100_000,
    )
    max_seconds: float = setting(
        60, "Rounds take no longer than this in all; intervals are wider then.", "Measure", ge=1, le=86_400
    )
    engine: Literal["both", "all", "torch", "compiled", "onnxruntime"] = setting(
        "both", "What runs the .pt files: both is torch and onnxruntime, all adds torch.compile.", "Measure"
    )
    no_memory: bool = setting(
        False,
        "Leave out memory and start-up, for which each model is loaded in a process of its own.",
        "Measure",
    )
    budget_ms: float | None = setting(
        None, "Exit 1 unless a model answers for one image within this, median.", "Check", gt=0
    )
    max_drop: float | None = setting(
        None,
        "Exit 1 unless a model (within --budget-ms) is at most this many points of accuracy behind.",
        "Check",
        ge=0,
        le=100,
    )
    teacher: Path = setting(TeacherPath, "The model all ratios refer to.", "Measure")
    data: str | None = setting(
        None, "Measure accuracy and agreement on this data's test images.", DATA, metavar="NAME|PATH"
    )
    skip_broken: SkipBroken = False
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")
    plot: Path | None = setting(None, "Draw accuracy against latency (.png or .svg).", "Output")
    csv: Path | None = setting(None, "Write all figures as a table for programs.", "Output")
    markdown: Path | None = setting(None, "Write the table for a README.", "Output")
    threads: Threads = 0

    @field_validator("batch", mode="before")
    @classmethod
    def _batch_sizes(cls, value: object) -> str:
        words = [word.strip() for word in str(value).split(",")]
        if not all(word.isdecimal() and len(word) <= 5 and 1 <= int(word) <= 65536 for word in words):
            raise ValueError("must be numbers from 1 to 65536, joined by commas")
        return ",".join(map(str, sorted(set(map(int, words)))))

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes, ascending."""
        return tuple(map(int, self.batch.split(",")))


class ReportConfig(Settings):
    """`kd report`."""

    output: Path = setting(Path("report.html"), "The page to write.", "Page", "-o")
    thumbnails: int = setting(
        24, "Images to show of each run where student and teacher disagree.", "Page", ge=0, le=500
    )
    no_images: bool = setting(False, "Leave the images out of the page.", "Page")
    bench: Path | None = setting(
        None,
        "Take latencies from what kd bench --json printed; by default they are measured now.",
        "Measure",
        metavar="FILE",
    )
    bench_rounds: int = setting(80, "Interleaved rounds of that measurement.", "Measure", ge=3, le=100_000)
    no_bench: bool = setting(False, "Leave latencies and sizes out.", "Measure")
    teacher: Path | None = setting(
        None, "Compare with this teacher; by default the one each student learned from.", "Measure"
    )
    data: ModelDataSpec = None
    skip_broken: SkipBroken = False
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")
    threads: Threads = 0


class DownloadConfig(Settings):
    """`kd download`."""

    source: str | None = setting(
        None,
        "Take the file from here: a mirror's URL, or a file already on this machine.",
        "Download",
        flag="--from",
        metavar="FILE|URL",
    )
    dry_run: bool = setting(
        False, "Only list what would be fetched, from where, how much, and what is there already.", "Download"
    )
    data_dir: Path = setting(Path("data"), "Datasets go here.", "Download")
    weights_dir: Path = setting(Path("weights"), "Networks go here.", "Download")


class DemoConfig(Settings):
    """`kd demo`."""

    output: Path = setting(Path("demo"), "Everything is written below this folder.", RUN, "-o")
    seed: int = setting(0, "Seed of all runs.", RUN, ge=0, lt=2**63)
    threads: Threads = 0
