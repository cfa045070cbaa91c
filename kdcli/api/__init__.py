"""The operations of the command line as functions.

Settings are keyword arguments: `--batch-size 64` is `batch_size=64`, with the same default and bounds. Errors are
`KdError`, with a `hint`, for a file that is missing or damaged; `UsageError`, its subclass, for an unknown setting or
a value out of range. Progress and notes go to stderr, and to none with `kd.output.quiet = True`. Results print
as tables, in a notebook too; `to_dict()` gives their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import nn

from kdcli import methods as known_methods
from kdcli import models
from kdcli.api import arguments
from kdcli.api.arguments import Data, Model, Models, Student
from kdcli.base import config as configs
from kdcli.base import runtime
from kdcli.base.config import InputSettings, make
from kdcli.base.errors import KdError, UsageError
from kdcli.base.results import Result
from kdcli.cli import output as screen
from kdcli.cli.arguments import check_image_size
from kdcli.cli.bench import default_models, distinct
from kdcli.cli.compare import WITHOUT, run_comparison
from kdcli.cli.test import measure
from kdcli.cli.train import run_training
from kdcli.data import Splits
from kdcli.deploy import bench as benchmarks
from kdcli.deploy import export as exports
from kdcli.deploy import predict as predictions
from kdcli.deploy.onnx_model import OnnxClassifier
from kdcli.engine import Evaluation, RunResult, plan
from kdcli.methods import TrainConfig
from kdcli.models import Classifier
from kdcli.studies.compare import Comparison

P = ParamSpec("P")
R = TypeVar("R")
output = screen.settings  # `quiet`


@dataclass(frozen=True)
class Run(Result):
    """A finished training."""

    student: Path  # its checkpoint
    teacher: Path | None  # file of the first teacher; None without one
    result: RunResult  # figures and settings
    chain: tuple[RunResult, ...] = ()  # the trainings before it, of assistants and earlier generations

    def to_dict(self) -> dict[str, Any]:
        return self.result.to_dict()


def _drawn(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: draw progress during the call."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with screen.activity.running():
            return function(*args, **kwargs)

    return call


@_drawn
def load_data(data: str | Path, **settings: Any) -> Splits:
    """Read training and test images.

    Args:
        data: name of a data set, or a folder, archive or table of images, as `--data`.
        **settings: `image_size`, `grey`, `resize`, `test_fraction`, `skip_broken`, `unlabelled`, `data_dir`,
            `cache_dir`: options of `kd train`.

    Returns:
        Splits `train` and `test`: `images` uint8 (N, H, W, C), RGB or grey; `labels` int64 (N,); `classes`, their
        names. Images may be a memory map.
    """
    arguments.check_known(settings, arguments.OF_DATA)
    config = make(TrainConfig, {**settings, "data": arguments.source(data)})
    return replace(
        plan.load_data(config, screen.on_event),
        settings={name: getattr(config, name) for name in arguments.OF_DATA},
    )


@_drawn
def load_model(
    model: str | Path | nn.Module, *, data: Splits | None = None, threads: int = 0, **settings: Any
) -> Classifier | OnnxClassifier:
    """Read a checkpoint or an ONNX file, or join a module with its preprocessing.

    Args:
        model: path, name of a run, or a module from float32 (B, C, H, W) to logits (B, classes).
        data: from `load_data`: classes and images of a module.
        threads: CPU threads of onnxruntime; 0: all available cores.
        **settings: what a module, or an ONNX file of another program, leaves open: `scale`, `mean`, `std`, by which
            its input is (pixel 0–255 · scale − mean) / std; `channel_order`; of a file also `layout`,
            `class_names`, `resize`, `image_size`.

    Returns:
        A model from raw images, a uint8 tensor (B, H, W, C) with values 0–255, to logits float32 (B, classes); with
        `classes`, names in the order of the logits, and `input_size`, (H, W, C).
    """
    arguments.check_known(settings, InputSettings.model_fields)
    return arguments.loaded(model, make(InputSettings, settings), threads, data)


@_drawn
def distill(
    teacher: Models | None = None,
    student: Student | None = None,
    data: Data | None = None,
    *,
    recipe: str | None = None,
    resume: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Train a student as `kd train`. The student is evaluated on test images once, at the end.

    Args:
        teacher: model or path; several are averaged. None: the only one in `weights/` and `runs/`. A module takes
            pixels as set by `teacher_scale`, `teacher_mean`, `teacher_std`, `teacher_channel_order`.
        student: name of a network, or a model whose weights it starts from. A module takes pixels as set by
            `preprocess`.
        data: from `load_data`, or as its argument. None: what the teacher was trained on.
        recipe: name or TOML file of a preset, which the settings override.
        resume: an interrupted run to continue, by name or folder; without other arguments.
        **settings: options of `kd train`, such as `method="kd"`, `epochs=30`, `batch_size=128`, `tau=4.0`.

    Returns:
        The run: paths `student` and `teacher`; `result`, with accuracies in per cent.

    Raises:
        Interrupted: Ctrl-C; the hint continues the run, as does `resume`.
    """
    splits, values = arguments.of_training(teacher, student, data, settings)
    if values.get("devices", 1) != 1:
        raise UsageError("devices: from Python a run has one process", "For several: kd train --devices N")
    results, _ = run_training(values, recipe, None if resume is None else str(resume), splits)
    *before, result = results
    reads = known_methods.objective(result.config).needs_teacher
    return Run(result.run.student, result.config.teacher[0] if reads else None, result, tuple(before))


