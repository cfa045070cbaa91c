"""Which int8 form of a network is worth having here: tried, compared and timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from scipy import stats
from torch import Tensor

from kdcli.base import metrics
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress, ignore
from kdcli.deploy import onnx_model
from kdcli.deploy.int8.recipe import OF_EACH_RANGES, Recipe
from kdcli.deploy.int8.static import Quantiser

ROUNDS = 41
_CALL_S = 2e-3  # a timing takes at least this long, in as many calls as that needs
_AS_FAST = 1.05  # nearer to the fastest than this is as fast
_BATCH = 64


@dataclass(frozen=True)
class Trial:
    """One recipe, tried.

    Attributes:
        recipe: its name.
        agreement: per cent of the selection images with the float32 network's first class; None: it failed.
        speedup: median over rounds of float32's time ÷ its own, one image at a time.
        speedup_interval: 95 % interval of that median, from its order statistics.
        chosen: whether it was taken.
        problem: why it was out of the question.
    """

    recipe: str
    agreement: float | None = None
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None
    chosen: bool = False
    problem: str | None = None


def search(
    quantiser: Quantiser,
    float_model: bytes,
    inputs: npt.NDArray[Any],
    reference: Tensor,
    on_event: OnEvent = ignore,
) -> tuple[tuple[Trial, ...], onnx.ModelProto | None]:
    """Try recipes, and take one by agreement and by speed measured here.

    The three ways of finding ranges are tried first; then, with the one that agrees best, one scale for a whole
    tensor, signed activations, a first and a last layer in float32. In question is only what is faster than
    float32 beyond chance; of that, what agrees best up to one standard error; of that, the fastest.

    Args:
        float_model: the float32 file.
        inputs: selection images as the model takes them; neither calibration nor the final figures use them.
        reference: the float32 network's outputs for them (N, classes).

    Returns:
        All trials, and the quantised model; None where no recipe is faster than float32.
    """
    count = len(OF_EACH_RANGES) + len(Recipe().variants())
    made: list[tuple[Trial, bytes]] = []

    def attempt(recipe: Recipe) -> None:
        on_event(Progress("trying int8 recipes", len(made), count, "recipes"))
        try:
            content = quantiser.make(recipe).SerializeToString(deterministic=True)
            runner = onnx_model.session(content, name=f"int8 by {recipe}")
            name = runner.get_inputs()[0].name
            parts = [
                runner.run(None, {name: inputs[start : start + _BATCH]})[0]
                for start in range(0, len(inputs), _BATCH)
            ]
        except Exception as error:  # quantiser and onnxruntime have no exception in common
            text = error.message if isinstance(error, KdError) else str(error)
            made.append((Trial(str(recipe), problem=(text.strip() or "failed").splitlines()[0][:200]), b""))
            return
        outputs = torch.from_numpy(np.concatenate(parts))
        if not bool(torch.isfinite(outputs).all()):
            made.append((Trial(str(recipe), problem="it gives values that are not finite"), b""))
            return
        made.append((Trial(str(recipe), metrics.agreement(outputs, reference)), content))

    for recipe in OF_EACH_RANGES:
        attempt(recipe)
    best = max(range(len(made)), key=lambda index: made[index][0].agreement or -1.0)
    for recipe in OF_EACH_RANGES[best].variants():
        attempt(recipe)
    on_event(Progress("trying int8 recipes", count, count, "recipes"))
    working = [index for index, (trial, _) in enumerate(made) if trial.agreement is not None]
    models = [float_model, *(made[index][1] for index in working)]
    seconds = timed([_single(content, inputs[:1]) for content in models], on_event)
    trials = [trial for trial, _ in made]
    for column, index in enumerate(working, 1):
        low, middle, high = median_interval(seconds[:, 0] / seconds[:, column])
        trials[index] = replace(trials[index], speedup=middle, speedup_interval=(low, high))
    taken = choose(trials, len(inputs))
    if taken is None:
        return tuple(trials), None
    trials[taken] = replace(trials[taken], chosen=True)
    model = onnx.ModelProto()
    model.ParseFromString(made[taken][1])
    return tuple(trials), model


def choose(trials: Sequence[Trial], images: int) -> int | None:
    """Number of the trial to take; None where none is faster than float32.

    Of what is as fast, the earlier: near ties would otherwise be settled by the noise of a timing.
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
    agreeing = [one for one in faster if one[1] >= 100 * best - error]
    fastest = max(speedup for _, _, speedup in agreeing)
    return next(index for index, _, speedup in agreeing if speedup >= fastest / _AS_FAST)


def timed(
    calls: Sequence[Callable[[], Any]], on_event: OnEvent = ignore, rounds: int = ROUNDS
) -> npt.NDArray[np.float64]:
    """Seconds of a call, (rounds, calls): all of them in each round, in random order, warmed up."""
    repeats = []
    for call in calls:
        for _ in range(3):
            call()
        begin = time.perf_counter()
        call()
        repeats.append(max(1, math.ceil(_CALL_S / max(time.perf_counter() - begin, 1e-7))))
    order = np.random.default_rng(0)
    seconds = np.zeros((rounds, len(calls)))
    for number in range(rounds):
        for index in order.permutation(len(calls)):
            calls[index]()  # untimed: what ran before it has had the caches
            begin = time.perf_counter()
            for _ in range(repeats[index]):
                calls[index]()
            seconds[number, index] = (time.perf_counter() - begin) / repeats[index]
        on_event(Progress("timing int8 recipes", number + 1, rounds, "rounds"))
    return seconds


def median_interval(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """A median between the bounds of its 95 % interval, which the order statistics give without any assumption.

    The number of values below the true median is binomial with probability ½.
    """
    ordered = np.sort(values)
    below = int(stats.binom.ppf(0.025, len(ordered), 0.5)) - 1
    below = max(below, 0)
    return float(ordered[below]), float(np.median(ordered)), float(ordered[-1 - below])


def _single(content: bytes, inputs: npt.NDArray[Any]) -> Callable[[], Any]:
    runner = onnx_model.session(content)
    name = runner.get_inputs()[0].name
    return lambda: runner.run(None, {name: inputs})
