"""An ONNX file as a classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from kdcli.base.errors import KdError
from kdcli.base.text import first_line
from kdcli.data.preprocess import Preprocess
from kdcli.deploy.onnx_model.facts import CHANNELS, image_input, layout_of
from kdcli.deploy.onnx_model.files import read, serialized, session
from kdcli.deploy.onnx_model.remarks import remarks_of

MAX_SIDE = 4096
MAX_BATCH = 4096
MAX_VALUES = 2**27  # of a fixed batch: 0.5 GB as float32

_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class OnnxClassifier:
    """An ONNX file with the face of `kdcli.models.Classifier`.

    Attributes:
        path: the file.
        classes: class names in the order of the logits; numbers if the file does not say.
        input_size: (H, W, C) of the raw images.
        provenance: what kd export wrote of its origin, else empty.
        metadata: all the file's own remarks.
        layout: `NCHW` or `NHWC`: the order of its input's sides.
        dtype: of its input; uint8 is raw images, RGB.
        preprocess: raw pixels → its input; None where it is not known (or not needed: uint8).
        gives: `logits` or `probabilities`.
        batch: images it takes at a time, no more and no fewer; None: any number.
        session: runs it.
        model: the parsed file.
        file_bytes: of the file, and of those beside it that hold its weights.
    """

    path: Path
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    provenance: dict[str, Any]
    metadata: dict[str, str]
    layout: str
    dtype: np.dtype[Any]
    preprocess: Preprocess | None
    gives: str
    batch: int | None
    session: ort.InferenceSession = field(repr=False)
    model: onnx.ModelProto = field(repr=False)
    file_bytes: int

    @classmethod
    def load(
        cls,
        path: Path,
        threads: int = 0,
        input_size: tuple[int, int, int] | None = None,
        *,
        external: bool = False,
    ) -> OnnxClassifier:
        """Read and prepare a classifier for inference.

        Args:
            path: any ONNX file with one image input, (N, C, H, W) or (N, H, W, C), uint8 or of a float type, whose
                first output is (N, classes).
            threads: CPU threads; 0: all available cores.
            input_size: (H, W, C) to assume where the file leaves height and width open.
            external: also take weights from files that lie beside it.

        Raises:
            KdError: unreadable, over 2 GiB, with weights in other files, or not an image classifier.
        """
        model, file_bytes = read(path, external=external)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        layout, dtype, size = _input_of(path, model, input_size)
        batch = _fixed_batch(path, model, math.prod(size))
        runner = session(serialized(path, model), threads, str(path))
        count = _class_count(path, runner, layout, dtype, size, batch or 1)
        classes, provenance, preprocess = remarks_of(path, metadata, count)
        return cls(
            path=path,
            classes=classes,
            input_size=size,
            provenance=provenance,
            metadata=metadata,
            layout=layout,
            dtype=dtype,
            preprocess=preprocess,
            gives="probabilities" if _ends_in_softmax(model) else "logits",
            batch=batch,
            session=runner,
            model=model,
            file_bytes=file_bytes,
        )

    @property
    def why_not_runnable(self) -> str | None:
        """Why raw images cannot be given to it; None if they can."""
        if self.takes_pixels or self.preprocess is not None:
            return None
        if self.metadata.get("kd.format"):
            return "its preprocessing is too large to be in the file"
        return "it does not say how pixels are prepared"

    def __call__(self, images: Tensor) -> Tensor:
        """Raw images uint8 (B, H, W, C) → logits float32 (B, classes).

        Of a file that gives probabilities these are the logarithms: the logits up to a constant per image.

        Raises:
            KdError: how to prepare the pixels is not known.
        """
        outputs = torch.from_numpy(self.run(self.prepare(images)))
        if self.gives == "logits":
            return outputs
        return outputs.clamp_min(torch.finfo(torch.float32).tiny).log()

    def prepare(self, images: Tensor) -> npt.NDArray[Any]:
        """Raw images uint8 (B, H, W, C) → the array the network takes."""
        if self.takes_pixels:
            return self.laid_out(images.numpy())
        if self.preprocess is None:
            raise KdError(
                f"{self.path} cannot be given images: {self.why_not_runnable}",
                "Export it with kd export --with-preprocessing, or use the .pt file.",
            )
        with torch.inference_mode():
            prepared = self.preprocess(images.permute(0, 3, 1, 2).float())
            return np.ascontiguousarray(prepared.numpy())

    @property
    def takes_pixels(self) -> bool:
        """Whether its input is raw images, so that its preprocessing is inside."""
        return self.dtype == np.uint8

    def laid_out(self, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Images (B, H, W, C) in the order and type of its input, values as they are."""
        ordered = images if self.layout == "NHWC" else images.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(ordered.astype(self.dtype))

    def run(self, inputs: npt.NDArray[Any]) -> _Floats:
        """The network's own input → its first output (B, classes).

        A file with a fixed batch is given that many images, the last time with the first again and again.
        """
        count, step = len(inputs), self.batch or len(inputs)
        if count % step:
            inputs = np.concatenate([inputs, np.repeat(inputs[:1], -count % step, axis=0)])
        name = self.session.get_inputs()[0].name
        try:
            parts = [
                np.asarray(self.session.run(None, {name: inputs[start : start + step]})[0], dtype=np.float32)
                for start in range(0, len(inputs), step)
            ]
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise KdError(
                f"onnxruntime cannot run {self.path} on {step} images: {first_line(error)}"
            ) from error
        return np.concatenate([part.reshape(step, -1) for part in parts])[:count]


