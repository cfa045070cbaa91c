"""Float32 ONNX → static int8 (QDQ), by a recipe calibrated on training images, or by the best of several."""

import math
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from kdcli.base import metrics
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress
from kdcli.base.runtime import cpu_info
from kdcli.base.text import first_line
from kdcli.base.timing import Floats, interleaved, median_interval, seconds_of, warm_up
from kdcli.deploy.onnx_model import PREPROCESSING, OnnxRunner
from kdcli.deploy.onnx_model.translate import silenced

WITH_WEIGHTS = ("Conv", "Gemm", "MatMul")
# Without ReLU and pooling, each would convert its input to float32 and back: NIN at batch 64 took 264 ms instead of
# 116 (float32: 326; 2 cores, VNNI, onnxruntime 1.32).
OPERATORS = (*WITH_WEIGHTS, "Relu", "MaxPool", "AveragePool")
# Logits are not rounded to 256 levels: half the error at the same speed.
FLOAT_OUTPUT = ("Gemm", "MatMul")
RANGES = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}  # onnxruntime's names
_ROUNDS = 41
_TURN_S = 2e-3  # the fastest model is called this long in each turn
_MAX_CALLS = 100  # in a turn
_AS_FAST = 1.05  # within this factor of the fastest counts as equally fast
_BATCH = 64

Batches = Callable[[], Iterator[npt.NDArray[Any]]]


@dataclass(frozen=True)
class Recipe:
    """One way to quantise; weights are int8 in all of them.

    Activation ranges are calibrated by `minmax`, the extremes; `entropy`, the range with the least KL divergence from
    the histogram; `percentile`, 99.999 % of the values.
    """

    signed: bool = False  # activations are int8 (S8S8) instead of uint8 (U8S8)
    per_channel: bool = True  # one scale per output channel of the weights instead of one per tensor
    ranges: str = "minmax"
    float_first: bool = False  # the first layer with weights stays float32
    float_last: bool = False

    @classmethod
    def parse(cls, name: str) -> Self:
        """The recipe of a name such as `u8s8-channel-minmax-last`, which `config.INT8_RECIPE` matches."""
        types, scope, ranges, *kept = name.split("-")
        return cls(types == "s8s8", scope == "channel", ranges, "first" in kept, "last" in kept)

    def __str__(self) -> str:
        parts = ["s8s8" if self.signed else "u8s8", "channel" if self.per_channel else "tensor", self.ranges]
        return "-".join([*parts, *["first"] * self.float_first, *["last"] * self.float_last])

    def variants(self) -> list[Self]:
        """Recipes that differ from this one in a single setting other than the ranges."""
        return [
            replace(self, per_channel=not self.per_channel),
            replace(self, signed=not self.signed),
            replace(self, float_first=not self.float_first),
            replace(self, float_last=not self.float_last),
        ]


def needs_reduced_range() -> bool:
    """Whether 8-bit products can overflow: x86 adds pairs of them in 16 bits unless it has VNNI."""
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686", "x86")
    return x86 and not any("vnni" in flag for flag in cpu_info()["flags"])


