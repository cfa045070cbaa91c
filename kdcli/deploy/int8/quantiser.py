"""Float32 ONNX → static int8 (QDQ), calibrated on train images."""

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
from kdcli.base.text import first_line
from kdcli.deploy.int8.recipe import Recipe
from kdcli.deploy.onnx_model import PREPROCESSING
from kdcli.deploy.onnx_model.translate import silenced

WITH_WEIGHTS = ("Conv", "Gemm", "MatMul")
# Without ReLU and pooling, each would convert its input to float32 and back: NIN at batch 64 took 264 ms instead of
# 116 (float32: 326; 2 cores, VNNI, onnxruntime 1.32).
OPERATORS = (*WITH_WEIGHTS, "Relu", "MaxPool", "AveragePool")
# Logits are not rounded to 256 levels: half the error at the same speed.
FLOAT_OUTPUT = ("Gemm", "MatMul")
_CALIBRATION = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}

Batches = Callable[[], Iterator[npt.NDArray[Any]]]


def needs_reduced_range(flags: list[str] | None = None, machine: str | None = None) -> bool:
    """Whether 8-bit products can overflow: x86 adds pairs of them in 16 bits unless it has VNNI."""
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return False
    known = cpu_info()["flags"] if flags is None else flags
    return not any("vnni" in flag for flag in known)


class Quantiser:
    """Quantises one network by any recipe; calibrates once for each kind of ranges."""

    def __init__(self, model: onnx.ModelProto, batches: Batches) -> None:
        """Prepare a network.

        Args:
            model: float32, nodes named as `onnx_model.translate` names them.
            batches: returns an iterator over the calibration inputs.

        Raises:
            KdError: onnxruntime cannot simplify it.
        """
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
        """Quantise the `OPERATORS` of the network; nodes named `preprocess/…` stay float32.

        Raises:
            KdError: onnxruntime's quantiser cannot do it.
        """
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
            calibrate_method=getattr(CalibrationMethod, _CALIBRATION[ranges]),
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
    return list(dict.fromkeys(excluded))


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder, silence, and one KdError for the many kinds of exceptions the quantiser raises."""
    try:
        with silenced(), tempfile.TemporaryDirectory(prefix="kd-int8-") as folder:
            yield Path(folder)
    except KdError:
        raise
    except Exception as error:
        raise KdError(
            f"the network cannot be quantised: {first_line(error, 300)}", "Export it without --int8."
        ) from error
