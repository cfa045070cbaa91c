"""Float32 ONNX → static int8 (QDQ): ranges of activations from train images."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx

from kdcli.base.errors import KdError
from kdcli.base.runtime import cpu_info
from kdcli.deploy.int8.recipe import Recipe
from kdcli.deploy.onnx_model import PREPROCESSING
from kdcli.deploy.onnx_model.translate import silence

# The last three hold no weights. Left in float32 they would have every product's output widened and narrowed
# again: with them, NIN at batch 64 took 116 ms and not 264 (float32: 326; 2 cores, VNNI, onnxruntime 1.32).
OPERATORS = ("Conv", "Gemm", "MatMul", "Relu", "MaxPool", "AveragePool")
# Their output stays float32, so that logits are not rounded to 256 levels: half the error, and no slower.
FLOAT_OUTPUT = ("Gemm", "MatMul")
WITH_WEIGHTS = ("Conv", "Gemm", "MatMul")

Batches = Callable[[], Iterator[npt.NDArray[Any]]]


def needs_reduced_range(flags: list[str] | None = None, machine: str | None = None) -> bool:
    """Whether 8-bit products can overflow: x86 adds pairs of them in 16 bits unless it has VNNI."""
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return False
    known = cpu_info()["flags"] if flags is None else flags
    return not any("vnni" in flag for flag in known)


class Quantiser:
    """Makes int8 forms of one network; calibrates it once for each way of finding ranges."""

    def __init__(self, model: onnx.ModelProto, batches: Batches) -> None:
        """Prepare a network.

        Args:
            model: float32, with nodes named as `kdcli.deploy.export` names them.
            batches: gives the calibration images, as the model takes them, from the first each time.

        Raises:
            KdError: onnxruntime cannot simplify it.
        """
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.batches = batches
        self.reduce_range = needs_reduced_range()
        self._input = model.graph.input[0].name
        self._ranges: dict[str, Any] = {}
        with _workshop() as folder:
            onnx.save_model(model, folder / "a.onnx")
            # symbolic inference fails on ReduceL2 (whitening), and ONNX's own suffices for fixed image sizes
            quant_pre_process(str(folder / "a.onnx"), str(folder / "b.onnx"), skip_symbolic_shape=True)
            self._prepared = (folder / "b.onnx").read_bytes()

    def make(self, recipe: Recipe) -> onnx.ModelProto:
        """Quantise the `OPERATORS` of the network; nodes named `preprocess/…` stay float32.

        Raises:
            KdError: onnxruntime's quantiser cannot do it.
        """
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

        with _workshop() as folder:
            source = folder / "b.onnx"
            source.write_bytes(self._prepared)
            if recipe.ranges not in self._ranges:
                self._ranges[recipe.ranges] = self._calibrated(
                    source, folder / "augmented.onnx", recipe.ranges
                )
            prepared = load_model_with_shape_infer(source)
            quantizer = QDQQuantizer(
                prepared,
                recipe.per_channel,
                self.reduce_range,
                QuantType.QInt8,
                QuantType.QInt8 if recipe.signed else QuantType.QUInt8,
                self._ranges[recipe.ranges],
                [],
                excluded_nodes(prepared, recipe),
                list(OPERATORS),
                {"OpTypesToExcludeOutputQuantization": list(FLOAT_OUTPUT)},
            )
            quantizer.quantize_model()
            quantizer.model.save_model_to_file(folder / "c.onnx", False)  # which sorts the nodes
            return onnx.load_model(folder / "c.onnx")

    def _calibrated(self, source: Path, augmented: Path, ranges: str) -> Any:
        """Ranges by tensor. Batch by batch: the quantiser's own way keeps all activations of all images."""
        from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        class Once(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self, given: dict[str, npt.NDArray[Any]]) -> None:
                self.left = [given]

            def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
                return self.left.pop() if self.left else None

        method = {
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }[ranges]
        calibrator = create_calibrator(
            source,
            list(OPERATORS),
            augmented_model_path=str(augmented),
            calibrate_method=method,
            # a symmetric range would spend half of uint8 on negative values, which a ReLU never gives
            extra_options={"symmetric": False},
        )
        for batch in self.batches():
            calibrator.collect_data(Once({self._input: batch}))
        return calibrator.compute_data()


def excluded_nodes(model: onnx.ModelProto, recipe: Recipe | None = None) -> list[str]:
    """Nodes that stay float32: those that prepare pixels, and what the recipe leaves out."""
    recipe = recipe or Recipe()
    stored = {tensor.name for tensor in model.graph.initializer}
    network = [node for node in model.graph.node if not node.name.startswith(PREPROCESSING)]
    excluded = [node.name for node in model.graph.node if node.name.startswith(PREPROCESSING)]
    weighted = [
        number
        for number, node in enumerate(network)
        if node.op_type in WITH_WEIGHTS and any(name in stored for name in node.input)
    ]
    if (
        recipe.float_first and weighted
    ):  # with its ReLU and pooling: by themselves they would be slower as int8
        excluded += [node.name for node in network[: weighted[1] if len(weighted) > 1 else None]]
    if recipe.float_last and weighted:
        excluded += [node.name for node in network[weighted[-1] :]]
    return list(dict.fromkeys(excluded))


@contextmanager
def _workshop() -> Iterator[Path]:
    """A folder for the quantiser, silence, and one KdError for the many kinds of exceptions it raises."""
    try:
        with silence(), tempfile.TemporaryDirectory(prefix="kd-int8-") as folder:
            yield Path(folder)
    except KdError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise KdError(f"the network cannot be quantised: {reason}", "Export it without --int8.") from error