class Quantiser:
    """Quantises one network by any recipe; calibrates once for each kind of ranges."""

    def __init__(self, model: onnx.ModelProto, batches: Batches) -> None:
        """Prepare a float32 network named by `onnx_model.translate`; `batches` iterates calibration inputs."""
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.batches = batches
        self.reduce_range = needs_reduced_range()
        self._input = model.graph.input[0].name
        self._ranges: dict[str, Any] = {}
        with _scratch() as folder:
            onnx.save_model(model, folder / "a.onnx")
            # symbolic inference fails on ReduceL2 (whitening), and ONNX's own suffices for fixed image sizes
            quant_pre_process(str(folder / "a.onnx"), str(folder / "b.onnx"), skip_symbolic_shape=True)
            self._prepared = (folder / "b.onnx").read_bytes()

    def quantise(self, recipe: Recipe) -> onnx.ModelProto:
        """Quantise the `OPERATORS` of the network; a KdError if onnxruntime's quantiser fails."""
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

        with _scratch() as folder:
            source = folder / "b.onnx"
            source.write_bytes(self._prepared)
            if recipe.ranges not in self._ranges:
                self._ranges[recipe.ranges] = self._calibrate(source, recipe.ranges)
            prepared = load_model_with_shape_infer(source)
            quantizer = QDQQuantizer(
                prepared,
                recipe.per_channel,
                self.reduce_range,
                QuantType.QInt8,
                QuantType.QInt8 if recipe.signed else QuantType.QUInt8,
                self._ranges[recipe.ranges],
                [],
                _excluded_nodes(prepared, recipe),
                list(OPERATORS),
                {"OpTypesToExcludeOutputQuantization": list(FLOAT_OUTPUT)},
            )
            quantizer.quantize_model()
            quantizer.model.save_model_to_file(folder / "c.onnx", False)  # which sorts the nodes
            return onnx.load_model(folder / "c.onnx")

    def _calibrate(self, source: Path, ranges: str) -> Any:
        """Ranges by tensor. Batch by batch: `quantize_static` would keep all activations of all images."""
        from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        class OneBatch(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self, inputs: dict[str, npt.NDArray[Any]]) -> None:
                self.remaining = [inputs]

            def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
                return self.remaining.pop() if self.remaining else None

        calibrator = create_calibrator(
            source,
            list(OPERATORS),
            augmented_model_path=str(source.with_name("augmented.onnx")),
            calibrate_method=getattr(CalibrationMethod, RANGES[ranges]),
            # a symmetric range would spend half of uint8 on negative values, which a ReLU never gives
            extra_options={"symmetric": False},
        )
        for batch in self.batches():
            calibrator.collect_data(OneBatch({self._input: batch}))
        return calibrator.compute_data()


