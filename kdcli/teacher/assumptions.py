"""A model on labelled images: accuracy against chance, and which assumption about a foreign file fits them better."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcli import models
from kdcli.base import metrics
from kdcli.base.config import InputSettings, TeacherInputs, option_flag
from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent
from kdcli.data import ImageSet, augment
from kdcli.data.catalog import KNOWN_WEIGHTS
from kdcli.data.images import NO_LABEL, knows_names
from kdcli.data.preprocess import MeanStd, Photo, Preprocess, to_pixels
from kdcli.models import Classifier

_SAMPLE = 512
_FIRST = 128  # images after which an alternative that is no better is given up
_STEP = 16  # images after which it is given up earlier if it cannot become better on these
_SHOWN = 6  # class names in a message
_TYPED = 30  # class names in a command
_PRETRAINED = "pretrained"
_SCALES = {  # common scales of a network's input, in RGB order
    "pixels 0–255": InputSettings(scale="1"),
    "pixels 0–1": InputSettings(scale="1/255"),
    "pixels −1–1": InputSettings(scale="1/127.5", mean="1"),
    "pixels 0–255 less ImageNet's mean": InputSettings(scale="1", mean="123.675,116.28,103.53"),
    "ImageNet's mean and standard deviation": InputSettings(
        scale="1/255", mean="0.485,0.456,0.406", std="0.229,0.224,0.225"
    ),
}


@dataclass(frozen=True)
class Assumption:
    """Accuracy of a model under an assumption about its input and classes."""

    text: str  # description; empty for what the model was loaded with
    options: dict[str, str]  # what sets it, by name
    by_text: bool  # whether its classes are sorted as texts, 10 before 2
    count: int  # number of images
    accuracy: float
    interval: tuple[float, float]  # 95 %, in per cent


def check(
    name: str, model: Any, data: ImageSet, on_event: OnEvent, *, task: str, strict: bool = False
) -> None:
    """Note an assumption about a foreign model that fits labelled images clearly better than the one in use.

    With `strict` also models that kd made are measured, and a foreign one near chance, or right more than
    twice as often under another assumption, is a KdError.
    """
    foreign = is_foreign(model)
    found = measure(model, data, task, on_event) if foreign or strict else []
    if not found:
        return
    now, best = found[0], max(found, key=lambda each: each.accuracy)
    classes = len(data.classes)
    near_chance = is_near_chance(now.interval, classes)
    clear = best.interval[0] > now.interval[1]
    text = _measured(name, now.accuracy, now.interval, now.count, classes)
    remedy = advice(model, data, best) if clear else _causes(model)
    if strict and foreign and (near_chance or best.interval[0] > 2 * now.interval[1]):
        raise KdError(text, remedy)
    if clear:
        on_event(Note(f"{text}. {remedy}"))
    elif near_chance:
        on_event(Note(f"{text}: near chance. {remedy if foreign else 'A student learns little from it.'}"))


def check_outputs(name: str, logits: npt.NDArray[np.float32], data: ImageSet) -> None:
    """Raise KdError if another program's outputs (N, classes) for these images are near chance."""
    samples, classes = sample_of(data), len(data.classes)
    accuracy = metrics.accuracy(torch.from_numpy(logits[samples]), torch.from_numpy(data.labels[samples]))
    interval = metrics.wilson_interval(accuracy, len(samples))
    if is_near_chance(interval, classes):
        raise KdError(
            _measured(name, accuracy, interval, len(samples), classes),
            "Likely causes: another order of classes, or rows of other images.",
        )


def _measured(name: str, accuracy: float, interval: tuple[float, float], count: int, classes: int) -> str:
    return (
        f"{name}: accuracy {accuracy:.1f} % on {count} labelled images "
        f"(95 % interval {interval[0]:.1f}–{interval[1]:.1f}; chance {100 / classes:.1f})"
    )


def probe(name: str, model: Any, data: ImageSet, task: str, on_event: OnEvent) -> list[Assumption]:
    """Likely forms of the input of another program's ONNX file, the best first; a KdError if all are near chance."""
    found = measure(model, data, task, on_event) if _is_settable(model) else []
    if not found:
        raise KdError(
            f"{name} records its own input" if len(data) else "there are no labelled images",
            "--probe is for ONNX files of other programs, on labelled images.",
        )
    found.sort(key=lambda each: -each.accuracy)
    best = found[0]
    if is_near_chance(best.interval, len(data.classes)):
        raise KdError(
            f"{name} is near chance with each likely input: best accuracy {best.accuracy:.1f} % "
            f"on {best.count} images, with {best.text or 'its own'}",
            f"Likely causes: another order of classes ({_flag(model)('class_names')}), or other data.",
        )
    return found


