"""Comparison of an exported file's outputs with its checkpoint's, and layer by layer where they differ."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.deploy.onnx_model import LEVELS, OnnxRunner
from kdcli.deploy.onnx_model.translate import scopes_of

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
    levels: tuple[str, ...]  # graph optimisation levels of onnxruntime, each run at all batch sizes
    largest_difference: float  # of any logit (with preprocessing: of any log-probability)
    scale: float  # the largest |logit|; the difference may be 1e-4 of it
    same_top1: int  # images with the same top-1 class
    ties: int  # images whose top-1 class differs between two classes that are nearer than 1e-5 of the scale


def check_parity(
    content: bytes,
    inputs: npt.NDArray[Any],
    logits: Tensor,
    *,
    probabilities: bool,
    batches: tuple[int, ...] = BATCHES,
    find_layer: Callable[[npt.NDArray[Any], str], str | None] = lambda inputs, level: None,
) -> tuple[Tensor, Parity]:
    """Run a file on real images at each optimisation level, and compare with the checkpoint's logits.

    Args:
        content: the file.
        inputs: its input for all images.
        logits: the checkpoint's, float32 (N, classes).
        probabilities: the file gives probabilities; their logarithms are compared.
        batches: batch sizes; all images are run at the largest, some at the others.
        find_layer: names the first layer that differs for given inputs and level.

    Returns:
        The file's logits or log-probabilities (N, classes), and the figures.

    Raises:
        KdError: a value is off by more than 1e-4 of the logits' scale, or a top-1 class differs beyond a tie.
    """
    expected = logits.double()
    if probabilities:
        expected = expected.log_softmax(dim=1).clamp_min(_LEAST_LOG)
    scale = logits.abs().max().item()
    largest = 0.0
    outputs = expected
    runners = {level: OnnxRunner(content, name="the exported file", level=level) for level in LEVELS}
    for level, batch in product(LEVELS, batches):
        complete = level == "all" and batch == max(batches)
        count = len(inputs) if complete else min(len(inputs), 4 * batch)
        outputs = run(runners[level], inputs[:count], batch, probabilities=probabilities)
        difference = (outputs.double() - expected[:count]).abs().max().item()
        if not difference <= TOLERANCE * scale + 1e-12:  # NaN fails too
            layer = find_layer(inputs[:count][:_LAYER_IMAGES], level)
            raise KdError(
                f"the exported network differs from the checkpoint by {difference:.2g} at batch {batch}, "
                f"optimisation {level}{f', first in layer {layer}' if layer else ''} "
                f"(allowed: {TOLERANCE * scale:.2g}); no file was written",
                _HINT,
            )
        largest = max(largest, difference)
    differ, ties = _compare_top1(expected, outputs, scale)
    return outputs, Parity(
        images=len(inputs),
        batches=batches,
        levels=tuple(LEVELS),
        largest_difference=largest,
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
    """Name the first layer whose output in the file differs from the checkpoint's.

    Args:
        module: the checkpoint's module, from `inputs` to the file's output.
        translated: the model as torch's exporter made it, with the module scopes of its nodes.

    Returns:
        `conv2`, or `features.0 and features.1` of layers that are one operation in the file; None where each layer
        agrees, or its values cannot be read from the file.
    """
    expected = _module_outputs(module, inputs)
    value_of: dict[str, str] = {}  # name of the value that the last node of each module produces
    for node in translated.graph.node:
        for name in expected.keys() & _QUOTED.findall(scopes_of(node)):
            value_of[name] = node.output[0]
    if not value_of:
        return None
    try:
        actual = _file_values(content, list(value_of.values()), inputs, level)
    except KdError:
        return None
    merged: list[str] = []  # layers without an operation of their own: part of the next one's
    for name, wanted in expected.items():
        if name not in value_of:
            merged.append(name)
            continue
        value = actual[value_of[name]]
        bound = TOLERANCE * wanted.abs().max().item()  # a comparison with NaN is false
        if value.shape == wanted.shape and not (value.double() - wanted).abs().max().item() <= bound:
            return " and ".join(layer.removeprefix("network.") for layer in (*merged, name))
        merged = []
    return None


def _module_outputs(module: nn.Module, inputs: npt.NDArray[Any]) -> dict[str, Tensor]:
    """Output of each leaf module, float64, in the order they run."""
    outputs: dict[str, Tensor] = {}
    names = {part: name for name, part in module.named_modules()}

    def record(part: nn.Module, given: Any, output: Tensor) -> None:
        outputs.pop(names[part], None)  # a module that runs twice counts where it runs last
        outputs[names[part]] = output.double()

    handles = [part.register_forward_hook(record) for part in names if not any(part.children())]
    try:
        with torch.inference_mode():
            module(torch.from_numpy(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _file_values(content: bytes, names: list[str], inputs: npt.NDArray[Any], level: str) -> dict[str, Tensor]:
    """Intermediate values of a file by name."""
    model = onnx.ModelProto.FromString(content)
    outputs = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    values = OnnxRunner(model.SerializeToString(), level=level).outputs(names, inputs)
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
