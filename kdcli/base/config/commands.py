"""Settings of the commands beside `kd train`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

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
    about,
)

INT8_RECIPE = re.compile(r"[us]8s8-(channel|tensor)-(minmax|entropy|percentile)(-first)?(-last)?")
INT8_DEFAULT = "u8s8-channel-minmax"


class ConvertConfig(DataSettings):
    """`kd convert-caffe`."""

    prototxt: Path | None = Field(
        None,
        description="The network as text; by default the one recorded in the caffemodel.",
        json_schema_extra=about("Caffe"),
    )
    arch: Literal["auto", "nin", "nin-fc", "lenet"] = Field(
        "auto",
        description="For a caffe-tensorflow .npy: its network; auto reads it off the layer names.",
        json_schema_extra=about("Caffe"),
    )
    preprocess: Literal["auto", "gcn-zca", "mean-std", "mean-image", "none"] = Field(
        "auto",
        description="What the network expects of its pixels; auto: what is known of it, else its transform_param.",
        json_schema_extra=about("Caffe"),
    )
    channel_order: Literal["auto", "rgb", "bgr"] = Field(
        "auto",
        description="Order of the colour planes; auto: as known, else bgr as in Caffe.",
        json_schema_extra=about("Caffe"),
    )
    check: bool = Field(
        False,
        description="Compare with OpenCV's own importer on noise and on images of --data; write only what agrees.",
        json_schema_extra=about("Check"),
    )
    to: Literal["auto", "pt", "onnx"] = Field(
        "auto",
        description="What to write: a checkpoint, or ONNX at once; auto: as --output ends.",
        json_schema_extra=about(RUN),
    )
    output: Path = Field(
        TeacherPath,
        description="The file to write; with --to onnx by default exports/<model>.onnx.",
        json_schema_extra=about(RUN, "-o"),
    )


class ValidateConfig(DataSettings):
    """`kd validate`."""

    teacher: Path = Field(TeacherPath, description="The converted teacher.", json_schema_extra=about("Check"))
    against: Path | None = Field(
        None,
        description="The caffemodel it came from: logits are compared with OpenCV's own importer.",
        json_schema_extra=about("Check"),
    )
    prototxt: Path | None = Field(
        None,
        description="The network of --against, if it is not recorded there.",
        json_schema_extra=about("Check"),
    )
    images: int = Field(
        256, ge=1, description="Real images to compare with --against.", json_schema_extra=about("Check")
    )
    threads: Threads = 0


class TestConfig(Settings):
    """`kd test`."""

    data: ModelDataSpec = None
    skip_broken: SkipBroken = False
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")
    teacher: Path | None = Field(
        None,
        description="Compare with this teacher; by default the one the student learned from.",
        json_schema_extra=about("Check"),
    )
    plot: Path | None = Field(
        None, description="Draw the confusion matrix (.png or .svg).", json_schema_extra=about("Check")
    )
    threads: Threads = 0


class ExportConfig(Settings):
    """`kd export`."""

    output: Path | None = Field(
        None,
        description="The ONNX file; by default exports/<run or file name>.onnx.",
        json_schema_extra=about("Export", "-o"),
    )
    int8: str | None = Field(
        None,
        description="Quantise weights and activations (static QDQ, calibrated on train images): alone by "
        f"{INT8_DEFAULT}; auto: by what agrees best with float32 and is fastest here, if int8 is faster; "
        "or by a recipe: u8s8|s8s8 - channel|tensor - minmax|entropy|percentile, and -first, -last for a layer "
        "that stays float32.",
        json_schema_extra={
            **about("Export", metavar="[auto|RECIPE]"),
            "bare": INT8_DEFAULT,
            "value": f"auto|{INT8_RECIPE.pattern}|[us]8s8.*",  # a misspelt recipe is no file's name
        },
    )
    max_drop: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Points of accuracy that the file may lose on the validation split; more: exit 1, no file.",
        json_schema_extra=about("Export"),
    )
    with_preprocessing: bool = Field(
        False,
        description="Take raw uint8 (N, H, W, C) images and give probabilities.",
        json_schema_extra=about("Export"),
    )
    batch: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Images a run, no more and no fewer; by default any number.",
        json_schema_extra=about("Export"),
    )
    opset: int = Field(18, ge=18, le=25, description="ONNX operator set.", json_schema_extra=about("Export"))
    calibration_images: int = Field(
        512, ge=1, description="Train images that calibrate int8.", json_schema_extra=about("Export")
    )
    parity_images: int = Field(
        256,
        ge=7,
        description="Real images on which the export must equal the checkpoint.",
        json_schema_extra=about("Export"),
    )
    data: ModelDataSpec = None
    skip_broken: SkipBroken = False
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")

    @field_validator("int8")
    @classmethod
    def _int8_known(cls, value: str | None) -> str | None:
        if value is not None and value != "auto" and not INT8_RECIPE.fullmatch(value):
            raise ValueError(f"must be auto, or a recipe such as {INT8_DEFAULT} or s8s8-tensor-entropy-last")
        return value


class InfoConfig(Settings):
    """`kd info`."""

    classes: int = Field(
        10,
        ge=1,
        le=1_000_000,
        description="Of a network named without its file: how many it tells apart.",
        json_schema_extra=about("Network"),
    )
    image_size: int = Field(
        32,
        ge=4,
        le=1024,
        description="Of such a network: pixels of a side of its images.",
        json_schema_extra=about("Network"),
    )
    grey: bool = Field(
        False,
        description="Of such a network: its images have one channel.",
        json_schema_extra=about("Network"),
    )


class PredictConfig(Settings):
    """`kd predict`."""

    top_k: int = Field(
        3,
        ge=1,
        le=1_000_000,
        description="Classes to name for each image.",
        json_schema_extra=about("Output"),
    )
    skip_broken: SkipBroken = False
    threads: Threads = 0


class BenchConfig(Settings):
    """`kd bench`."""

    batch: str = Field(
        "1,8,64",
        description="Batch sizes of the throughput.",
        json_schema_extra=about("Measure", metavar="N,N,…"),
    )
    rounds: int = Field(
        480,
        ge=3,
        le=100_000,
        description="Interleaved rounds at most; fewer where all ratios are known to 1 %.",
        json_schema_extra=about("Measure"),
    )
    max_seconds: float = Field(
        60,
        ge=1,
        le=86_400,
        description="Rounds take no longer than this in all; intervals are wider then.",
        json_schema_extra=about("Measure"),
    )
    engine: Literal["both", "all", "torch", "compiled", "onnxruntime"] = Field(
        "both",
        description="What runs the .pt files: both is torch and onnxruntime, all adds torch.compile.",
        json_schema_extra=about("Measure"),
    )
    no_memory: bool = Field(
        False,
        description="Leave out memory and start-up, for which each model is loaded in a process of its own.",
        json_schema_extra=about("Measure"),
    )
    budget_ms: float | None = Field(
        None,
        gt=0,
        description="Exit 1 unless a model answers for one image within this, median.",
        json_schema_extra=about("Check"),
    )
    max_drop: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Exit 1 unless a model (within --budget-ms) is at most this many points of accuracy behind.",
        json_schema_extra=about("Check"),
    )
    teacher: Path = Field(
        TeacherPath, description="The model all ratios refer to.", json_schema_extra=about("Measure")
    )
    data: str | None = Field(
        None,
        description="Measure accuracy and agreement on this data's test images.",
        json_schema_extra=about(DATA, metavar="NAME|PATH"),
    )
    skip_broken: SkipBroken = False
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")
    plot: Path | None = Field(
        None,
        description="Draw accuracy against latency (.png or .svg).",
        json_schema_extra=about("Output"),
    )
    csv: Path | None = Field(
        None, description="Write all figures as a table for programs.", json_schema_extra=about("Output")
    )
    markdown: Path | None = Field(
        None, description="Write the table for a README.", json_schema_extra=about("Output")
    )
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

    output: Path = Field(
        Path("report.html"), description="The page to write.", json_schema_extra=about("Page", "-o")
    )
    thumbnails: int = Field(
        24,
        ge=0,
        le=500,
        description="Images to show of each run where student and teacher disagree.",
        json_schema_extra=about("Page"),
    )
    no_images: bool = Field(
        False, description="Leave the images out of the page.", json_schema_extra=about("Page")
    )
    bench: Path | None = Field(
        None,
        description="Take latencies from what kd bench --json printed; by default they are measured now.",
        json_schema_extra=about("Measure", metavar="FILE"),
    )
    bench_rounds: int = Field(
        80,
        ge=3,
        le=100_000,
        description="Interleaved rounds of that measurement.",
        json_schema_extra=about("Measure"),
    )
    no_bench: bool = Field(
        False, description="Leave latencies and sizes out.", json_schema_extra=about("Measure")
    )
    teacher: Path | None = Field(
        None,
        description="Compare with this teacher; by default the one each student learned from.",
        json_schema_extra=about("Measure"),
    )
    data: ModelDataSpec = None
    skip_broken: SkipBroken = False
    data_dir: DataDir = Path("data")
    cache_dir: CacheDir = Path("cache")
    threads: Threads = 0


class DownloadConfig(Settings):
    """`kd download`."""

    source: str | None = Field(
        None,
        description="Take the file from here: a mirror's URL, or a file already on this machine.",
        json_schema_extra={**about("Download", metavar="FILE|URL"), "flag": "--from"},
    )
    dry_run: bool = Field(
        False,
        description="Only list what would be fetched, from where, how much, and what is there already.",
        json_schema_extra=about("Download"),
    )
    data_dir: Path = Field(Path("data"), description="Datasets go here.", json_schema_extra=about("Download"))
    weights_dir: Path = Field(
        Path("weights"), description="Networks go here.", json_schema_extra=about("Download")
    )


class DemoConfig(Settings):
    """`kd demo`."""

    output: Path = Field(
        Path("demo"),
        description="Everything is written below this folder.",
        json_schema_extra=about(RUN, "-o"),
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of all runs.", json_schema_extra=about(RUN))
    threads: Threads = 0