def note_order(name: str, model: Any, data: ImageSet, on_event: OnEvent) -> None:
    """Note how classes were matched; for a model without class names, that other programs sort them as texts."""
    if model.class_map is not None:
        on_event(Note(f"{name}: {model.class_map.text}"))
    if is_foreign(model) and _order_is_assumed(model):
        by_text = sorted(data.classes)
        if list(data.classes) != by_text:
            usual = f"other programs often sort them as texts: {_listed(by_text)}"
            on_event(
                Note(
                    f"{name} names no classes: they are taken for {_listed(data.classes)} in this order; {usual}"
                )
            )


def _order_is_assumed(model: Any) -> bool:
    """Whether no file gives the order of classes: Caffe's never do, their names are those of the data."""
    return not knows_names(model) or not hasattr(model, "metadata")


def _listed(names: Any) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return shown + (", …" if len(names) > _SHOWN else "")


def advice(model: Any, data: ImageSet, best: Assumption) -> str:
    """What to set for an assumption."""
    flag, settable = _flag(model), _is_settable(model)
    words = [f"{flag(option)} {value}" for option, value in best.options.items()]
    steps = []
    if best.by_text and settable:
        names = sorted(data.classes)
        listed = f"printf '%s\\n' {shlex.join(names)} > classes.txt"
        steps.append(listed if len(names) <= _TYPED else "list their names so, one a line, in classes.txt")
        words.append(f"{flag('class_names')} classes.txt")
    elif best.by_text:
        steps.append("name the folders of the classes so that both orders are one, as 01, 02, …")
    if words:
        steps.append(f"{'add' if settable else 'convert it again with'} {' '.join(words)}")
    low, high = best.interval
    return (
        f"With {best.text} its accuracy is {best.accuracy:.1f} % ({low:.1f}–{high:.1f}): {'; '.join(steps)}"
    )


def _causes(model: Any) -> str:
    if not _is_settable(model):
        return "Likely causes: another order of classes or channels, or other preprocessing; see kd convert-caffe."
    flag = _flag(model)
    return (
        f"Likely causes: another order of classes ({flag('class_names')}) or of channels ({flag('channel_order')}), "
        f"another scale of pixels ({flag('scale')}, {flag('mean')}, {flag('std')}), or other data."
    )


def _is_settable(model: Any) -> bool:
    """Whether options of a command set the model's input and classes: those of other files are recorded in them."""
    return bool(model.is_foreign) or _is_pretrained(model)


def _is_pretrained(model: Any) -> bool:
    """Whether it was made from a network and weights that were named as teacher, see `deploy.pretrained`."""
    return bool(model.provenance.get("kind") == _PRETRAINED)


def _flag(model: Any) -> Callable[[str], str]:
    assumed = TeacherInputs() if _is_pretrained(model) else getattr(model, "assumed", None)
    return option_flag if assumed is None else assumed.flag


def sample_of(data: ImageSet, count: int = _SAMPLE) -> npt.NDArray[np.int64]:
    """At most `count` labelled images, equally many of each class if there are, in any first part of them too."""
    labelled = np.flatnonzero(data.labels != NO_LABEL)
    shuffled = labelled[augment.order(0, augment.SPLIT_EPOCH, np.arange(len(labelled)))]
    by_class = shuffled[np.argsort(data.labels[shuffled], kind="stable")]
    _, starts, sizes = np.unique(data.labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(by_class)) - np.repeat(starts, sizes)  # of each image in its class
    return by_class[np.argsort(rank, kind="stable")][:count]


def is_near_chance(interval: tuple[float, float], classes: int) -> bool:
    """Whether an accuracy is near chance: below 3 times chance, or 20 % of the way from chance to 100 %.

    The upper end of the interval counts. Of hundreds of classes, where these are below what 512 images can show, also
    one below 5 % whose lower end is below 1.5 times chance.
    """
    chance = 100 / classes
    most = min(3 * chance, chance + 0.2 * (100 - chance))
    return interval[1] < most or (interval[1] < 5 and interval[0] <= 1.5 * chance)


def is_foreign(model: Any) -> bool:
    """Whether the model's input and classes may rest on assumptions: not made by kd, nor weights that it knows."""
    weights = model.provenance.get("weights_sha256")
    converted = str(model.provenance.get("kind")).startswith(("caffe", _PRETRAINED))
    return model.is_foreign or (converted and str(weights) not in KNOWN_WEIGHTS)


