"""Untrusted ONNX files as classifiers."""

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from kdcli.base.config import NO_ASSUMPTIONS, InputSettings
from kdcli.base.errors import KdError
from kdcli.base.text import dims
from kdcli.data.decode import checked_resize
from kdcli.data.preprocess import Preprocess, to_pixels
from kdcli.deploy.onnx_model.counts import count_model
from kdcli.deploy.onnx_model.form import check_alone, choose_output, form_of_outputs, input_form
from kdcli.deploy.onnx_model.metadata import (
    FORMAT_KEY,
    assumed_preprocess,
    class_names,
    invalid,
    parse_metadata,
    with_declared,
)
from kdcli.deploy.onnx_model.reading import read_model
from kdcli.deploy.onnx_model.runner import OnnxRunner
from kdcli.models.class_map import ClassMap
from kdcli.models.layers import ModelCounts

_LEAST_SIGMOID = 1e-7  # and that far from 1: float32 rounds others to 1
_PROBES = 3  # random images that a file is run on when it is read
_Size = tuple[int, int, int]


@dataclass(frozen=True)
class OnnxClassifier:
    """An ONNX file with the interface of `kdcli.models.Classifier`."""

    path: Path
    classes: tuple[str, ...]  # names in the order of the logits; numbers if none are known
    input_size: _Size  # (H, W, C) of the raw images
    resize: int  # pixels of the shorter side of images before the centre crop, see `data.decode.resize`; 0: no crop
    provenance: dict[str, Any]  # as kd export recorded it; else `class_names`, the names' source, if known
    metadata: dict[str, str]
    layout: str  # NCHW or NHWC
    dtype: np.dtype[Any]  # of its input; uint8 means raw images
    preprocess: Preprocess | None  # raw pixels → its input; None if unknown, or inside the file (uint8)
    gives: str  # logits, probabilities (their logarithms are logits) or sigmoids (of logits)
    runner: OnnxRunner = field(repr=False)
    model: onnx.ModelProto = field(repr=False)
    file_bytes: int  # of the file and of external files with its weights
    assumed: InputSettings  # its input, as set by the user or declared in the file
    file_sha256: str  # of the file, as it was read
    class_map: ClassMap | None = None  # from its outputs to `classes`; None where these are its outputs

    @classmethod
    def load(
        cls,
        path: Path,
        threads: int = 0,
        assumed: InputSettings = NO_ASSUMPTIONS,
        input_size: _Size | None = None,
        *,
        external: bool = False,
    ) -> Self:
        """Read a classifier; a KdError if it is unreadable, beyond the limits of `read_model`, or no classifier.

        Args:
            path: any ONNX file with one image input, (N, C, H, W) or (N, H, W, C), uint8 or of a float type, with
                an output (N, classes).
            threads: CPU threads; 0: all available cores.
            assumed: what a file of another program leaves open; unread for a file of kd export.
            input_size: (H, W, C) of the images at hand, where file and `assumed` leave sides open.
            external: accept weights in other files of the same folder.
        """
        # 1. The file, and its input as declared or assumed
        model, file_bytes, sha256 = read_model(path, external=external)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        foreign = FORMAT_KEY not in metadata
        assumed = with_declared(path, metadata, assumed) if foreign else NO_ASSUMPTIONS
        form = input_form(path, model, metadata, assumed, input_size)
        if foreign:
            about: dict[str, Any] = {"provenance": {}, "input_size": form.size}
            about["resize"] = checked_resize(assumed.resize, *form.size[:2])
            about["preprocess"] = assumed_preprocess(path, assumed, form)
        else:
            about = parse_metadata(path, metadata)
        # 2. Its output, on random images
        runner = OnnxRunner(model.SerializeToString(), threads, str(path))
        found = cls(
            path=path,
            classes=(),
            metadata=metadata,
            layout=form.layout,
            dtype=form.dtype,
            gives="logits",
            runner=runner,
            model=model,
            file_bytes=file_bytes,
            assumed=assumed,
            file_sha256=sha256,
            **about,
        )
        if found.network_size != form.size:
            raise invalid(path, ValueError(f"images of {dims(found.input_size)}"))
        outputs = found._probe()
        # 3. Its classes
        classes, source = class_names(path, metadata, outputs.shape[1], assumed)
        if source:
            found.provenance["class_names"] = source
        return replace(found, classes=classes, gives=form_of_outputs(model, runner.output, outputs))

    def _probe(self) -> npt.NDArray[Any]:
        """Outputs (3, classes) for random images, one of them dark, one bright; selects the output that is read."""
        shape = (_PROBES, *self.network_size)
        random = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
        pixels[1] //= 4
        pixels[2] = 255 - pixels[2] // 4
        try:
            unknown = self.why_not_runnable is not None
            inputs = self.to_layout((pixels / 255).numpy()) if unknown else self.prepare(pixels)
        except RuntimeError as error:  # torch, on constants of other sides than the image's
            raise invalid(self.path, error) from error
        runner = self.runner
        if self.is_foreign:
            count = runner.batch or 1
            one = np.repeat(inputs[:1], count, axis=0)
            names = runner.tensors
            values = dict(zip(names, runner.outputs(names, one), strict=True))
            runner.output = choose_output(self.path, values, count)
        dynamic = any(node.op_type == "DynamicQuantizeLinear" for node in self.model.graph.node)
        return check_alone(self.path, runner, inputs, dynamic=dynamic)

    @property
    def any_size(self) -> bool:
        """Whether it takes images of any size."""
        return self.preprocess is not None and self.preprocess.resizes and not self.takes_pixels

    @property
    def network_size(self) -> _Size:
        """(H, W, C) of its input."""
        if self.preprocess is None or self.takes_pixels:
            return self.input_size
        return self.preprocess.output_size(self.input_size)

    @property
    def why_not_runnable(self) -> str | None:
        """Why it cannot take raw images; None if it can."""
        if self.takes_pixels or self.preprocess is not None:
            return None
        if not self.is_foreign:
            return "its preprocessing is too large to be in the file"
        return "no preprocessing recorded (mean, std, channel order)"

    @property
    def is_foreign(self) -> bool:
        """Whether another program made it."""
        return FORMAT_KEY not in self.metadata

    @property
    def takes_pixels(self) -> bool:
        """Whether its input is raw images: its preprocessing is inside."""
        return self.dtype == np.uint8

    def counts(self) -> ModelCounts:
        height, width, channels = self.network_size
        nchw = (channels, height, width)
        return count_model(self.model, self.network_size if self.layout == "NHWC" else nchw)

    def __call__(self, images: Tensor) -> Tensor:
        """Raw images uint8 (B, H, W, C) → logits float32 (B, classes); a KdError if its preprocessing is unknown.

        Of probabilities these are the logarithms, the logits up to a constant per image; of sigmoids the inverse.
        """
        logits = torch.from_numpy(self.run(self.prepare(images)))
        if self.gives == "probabilities":
            logits = logits.clamp_min(torch.finfo(torch.float32).tiny).log()
        elif self.gives == "sigmoids":
            logits = logits.double().logit(_LEAST_SIGMOID).float()
        return logits if self.class_map is None else self.class_map(logits)

    def prepare(self, images: Tensor) -> npt.NDArray[Any]:
        """Raw images uint8 (B, H, W, C) → the network's input."""
        if self.takes_pixels:
            ordered = images.flip(3) if self.assumed.channel_order == "bgr" else images
            return self.to_layout(ordered.numpy())
        if self.preprocess is None:
            raise KdError(
                f"{self.path} cannot take images: {self.why_not_runnable}",
                self._input_hint,
            )
        with torch.inference_mode():
            prepared = self.preprocess(to_pixels(images))  # (B, C, H, W)
        return self.to_layout(prepared.permute(0, 2, 3, 1).numpy())

    @property
    def _input_hint(self) -> str:
        if not self.is_foreign:
            return "Export it with --with-preprocessing, or use the .pt file."
        flag = self.assumed.flag
        return (
            f"Set its input, (pixel · scale − mean) / std: as ImageNet's networks {flag('scale')} 1/255 "
            f"{flag('mean')} 0.485,0.456,0.406 {flag('std')} 0.229,0.224,0.225; 0–1 pixels: {flag('scale')} 1/255; "
            f"raw pixels: {flag('scale')} 1. Try these on labelled images: "
            f"kd validate --teacher {shlex.quote(self.path.as_posix())} --probe"
        )

    def to_layout(self, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Images (B, H, W, C) in the layout and type of its input, values unchanged."""
        ordered = images if self.layout == "NHWC" else images.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(ordered, self.dtype)

    def run(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The network's own input → its output float32 (B, classes)."""
        outputs = self.runner.run(inputs)
        return outputs.reshape(len(inputs), -1).astype(np.float32)
