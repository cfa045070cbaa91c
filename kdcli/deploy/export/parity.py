"""Does the file give what the checkpoint gives?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcli.base.errors import KdError
from kdcli.deploy import onnx_model

BATCHES = (1, 2, 7)
TOLERANCE = 1e-4  # of the largest |logit|
_EXPLAINED = 8  # images that are looked into
TIE = 1e-5  # of the largest |logit|: nearer than this, two classes are equally good
_LEAST_LOG = -60.0  # probabilities below e⁻⁶⁰ are all the same nothing


@dataclass(frozen=True)
class Parity:
    """How near the file is to the checkpoint on real images.

    Attributes:
        images: how many.
        batches: batch sizes that were run.
        levels: of onnxruntime's optimisation, each at all of them.
        largest_difference: of any logit (with preprocessing: of any log-probability).
        scale: the largest |logit|; the difference may be 1e-4 of it.
        same_top1: images with the same first class.
        ties: images whose first class differs between two classes that are nearer than 1e-5 of the scale.
    """

    images: int
    batches: tuple[int, ...]
    levels: tuple[str, ...]
    largest_difference: float
    scale: float
    same_top1: int
    ties: int


def check_parity(
    path: Path,
    inputs: npt.NDArray[Any],
    logits: Tensor,
    probabilities: bool,
    explain: Callable[[npt.NDArray[Any], str], str | None] = lambda inputs, level: None,
    batches: tuple[int, ...] = BATCHES,
) -> tuple[Tensor, Parity]:
    """Run a file on real images, at each level of optimisation, and compare with the checkpoint's logits.

    Args:
        path: the file as it lies on disk.
        inputs: its input for all images.
        logits: the checkpoint's, float32 (N, classes).
        probabilities: the file gives probabilities; their logarithms are compared, which hides nothing.
        batches: images a run; the last is the one for all images.
        explain: names the layer where images and level first give something else.

    Returns:
        The file's logits or log-probabilities (N, classes), and the figures.

    Raises:
        KdError: a value is off by more than 1e-4 of the logits' scale, or a first class differs and is no
            tie.
    """
    content = path.read_bytes()
    expected = logits.double()
    if probabilities:
        expected = expected.log_softmax(dim=1).clamp_min(_LEAST_LOG)
    scale = logits.abs().max().item()
    largest = 0.0
    whole: Tensor = expected
    for level, batch in product(onnx_model.LEVELS, batches):
        if batch == batches[0]:
            runner = onnx_model.session(content, name="the exported file", level=level)
        last = level == "all" and batch == max(batches)  # as the file will be run: on all images
        count = len(inputs) if last else min(len(inputs), 4 * batch)
        outputs = run(runner, inputs[:count], batch, probabilities)
        if outputs.shape != expected[:count].shape:
            raise KdError(
                f"the exported file gives {tuple(outputs.shape)} instead of {tuple(expected.shape)}"
            )
        difference = (outputs.double() - expected[:count]).abs().max().item()
        if not difference <= TOLERANCE * scale + 1e-12:  # NaN fails too
            layer = explain(inputs[:count][:_EXPLAINED], level)
            where = f", first in layer {layer}" if layer else ""
            raise KdError(
                f"the exported network differs from the checkpoint by {difference:.2g} at batch {batch}, "
                f"optimisation {level}{where} (allowed: {TOLERANCE * scale:.2g}); no file was written",
                "Try another --opset, or another onnxruntime version.",
            )
        largest = max(largest, difference)
        whole = outputs
    mine, theirs = expected.argmax(dim=1), whole.argmax(dim=1)
    margin = expected.max(dim=1).values - expected.gather(1, theirs[:, None])[:, 0]
    differs = mine != theirs
    ties = differs & (margin <= TIE * scale)
    if bool((differs & ~ties).any()):
        wrong = int((differs & ~ties).sum())
        raise KdError(
            f"the exported network gives another class than the checkpoint for {wrong} of {len(inputs)} "
            "images; no file was written",
            "Try another --opset, or another onnxruntime version.",
        )
    return whole, Parity(
        images=len(inputs),
        batches=batches,
        levels=tuple(onnx_model.LEVELS),
        largest_difference=largest,
        scale=scale,
        same_top1=len(inputs) - int(differs.sum()),
        ties=int(ties.sum()),
    )


def run(runner: Any, inputs: npt.NDArray[Any], batch: int, probabilities: bool) -> Tensor:
    """A file's outputs (N, classes), `batch` images at a time; of probabilities their logarithms.

    A file that takes a fixed number is given that many, the last time with the first image again and again.
    """
    [taken] = runner.get_inputs()
    count = len(inputs)
    if isinstance(taken.shape[0], int):
        batch = taken.shape[0]
        inputs = np.concatenate([inputs, np.repeat(inputs[:1], -count % batch, axis=0)])
    try:
        parts = [
            runner.run(None, {taken.name: inputs[start : start + batch]})[0]
            for start in range(0, len(inputs), batch)
        ]
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise KdError(
            f"onnxruntime cannot run the exported file at batch {batch}: {str(error).splitlines()[0][:300]}"
        ) from error
    outputs = torch.from_numpy(np.concatenate(parts)[:count])
    return outputs.double().log().clamp_min(_LEAST_LOG) if probabilities else outputs