_TYPES: dict[int, np.dtype[Any]] = {
    onnx.TensorProto.FLOAT: np.dtype(np.float32),
    onnx.TensorProto.FLOAT16: np.dtype(np.float16),
    onnx.TensorProto.DOUBLE: np.dtype(np.float64),
    onnx.TensorProto.UINT8: np.dtype(np.uint8),
}


def _input_of(
    path: Path, model: onnx.ModelProto, assumed: tuple[int, int, int] | None
) -> tuple[str, np.dtype[Any], tuple[int, int, int]]:
    """Layout, type and (H, W, C) of the one image input."""
    info = image_input(model)
    hint = "kd runs files with one input: (N, C, H, W) or (N, H, W, C), uint8 or a float type."
    if info is None:
        raise KdError(f"{path} does not have exactly one input", hint)
    kind = info.type.tensor_type.elem_type
    sides = [side.dim_value for side in info.type.tensor_type.shape.dim]  # 0: open
    if len(sides) != 4 or kind not in _TYPES:
        raise KdError(f"{path} does not take images", hint)
    layout = layout_of(info)
    height, width, channels = sides[1:] if layout == "NHWC" else (sides[2], sides[3], sides[1])
    if assumed is not None:
        height, width, channels = (
            own or other for own, other in zip((height, width, channels), assumed, strict=True)
        )
    if min(height, width, channels) < 1:
        raise KdError(
            f"{path} does not fix the size of its images", "Export it with a fixed height and width."
        )
    if max(height, width) > MAX_SIDE:
        raise KdError(
            f"{path} takes images of {height}x{width} pixels", f"kd runs files up to {MAX_SIDE:,} a side."
        )
    if channels not in CHANNELS:
        raise KdError(f"{path} takes {channels} channels in {layout} order, which is no image", hint)
    return layout, _TYPES[kind], (height, width, channels)


def _fixed_batch(path: Path, model: onnx.ModelProto, values: int) -> int | None:
    """Images it takes at a time; `values` are one image's."""
    info = image_input(model)
    batch = info.type.tensor_type.shape.dim[0].dim_value if info is not None else 0  # 0: open
    if batch > MAX_BATCH or batch * values > MAX_VALUES:
        raise KdError(
            f"{path} takes {batch} images at a time",
            f"kd runs files that take up to {MAX_BATCH:,} small ones.",
        )
    return batch or None


def _class_count(
    path: Path,
    runner: ort.InferenceSession,
    layout: str,
    dtype: np.dtype[Any],
    size: tuple[int, int, int],
    batch: int,
) -> int:
    """Found by running black images: declared output shapes are often open."""
    height, width, channels = size
    shape = (batch, height, width, channels) if layout == "NHWC" else (batch, channels, height, width)
    black = np.zeros(shape, dtype)
    try:
        outputs = runner.run(None, {runner.get_inputs()[0].name: black})
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise KdError(f"onnxruntime cannot run {path}: {first_line(error)}") from error
    first = np.asarray(outputs[0])
    classes = first.size // batch
    if first.shape[:1] != (batch,) or classes < 2 or not np.issubdtype(first.dtype, np.floating):
        raise KdError(
            f"{path} gives {first.dtype} {first.shape} for {batch} image{'s' if batch > 1 else ''}",
            "A classifier gives float (images, classes).",
        )
    return classes


# What may follow a softmax without making something else of it.
_KEEPS_VALUES = {
    "Cast",
    "DequantizeLinear",
    "Flatten",
    "Identity",
    "QuantizeLinear",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
}


def _ends_in_softmax(model: onnx.ModelProto) -> bool:
    makers = {name: node for node in model.graph.node for name in node.output}
    node = makers.get(model.graph.output[0].name)
    for _ in range(len(makers)):  # a hostile graph may go in circles
        if node is None or node.op_type not in _KEEPS_VALUES or not node.input:
            break
        node = makers.get(node.input[0])
    return node is not None and node.op_type == "Softmax"
