"""ONNX models in onnxruntime, on the CPU. Every session of kd is made here."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from joblib import cpu_count

from kdcli.base.errors import KdError
from kdcli.base.text import first_line

LEVELS = {  # graph optimisation levels of onnxruntime, each a superset of the one before
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class OnnxRunner:
    """An onnxruntime session for a model with one input; `batch`: images per call, if only that number runs."""

    def __init__(
        self, model: bytes, threads: int = 0, name: str = "model", *, level: str = "all", output: str = ""
    ) -> None:
        """Create the session of a serialised model, which cannot read files; a KdError if onnxruntime rejects it.

        `threads` 0: all available cores; `level`: graph optimisation, of `LEVELS`; `output`: by default the first.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or cpu_count()
        options.inter_op_num_threads = 1
        options.graph_optimization_level = LEVELS[level]
        options.log_severity_level = 4  # errors are raised; a log line would repeat them
        # threads that spin after a run would slow down whatever is timed next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.name = name
        try:
            # enable_fallback=0: the fallback prints, then tries the same provider again
            self.session = ort.InferenceSession(
                model, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise KdError(f"onnxruntime cannot run {name}: {first_line(error)}") from error
        taken = self.session.get_inputs()[0]
        self.input: str = taken.name
        self.output = output or self.session.get_outputs()[0].name
        self.batch: int | None = taken.shape[0] if taken.shape and isinstance(taken.shape[0], int) else None

    def call(self, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The output for inputs (B, …), without checks: the call that is timed."""
        return self.session.run([self.output], {self.input: inputs})[0]

    def run(self, inputs: npt.NDArray[Any], batch: int | None = None) -> npt.NDArray[Any]:
        """The output (N, …) for inputs (N, …); a KdError if onnxruntime fails, or it has another number of rows.

        `batch`: images per call, by default all at once. A batch fixed by the model takes precedence; the last call
        is then padded with copies of the first image.
        """
        count = len(inputs)
        step = self.batch or batch or count
        if self.batch and count % step:
            inputs = np.concatenate([inputs, np.repeat(inputs[:1], -count % step, axis=0)])
        parts = []
        for start in range(0, len(inputs), step):
            part = inputs[start : start + step]
            output: object = self.outputs([self.output], part)[0]
            if not isinstance(output, np.ndarray):  # a sequence or a map
                raise KdError(f"{self.name} gives no tensor")
            if output.shape[:1] != part.shape[:1]:
                raise KdError(
                    f"{self.name} gives an output of shape {output.shape} for a batch of {len(part)}"
                )
            parts.append(output)
        return np.concatenate(parts)[:count]

    @property
    def tensors(self) -> list[str]:
        """Names of the outputs that are tensors, not sequences or maps."""
        return [each.name for each in self.session.get_outputs() if each.type.startswith("tensor(")]

    def outputs(self, names: list[str], inputs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Outputs by name for inputs (N, …); a KdError if onnxruntime fails."""
        try:
            values: list[npt.NDArray[Any]] = self.session.run(names, {self.input: inputs})
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise KdError(
                f"onnxruntime cannot run {self.name} on a batch of {len(inputs)}: {first_line(error)}"
            ) from error
        return values
