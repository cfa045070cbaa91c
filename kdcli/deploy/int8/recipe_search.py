"""`--int8-recipe auto`: try recipes, compare and time them, and take one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from kdcli.base import metrics
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress, ignore
from kdcli.base.text import first_line
from kdcli.base.timing import Floats, interleaved, median_interval, seconds_of, warm_up
from kdcli.deploy.int8.quantiser import Quantiser
from kdcli.deploy.int8.recipe import RANGES, Recipe
from kdcli.deploy.onnx_model import OnnxRunner

_ROUNDS = 41
_TURN_S = 2e-3  # the fastest model is called this long in each turn
_MAX_CALLS = 100  # in a turn
_AS_FAST = 1.05  # within this factor of the fastest counts as equally fast
_BATCH = 64


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
    quantiser: Quantiser,
    float_model: bytes,
    inputs: npt.NDArray[Any],
    reference: Tensor,
    on_event: OnEvent = ignore,
) -> tuple[tuple[RecipeTrial, ...], onnx.ModelProto | None]:
    """Try seven recipes, and take one by agreement and by speed measured here.

    First the three kinds of ranges; then, with the one that agrees best, each other setting changed. Of those that
    are faster than float32 beyond chance, the fastest whose agreement is within one standard error of the best.

    Args:
        float_model: the float32 file.
        inputs: selection images as the model takes them; used for nothing else.
        reference: the float32 network's outputs for them (N, classes).

    Returns:
        All trials, and the quantised model; None where no recipe is faster than float32.
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
    except Exception as error:  # quantiser and onnxruntime have no exception in common
        problem = error.message if isinstance(error, KdError) else first_line(error)
        return RecipeTrial(str(recipe), problem=problem), b""
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
    """Index of the trial to take; None where none is faster than float32.

    Of equally fast ones the first, so that near ties do not depend on the noise of a timing.
    """
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
