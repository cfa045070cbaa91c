"""Accuracy and calibration of the teacher, measured before training."""

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcli import models
from kdcli.base import metrics
from kdcli.base.events import Note, OnEvent, Progress
from kdcli.base.files import cache_folder
from kdcli.data import augment
from kdcli.data.images import NO_LABEL
from kdcli.engine.feed import Feed, TeacherOutputs
from kdcli.engine.plan import RunPlan
from kdcli.engine.records import TeacherCheck
from kdcli.models import checkpoint

Int64 = npt.NDArray[np.int64]
_SAMPLE, _LIVE_SAMPLE = 1024, 256  # images; fewer where the teacher runs on each view
_VIEWS = 2
_WEAK = 93.0  # per cent of training images
_FEW_STEPS = 500
_WORSE_ON_VIEWS, _FAR_WORSE = 1.5, 10.0  # points


def check_teacher(
    plan: RunPlan, outputs: TeacherOutputs, feed: Feed, on_event: OnEvent
) -> TeacherCheck | None:
    """Measure the teacher on training images, with and without augmentation, and on validation images."""
    if plan.teacher is None:
        return None
    # 1. Samples
    count = _SAMPLE if outputs.views else _LIVE_SAMPLE
    training, validation = _sample(plan.labelled_samples, count), _sample(plan.val_samples, count)
    # 2. Plain images
    plain = _plain_logits(plan, np.concatenate([training, validation]), on_event)
    labels = torch.from_numpy(plan.train.labels)
    # 3. Views
    logits, view_labels = [], []
    for view in range(min(_VIEWS, plan.config.views)):
        logits.append(_view_logits(plan, outputs, feed, view, training, on_event))
        own, other, shares = feed.targets(view, training)
        if other is not None and shares is not None:
            own = torch.where(shares < 0.5, other, own)
        view_labels.append(own.cpu())
    # 4. Figures; a mixed image may be mostly one without a label
    held_out, held_labels = plain[len(training) :], labels[validation]
    known = len(validation) > 0
    of_views = torch.cat(view_labels)
    labelled = of_views != NO_LABEL
    on_views, of_views = torch.cat(logits)[labelled], of_views[labelled]
    accuracy = metrics.accuracy(on_views, of_views)
    on_plain = metrics.accuracy(plain[: len(training)], labels[training])
    comparable = plan.config.augment != "none" and not augment.mixes(plan.config.augment)
    lower = on_plain - accuracy if comparable else 0.0
    check = TeacherCheck(
        images=len(training),
        views=accuracy,
        views_calibration_error=metrics.calibration_error(on_views, of_views),
        plain=on_plain,
        validation=metrics.accuracy(held_out, held_labels) if known else None,
        validation_calibration_error=metrics.calibration_error(held_out, held_labels) if known else None,
        warning=warning_of(on_plain, lower, plan.steps, len(plan.train.classes)),
    )
    on_event(Note(check.summary))
    if check.warning:
        on_event(Note(check.warning))
    elif lower > _FAR_WORSE:
        found = f"the teacher's accuracy is {lower:.0f} points lower on the views"
        on_event(Note(f"{found}: consider --augment none, or a teacher trained with these views"))
    return check


def _sample(samples: Int64, count: int) -> Int64:
    """At most `count` of the samples, at random: they may be sorted by class."""
    return np.sort(augment.order(0, augment.SPLIT_EPOCH, samples)[:count])


def warning_of(plain: float, lower: float, steps: int, classes: int) -> str | None:
    """Warning where a teacher may cost more than it gives.

    `plain`: its accuracy on training images without augmentation, per cent; `lower`: points lost on their views.

    Thresholds: `benchmarks/teacher_quality.py`, results in docs/methods.md.
    """
    if plain < _WEAK:
        cause = f"the labels are right on all training images, the teacher on {plain:.1f} %"
        cure = "a better teacher, or a higher --ce-weight"
        if plain < 50 / classes:
            cause += ", below chance: its classes may be in another order"
            cure = "--teacher-class-map, or data with the teacher's classes"
        elif lower > _WORSE_ON_VIEWS:
            cause += f" ({plain - lower:.1f} % of their views)"
            cure = f"--augment none, a teacher trained with these views, {cure.removeprefix('a better teacher, ')}"
    elif steps < _FEW_STEPS:
        cause = f"{steps:,} steps are few to learn soft targets"
        cure = "more --epochs, or a smaller --batch-size"
    else:
        return None
    return f"labels alone (--method ce) may do better: {cause}. Consider {cure}"


def _view_logits(
    plan: RunPlan, outputs: TeacherOutputs, feed: Feed, view: int, samples: Int64, on_event: OnEvent
) -> Tensor:
    """The teacher's logits (N, classes) for a view, in batches where the teacher is run."""
    if outputs.views:
        return outputs.views[view % len(outputs.views)].logits(samples)
    found, size = [], plan.config.batch_size
    for part in np.split(samples, range(size, len(samples), size)):
        logits, _ = outputs(feed.make(view, part, 1.0, size), view)
        assert logits is not None
        found.append(logits.cpu())
        on_event(Progress("teacher on training views", sum(map(len, found)), len(samples)))
    return torch.cat(found)


def _plain_logits(plan: RunPlan, samples: Int64, on_event: OnEvent) -> Tensor:
    """The teacher's logits (N, classes) for training images without augmentation, measured once and cached."""
    teacher, train = plan.teacher, plan.train
    assert teacher is not None
    key = {
        "version": 1,  # raise it when models give other logits for the same images
        "teacher": [
            (each.sha256, each.weight, each.assumed.given, each.dependencies) for each in teacher.members
        ],
        "data": train.fingerprint,
        "samples": hashlib.sha256(samples.tobytes()).hexdigest(),
    }
    path = cache_folder(plan.config.cache_dir, "teacher-sample", key).with_suffix(".pt")

    def run() -> dict[str, Tensor]:
        if teacher.has_stored:
            return {"logits": teacher.logits(train, on_event=on_event)[0].logits(samples)}
        live = teacher.live()
        logits = models.predict_logits(
            lambda images: live(images.to(plan.world.device), 0, samples)[0],
            train.images,
            samples,
            task="teacher on images without augmentation",
            on_event=on_event,
        )
        return {"logits": logits}

    return checkpoint.cached(path, run)["logits"]
