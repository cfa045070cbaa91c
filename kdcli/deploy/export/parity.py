"""Comparison of an exported file's outputs with its checkpoint's, and layer by layer where they differ."""

import re
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.deploy.onnx_model import LEVELS, OnnxRunner
from kdcli.deploy.onnx_model.translate import ExportedModule, scopes_of
from kdcli.models.layers import run_with_hooks

BATCHES = (1, 2, 7)
TOLERANCE = 1e-4  # of the largest |logit|
TIE = 1e-5  # of the largest |logit|: classes nearer than this are tied
_LAYER_IMAGES = 8  # for the layer-wise comparison
_LEAST_LOG = -60.0  # log-probabilities are clamped here: e⁻⁶⁰ and below count as equal
_QUOTED = re.compile(r"'([^']*)'")
_HINT = "Try another --opset, or another onnxruntime version."


@dataclass(frozen=True)
class Parity:
    """How close the file is to the checkpoint on real images."""

    images: int  # number of images
    batches: tuple[int, ...]  # batch sizes that were run
    largest_difference: float  # of any logit (with preprocessing: of any log-probability)
    scale: float  # the largest |logit|; the difference may be 1e-4 of it
    same_top1: int  # images with the same top-1 class
    ties: int  # images whose top-1 class differs between two classes that are nearer than 1e-5 of the scale


def check_parity(
    content: bytes,
    module: ExportedModule,
    translated: onnx.ModelProto,
    inputs: npt.NDArray[Any],
    logits: Tensor,
    batches: tuple[int, ...],
) -> tuple[Tensor, Parity]:
    """Run a file on real images at each optimisation level, and compare with the checkpoint's logits (N, classes).

    A KdError if a value is off by more than 1e-4 of the logits' scale, or a top-1 class differs beyond a tie. All
    images are run at the largest batch size, some at the others. `translated`, as torch's exporter made it, serves
    to name the first layer that differs. Returns the file's logits or log-probabilities (N, classes), and figures.
    """
    probabilities = module.preprocess is not None
    expected = logits.double()
    if probabilities:
        expected = expected.log_softmax(dim=1).clamp_min(_LEAST_LOG)
    scale = logits.abs().max().item()
    differences: list[float] = []

    def outputs_of(level: str, batch: int, count: int) -> Tensor:
        """Outputs for the first images; a KdError if one differs from the checkpoint's."""
        outputs = run(runners[level], inputs[:count], batch, probabilities=probabilities)
        difference = (outputs.double() - expected[:count]).abs().max().item()
        if not difference <= TOLERANCE * scale + 1e-12:  # NaN fails too
            layer = first_differing_layer(module, translated, content, inputs[:count][:_LAYER_IMAGES], level)
            raise KdError(
                f"the exported network differs from the checkpoint by {difference:.2g} at batch {batch}, "
                f"optimisation {level}{f', first in layer {layer}' if layer else ''} "
                f"(allowed: {TOLERANCE * scale:.2g}); no file was written",
                _HINT,
            )
        differences.append(difference)
        return outputs

    runners = {level: OnnxRunner(content, name="the exported file", level=level) for level in LEVELS}
    for level, batch in product(LEVELS, batches):
        outputs_of(level, batch, 4 * batch)
    outputs = outputs_of("all", max(batches), len(inputs))
    differ, ties = _compare_top1(expected, outputs, scale)
    return outputs, Parity(
        images=len(inputs),
        batches=batches,
        largest_difference=max(differences),
        scale=scale,
        same_top1=len(inputs) - differ,
        ties=ties,
    )


def _compare_top1(expected: Tensor, outputs: Tensor, scale: float) -> tuple[int, int]:
    """Number of images whose top-1 class differs, and of ties among them; a KdError if one is no tie."""
    theirs = outputs.argmax(dim=1)
    margin = expected.max(dim=1).values - expected.gather(1, theirs[:, None])[:, 0]
    differs = expected.argmax(dim=1) != theirs
    ties = differs & (margin <= TIE * scale)
    wrong = int((differs & ~ties).sum())
    if wrong:
        raise KdError(
            f"the exported network gives another class than the checkpoint for {wrong} of {len(outputs)} "
            "images; no file was written",
            _HINT,
        )
    return int(differs.sum()), int(ties.sum())


def run(runner: OnnxRunner, inputs: npt.NDArray[Any], batch: int, *, probabilities: bool) -> Tensor:
    """A file's logits or log-probabilities (N, classes), `batch` images at a time."""
    outputs = torch.from_numpy(runner.run(inputs, batch))
    return outputs.double().log().clamp_min(_LEAST_LOG) if probabilities else outputs


def first_differing_layer(
    module: nn.Module, translated: onnx.ModelProto, content: bytes, inputs: npt.NDArray[Any], level: str
) -> str | None:
    """Name the first layer whose output in the file differs from the checkpoint's, such as `conv2`.

    `features.0 and features.1` are layers that are one operation in the file. None where all agree, or their values
    cannot be read.
    """
    # 1. The output of each module without children, in the order they run.
    expected: dict[str, Tensor] = {}

    def record(name: str, part: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not any(part.children()):
            expected.pop(name, None)  # a module that runs twice counts where it runs last
            expected[name] = output.double()

    run_with_hooks(module, torch.from_numpy(inputs), record)

    # 2. The values of the file that correspond to them.
    value_of: dict[str, str] = {}  # name of the value that the last node of each module produces
    for node in translated.graph.node:
        for name in expected.keys() & _QUOTED.findall(scopes_of(node)):
            value_of[name] = node.output[0]
    model = onnx.ModelProto.FromString(content)
    names = set(value_of.values()) - {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        runner = OnnxRunner(model.SerializeToString(), level=level)
        values = runner.outputs(list(value_of.values()), inputs)
    except KdError:
        return None
    actual = dict(zip(value_of, values, strict=False))  # all outputs, where no name was given

    # 3. The first pair that differs.
    merged: list[str] = []  # layers without an operation of their own: part of the next one's
    for name, wanted in expected.items():
        merged.append(name)
        if name in actual:
            value = torch.from_numpy(actual[name]).double()
            bound = TOLERANCE * wanted.abs().max().item()  # a comparison with NaN is false
            if value.shape == wanted.shape and not (value - wanted).abs().max().item() <= bound:
                return " and ".join(layer.removeprefix("network.") for layer in merged)
            merged = []
    return None