@_drawn
def evaluate(
    model: Model, data: Data | None = None, *, teacher: Model | None = None, **settings: Any
) -> Evaluation:
    """Measure a model on test images as `kd test`.

    Args:
        model: model, path, or name of a run.
        data: from `load_data`, or as its argument. None: what the model was trained on.
        teacher: model to compare with. None: the recorded one, if its file is unchanged.
        **settings: options of `kd test`.

    Returns:
        Accuracy with its 95 % interval, by class, and agreement with the teacher, in per cent; cross-entropy in nats.
    """
    if teacher is not None:
        settings["teacher"] = arguments.path_of(teacher, data)
    config, splits = arguments.of_model(configs.TestConfig, data, settings)
    runtime.set_threads(config.threads)
    return measure(arguments.loaded(model, config, config.threads, data), config, splits)[0]


@_drawn
def export(
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    int8: bool | str = False,
    data: Data | None = None,
    **settings: Any,
) -> exports.ExportResult:
    """Write a model as one ONNX file, verified on training images, as `kd export`.

    Args:
        model: model, checkpoint, or name of a run.
        output: file; None: `exports/NAME.onnx`.
        int8: True quantises by the default recipe; a text is a recipe, or `auto`: the best of several, or float32
            where int8 is not faster here.
        data: from `load_data`, or as its argument. None: what the model was trained on.
        **settings: options of `kd export`, such as `with_preprocessing=True`, `max_drop=0.5` (points).

    Returns:
        Path and size (bytes) of the file, largest difference of its outputs, cost of int8.

    Raises:
        KdError: the outputs differ, or the loss of accuracy is above `max_drop`; no file is written.
    """
    settings |= {"int8_recipe": int8} if isinstance(int8, str) else {"int8": int8}
    if output is not None:
        settings["output"] = output
    config, splits = arguments.of_model(configs.ExportConfig, data, settings)
    made = models.load(arguments.path_of(model, data))
    return exports.export(made, config, splits, screen.on_event)


@_drawn
def bench(models: Models = (), *, data: Data | None = None, **settings: Any) -> benchmarks.BenchResult:
    """Measure models against the first as `kd bench`, on this CPU.

    Args:
        models: one, or several, paths or names of runs among them, the teacher first; by default all.
        data: from `load_data`, or as its argument; its test images give accuracy. None: the recorded accuracy.
        **settings: options of `kd bench`, such as `rounds=100`, `batch=(1, 64)`, `engine="onnxruntime"`.

    Returns:
        A row for each model and engine: latency of one image in ms, images per second, sizes in bytes, ratios to
        the teacher with 95 % intervals, accuracy in per cent.
    """
    config, splits = arguments.of_model(configs.BenchConfig, data, settings)
    paths = [arguments.path_of(model, data) for model in arguments.several(models)]
    if paths and "teacher" in settings:
        raise UsageError("teacher: the first model is the reference", "Pass the teacher as the first model.")
    files = distinct(paths or default_models(config))
    return benchmarks.bench(files, config, splits, screen.on_event, skip=not paths)


@_drawn
def predict(
    model: Model, images: str | Path | Iterable[str | Path], **settings: Any
) -> list[predictions.Prediction]:
    """Classify image files as `kd predict`.

    Args:
        model: model, path, or name of a run.
        images: image files, folders or archives of them.
        **settings: options of `kd predict`, such as `top_k=1`.

    Returns:
        For each image its path, the most probable `classes`, and their `probabilities` in 0–1.
    """
    arguments.check_known(settings, configs.PredictConfig.model_fields)
    config = make(configs.PredictConfig, settings)
    runtime.set_threads(config.threads)
    made = arguments.loaded(model, config, config.threads)
    check_image_size(made.path, made.input_size, config.image_size)
    files = [images] if isinstance(images, str | Path) else list(images)
    if not all(isinstance(file, str | Path) for file in files):
        raise UsageError("images are paths of files, folders or archives", "Save arrays as image files.")
    return list(predictions.predict(made, list(map(Path, files)), config, on_event=screen.on_event))


@_drawn
def compare(
    methods: str | Sequence[str] = (),
    *,
    teacher: Models | None = None,
    student: Student | None = None,
    data: Data | None = None,
    seeds: int | Sequence[int] | None = None,
    recipe: str | None = None,
    resume: str | Path | None = None,
    **settings: Any,
) -> Comparison:
    """Train with several methods and seeds, and test whether one is better, as `kd compare`.

    Args:
        methods: names, by default `ce` and `kd`.
        teacher, student, data, recipe: as in `distill`.
        seeds: number of seeds, or their list.
        resume: a comparison to continue, by name or folder; without other arguments.
        **settings: options of `kd compare`.

    Returns:
        For each method mean and standard deviation of test accuracies in per cent, the difference from the baseline
        in points with its 95 % interval, and a verdict; `failed` lists runs that did not finish.
    """
    arguments.check_known(
        settings, {*configs.CompareConfig.model_fields, *TrainConfig.model_fields} - WITHOUT
    )
    splits, train = arguments.of_training(teacher, student, data, settings)
    own = {name: train.pop(name) for name in set(train) & set(configs.CompareConfig.model_fields)}
    if methods:
        own["methods"] = methods if isinstance(methods, str) else list(methods)
    if seeds is not None:
        own["seeds"] = seeds if isinstance(seeds, int | str) else list(seeds)
    config = make(configs.CompareConfig, own)
    return run_comparison(config, train, recipe, None if resume is None else Path(resume), splits)[0]
