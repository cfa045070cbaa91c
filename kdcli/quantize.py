"""Float32 ONNX → static int8 (QDQ): weights int8 per channel, activations uint8, ranges from train images."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx

from kdcli.errors import KdError
from kdcli.onnx_model import PREPROCESSING
from kdcli.runtime import cpu_info

# The last three hold no weights. Left in float32 they would have every product's output widened and narrowed
# again: with them, NIN at batch 64 took 116 ms and not 264 (float32: 326; 2 cores, VNNI, onnxruntime 1.32).
OPERATORS = ("Conv", "Gemm", "MatMul", "Relu", "MaxPool", "AveragePool")
# Their output stays float32, so that logits are not rounded to 256 levels: half the error, and no slower.
FLOAT_OUTPUT = ("Gemm", "MatMul")


@dataclass(frozen=True)
class Quantisation:
    """How a network was quantised, and what it cost.

    Attributes:
        calibration_images: train images whose minima and maxima set the activations' ranges.
        reduce_range: weights have 7 bits, because this CPU's 8-bit products could overflow.
        images: train images, none of them used for calibration, that judge the result.
        agreement: per cent of them with the float32 network's first class.
        float_accuracy, int8_accuracy: per cent of them right.
    """

    calibration_images: int
    reduce_range: bool
    images: int = 0
    agreement: float = 0.0
    float_accuracy: float = 0.0
    int8_accuracy: float = 0.0


def judged(
    quantisation: Quantisation, *, images: int, agreement: float, float_accuracy: float, int8_accuracy: float
) -> Quantisation:
    """The same with its costs filled in."""
    return replace(
        quantisation,
        images=images,
        agreement=agreement,
        float_accuracy=float_accuracy,
        int8_accuracy=int8_accuracy,
    )


def needs_reduced_range(flags: list[str] | None = None, machine: str | None = None) -> bool:
    """Whether 8-bit products can overflow: x86 adds pairs of them in 16 bits unless it has VNNI."""
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return False
    known = cpu_info()["flags"] if flags is None else flags
    return not any("vnni" in flag for flag in known)


def quantise(
    model: onnx.ModelProto, batches: Iterator[npt.NDArray[Any]], images: int
) -> tuple[onnx.ModelProto, Quantisation]:
    """Quantise the `OPERATORS` of the network; nodes named `preprocess/…` stay float32.

    Args:
        model: float32, with nodes named as `kdcli.export` names them.
        batches: inputs of the model, one array a batch.
        images: how many images `batches` gives in all.

    Raises:
        KdError: onnxruntime's quantiser cannot do it.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = model.graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            batch = next(batches, None)
            return None if batch is None else {name: batch}

    reduce_range = needs_reduced_range()
    try:
        with tempfile.TemporaryDirectory(prefix="kd-int8-") as folder:
            original, simplified, quantised = (Path(folder) / f"{stage}.onnx" for stage in "abc")
            onnx.save_model(model, original)
            # symbolic inference fails on ReduceL2 (whitening), and ONNX's own suffices for fixed image sizes
            quant_pre_process(str(original), str(simplified), skip_symbolic_shape=True)
            prepared = onnx.load_model(simplified)
            quantize_static(
                str(simplified),
                str(quantised),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(OPERATORS),
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                nodes_to_exclude=excluded_nodes(prepared),
                extra_options={"OpTypesToExcludeOutputQuantization": list(FLOAT_OUTPUT)},
            )
            result = onnx.load_model(quantised)
    except Exception as error:  # the quantiser raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise KdError(f"the network cannot be quantised: {reason}", "Export it without --int8.") from error
    return result, Quantisation(calibration_images=images, reduce_range=reduce_range)


def excluded_nodes(model: onnx.ModelProto) -> list[str]:
    """Nodes that prepare pixels: whitening and means need their float32."""
    return [node.name for node in model.graph.node if node.name.startswith(PREPROCESSING)]