def measure(model: Any, data: ImageSet, task: str, on_event: OnEvent) -> list[Assumption]:
    """The model as it was loaded, and for a foreign one the alternatives that are better, on one sample.

    Empty without labelled images. The model is run once for each form of the input.
    """
    samples = sample_of(data)
    labels = data.labels[samples]
    if len(samples) == 0:
        return []
    # 1. What may differ: the order of the classes, and the form of the input
    foreign = is_foreign(model)
    orders = list(_orders(model, data)) if foreign else [("", np.arange(len(data.classes)))]
    inputs = _inputs(model) if foreign else iter([("", dict[str, str](), model)])
    found: list[Assumption] = []
    parts = [part for part in np.split(samples, range(_STEP, _FIRST + 1, _STEP)) if len(part)]
    wrong_now = math.inf  # errors of the model as it was loaded, among the first images
    for text, options, forward in inputs:
        # 2. Predictions, until there are as many errors as now
        predicted = samples[:0]
        for part in parts:
            predicted = np.concatenate([predicted, _predict(model, forward, data, part, task, on_event)])
            first = predicted[:_FIRST]
            wrong = min(np.count_nonzero(order[labels[: len(first)]] != first) for _, order in orders)
            if wrong >= wrong_now:
                break
        else:
            # 3. Accuracy by each order
            for order_text, order in orders:
                right = order[labels] == predicted
                wrong_now = wrong_now if found else int(np.count_nonzero(~right[:_FIRST]))
                accuracy = float(100 * right.mean())
                words = " and ".join(part for part in (order_text, text) if part)
                interval = metrics.wilson_interval(accuracy, len(samples))
                found.append(Assumption(words, options, bool(order_text), len(samples), accuracy, interval))
    return found


def _predict(
    model: Any, forward: Any, data: ImageSet, samples: npt.NDArray[np.int64], task: str, on_event: OnEvent
) -> npt.NDArray[np.int64]:
    """Numbers of the outputs (N,) that are largest for the samples, by a form of the model."""
    weights = model.parameters() if isinstance(model, Classifier) else iter(())
    device = next((value.device for value in weights), torch.device("cpu"))
    logits = models.predict_logits(
        lambda images: forward(images.to(device)), data.images, samples, task=task, on_event=on_event
    )
    return logits.argmax(dim=1).numpy()


def _orders(model: Any, data: ImageSet) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Orders that the classes of a foreign model may have; for each the number of the output by class of the data."""
    names = data.classes
    yield "", np.arange(len(names))
    by_text = sorted(range(len(names)), key=names.__getitem__)
    if by_text != list(range(len(names))) and _order_is_assumed(model):
        yield f"its classes sorted as texts ({_listed(sorted(names))})", np.argsort(by_text)


def _inputs(model: Any) -> Iterator[tuple[str, dict[str, str], Any]]:
    """Forms of a foreign model's input: description, options, and a function from uint8 (B, H, W, C) to logits.

    First the one in use, unless its preprocessing is unknown.
    """
    channels = model.input_size[2]
    preprocess: Preprocess | None = model.preprocess
    unknown = model.why_not_runnable is not None
    if not unknown:
        yield "", {}, model
    declared = preprocess or getattr(model, "assumed", None)
    order = getattr(declared, "channel_order", None) or "rgb"
    other = "rgb" if order == "bgr" else "bgr"
    kind, args = (Photo, preprocess.args()) if isinstance(preprocess, Photo) else (MeanStd, {})
    if channels == 3 and not unknown:  # exact also with means, which are in the network's order
        yield f"channels {other}", {"channel_order": other}, lambda images: model(images.flip(-1))
    for text, scale in _SCALES.items() if preprocess is not None or unknown else ():
        mean, std = scale.mean_std or ((), ())
        if len(mean) not in (1, channels):
            continue
        state = [torch.tensor(values * (channels // len(values))) for values in (mean, std)]  # in RGB order
        for each in (order, other) if channels == 3 else (order,):
            turn = -1 if each == "bgr" else 1
            named = {name: ",".join(str(value).split(",")[::turn]) for name, value in scale.given.items()}
            words = text if each == order else f"{text}, channels {each}"
            setting = named if each == order else {"channel_order": each, **named}
            yield (
                words,
                setting,
                _with_preprocess(model, kind(state[0], state[1], **{**args, "channel_order": each})),
            )


def _with_preprocess(model: Any, preprocess: Preprocess) -> Callable[[Tensor], Tensor]:
    if not isinstance(model, Classifier):
        other: Callable[[Tensor], Tensor] = replace(model, preprocess=preprocess)
        return other

    def run(images: Tensor) -> Tensor:
        prepared = preprocess.to(images.device)(to_pixels(images))
        return model.to_classes(model.network(prepared))

    return run