def _excluded_nodes(model: onnx.ModelProto, recipe: Recipe) -> list[str]:
    """Nodes that stay float32: preprocessing, and the layers that the recipe excludes."""
    stored = {tensor.name for tensor in model.graph.initializer}
    excluded = [node.name for node in model.graph.node if node.name.startswith(PREPROCESSING)]
    network = [node for node in model.graph.node if not node.name.startswith(PREPROCESSING)]
    weighted = [
        index
        for index, node in enumerate(network)
        if node.op_type in WITH_WEIGHTS and stored.intersection(node.input)
    ]
    if recipe.float_first and weighted:  # with its ReLU and pooling, which alone would be slower as int8
        excluded += [node.name for node in network[: weighted[1] if len(weighted) > 1 else None]]
    if recipe.float_last and weighted:
        excluded += [node.name for node in network[weighted[-1] :]]
    return excluded


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder, silence, and one KdError for the many kinds of exceptions the quantiser raises."""
    try:
        with silenced(), tempfile.TemporaryDirectory(prefix="kd-int8-") as folder:
            yield Path(folder)
    except Exception as error:
        raise KdError(
            f"the network cannot be quantised: {first_line(error, 300)}", "Export it without --int8."
        ) from error


@dataclass(frozen=True)
class RecipeTrial:
    """Measurements of one recipe."""

    recipe: str
    agreement: float | None = None  # % of selection images with float32's top-1 class; None if it failed
    speedup: float | None = None  # median over rounds of float32's time ÷ its own, one image at a time
    speedup_interval: tuple[float, float] | None = None  # 95 %, from order statistics
    chosen: bool = False
    problem: str | None = None  # reason of the failure


def search(
    quantiser: Quantiser, float_model: bytes, inputs: npt.NDArray[Any], reference: Tensor, on_event: OnEvent
) -> tuple[tuple[RecipeTrial, ...], onnx.ModelProto | None]:
    """Try seven recipes, and take one by agreement and by measured speed; no model if none is faster than float32.

    First the three kinds of ranges; then, with the one that agrees best, each other setting changed. Of those that
    are faster than float32 beyond chance, the fastest whose agreement is within one standard error of the best.
    `inputs` are the selection images, used for nothing else; `reference` float32's outputs for them (N, classes).
    """
    # 1. Quantise by each recipe, and measure its agreement.
    total = len(RANGES) + len(Recipe().variants())
    trials: list[RecipeTrial] = []
    models: list[bytes] = []

    def try_recipe(recipe: Recipe) -> None:
        on_event(Progress("trying int8 recipes", len(trials), total, "recipes"))
        trial, model = _try(quantiser, recipe, inputs, reference)
        trials.append(trial)
        models.append(model)

    for ranges in RANGES:
        try_recipe(Recipe(ranges=ranges))
    best = max(trials, key=lambda trial: -1.0 if trial.agreement is None else trial.agreement)
    for recipe in Recipe.parse(best.recipe).variants():
        try_recipe(recipe)
    on_event(Progress("trying int8 recipes", total, total, "recipes"))

    # 2. Time those that work against float32.
    working = [index for index, trial in enumerate(trials) if trial.agreement is not None]
    seconds = measure_seconds([float_model, *(models[index] for index in working)], inputs[:1], on_event)
    for column, index in enumerate(working, 1):
        low, median, high = median_interval(seconds[:, 0] / seconds[:, column])
        trials[index] = replace(trials[index], speedup=median, speedup_interval=(low, high))

    # 3. Take one.
    chosen = choose(trials, len(inputs))
    if chosen is None:
        return tuple(trials), None
    trials[chosen] = replace(trials[chosen], chosen=True)
    return tuple(trials), onnx.ModelProto.FromString(models[chosen])


def _try(
    quantiser: Quantiser, recipe: Recipe, inputs: npt.NDArray[Any], reference: Tensor
) -> tuple[RecipeTrial, bytes]:
    """Agreement and the quantised model; empty with a problem."""
    try:
        model = quantiser.quantise(recipe).SerializeToString(deterministic=True)
        outputs = torch.from_numpy(OnnxRunner(model, name=f"int8 by {recipe}").run(inputs, _BATCH))
    except KdError as error:
        return RecipeTrial(str(recipe), problem=error.message), b""
    if not bool(torch.isfinite(outputs).all()):
        return RecipeTrial(str(recipe), problem="it gives values that are not finite"), b""
    return RecipeTrial(str(recipe), metrics.agreement(outputs, reference)), model


def measure_seconds(models: Sequence[bytes], inputs: npt.NDArray[Any], on_event: OnEvent) -> Floats:
    """Seconds of one call of each model, (rounds, models): medians of the calls of a turn."""
    calls = [partial(OnnxRunner(model).call, inputs) for model in models]
    for call in calls:
        warm_up(call, until_stable=False)
    fastest = min(seconds_of(call) for call in calls)
    seconds = interleaved(
        calls,
        rounds=_ROUNDS,
        repeats=min(max(1, math.ceil(_TURN_S / max(fastest, 1e-7))), _MAX_CALLS),
        on_round=lambda done: on_event(Progress("timing int8 recipes", done, _ROUNDS, "rounds")),
    )
    return np.asarray(np.median(seconds, axis=2))


def choose(trials: Sequence[RecipeTrial], images: int) -> int | None:
    """Index of the trial to take, of equally fast ones the first; None where none is faster than float32."""
    faster = [
        (index, trial.agreement, trial.speedup)
        for index, trial in enumerate(trials)
        if trial.agreement is not None
        and trial.speedup is not None
        and (trial.speedup_interval or (0,))[0] > 1
    ]
    if not faster:
        return None
    best = max(agreement for _, agreement, _ in faster) / 100
    error = 100 * max(math.sqrt(best * (1 - best) / images), 1 / images)
    agreeing = [trial for trial in faster if trial[1] >= 100 * best - error]
    fastest = max(speedup for _, _, speedup in agreeing)
    return next(index for index, _, speedup in agreeing if speedup >= fastest / _AS_FAST)
