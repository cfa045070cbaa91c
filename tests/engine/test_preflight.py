"""The teacher's figures before training: those of its outputs; warnings where labels alone may do better."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdcli import data, models
from kdcli.base.events import Event, Note
from kdcli.data import Splits, augment
from kdcli.data.split import split_validation
from kdcli.engine import fit, preflight, read_result
from kdcli.engine.preflight import warning_of
from kdcli.engine.records import TeacherCheck
from tests.helpers import config, make_splits


@pytest.fixture
def splits() -> Splits:
    return make_splits(size=(8, 8, 3))


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float(np.mean(logits.argmax(1) == labels))


@pytest.mark.parametrize("method", ["kd", "at"])
def test_figures_are_those_of_the_teachers_outputs(workplace: Path, splits: Splits, method: str) -> None:
    """Two flips of each image; `kd` reads them from the cache, `at` runs the teacher."""
    teacher = fit(config(method="ce", epochs=2, name="t", val_fraction=0.2), splits).run.student
    notes: list[Event] = []
    result = fit(
        config(method=method, teacher=teacher, augment="flip", epochs=1, name="s", val_fraction=0.2),
        splits,
        on_event=notes.append,
    )
    check = result.teacher
    assert check is not None and read_result(result.run.result_file).teacher == check
    training, validation = split_validation(splits.train.labels, 0.2)
    model, images, labels = models.load(teacher).eval(), splits.train.images, splits.train.labels

    def outputs(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(np.ascontiguousarray(pixels))).numpy()

    both = np.concatenate(
        [images[training], images[training][:, :, ::-1]]
    )  # view 0 and 1 hold both of each image
    assert check.images == len(training)
    assert check.views == pytest.approx(accuracy(outputs(both), np.tile(labels[training], 2)), abs=0.6)
    assert check.plain == pytest.approx(accuracy(outputs(images[training]), labels[training]), abs=0.6)
    assert check.validation == pytest.approx(
        accuracy(outputs(images[validation]), labels[validation]), abs=0.6
    )
    texts = [event.text for event in notes if isinstance(event, Note)]
    assert check.summary in texts and check.warning in texts  # one epoch is few steps


def test_samples_are_of_all_classes() -> None:
    """A hundred images of each of ten classes, sorted by class."""
    found = preflight._sample(np.arange(1000, dtype=np.int64), 200)
    assert len(found) == 200 and np.bincount(found // 100).min() >= 5
    assert np.array_equal(preflight._sample(np.arange(7, 12, dtype=np.int64), 200), np.arange(7, 12))


def test_a_run_without_a_teacher_has_no_figures_of_one(workplace: Path, splits: Splits) -> None:
    assert fit(config(method="ce", epochs=1), splits).teacher is None


def test_of_mixed_images_the_label_with_the_larger_share_counts(workplace: Path, splits: Splits) -> None:
    teacher = fit(config(method="ce", epochs=2, name="t"), splits).run.student
    settings = config(method="kd", teacher=teacher, augment="mixup", views=2, epochs=2, val_fraction=0.0)
    check = fit(settings, splits).teacher
    samples = np.arange(len(splits.train))
    model, right = models.load(teacher).eval(), []
    for view in range(2):
        pixels = augment.make_view(
            "mixup", lambda n: torch.from_numpy(splits.train.images[n]), 0, view, samples, samples
        )
        mixed = augment.mixing("mixup", 0, view, samples, samples, (1, 1))
        assert mixed is not None
        labels = splits.train.labels[np.where(mixed.shares < 0.5, mixed.partners, samples)]
        with torch.inference_mode():
            right.append(model(pixels).argmax(1).numpy() == labels)
    assert check is not None and check.validation is None
    assert check.views == pytest.approx(100 * np.mean(right), abs=0.6)


@pytest.mark.parametrize(
    ("plain", "lower", "steps", "words"),
    [
        (89.5, 3.7, 3000, ("teacher on 89.5 % (85.8 % of their views)", "--augment none")),
        (4.5, 1.5, 3000, ("teacher on 4.5 %, below chance", "another order", "--teacher-class-map")),
        (89.5, 0.5, 3000, ("teacher on 89.5 %. Consider a better teacher",)),
        (20.0, 0.0, 10, ("teacher on 20.0 %",)),
        (99.0, 29.0, 499, ("499 steps are few", "--epochs")),
        (95.0, 0.5, 500, None),
    ],
)
def test_warnings(plain: float, lower: float, steps: int, words: tuple[str, ...] | None) -> None:
    found = warning_of(plain, lower, steps, classes=10)
    assert (found is None) == (words is None)
    assert all(word in (found or "") for word in words or ())


@pytest.fixture(scope="module")
def digits() -> Splits:
    return data.load("digits")


@pytest.fixture(scope="module")
def digits_teacher(digits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs_dir = tmp_path_factory.mktemp("runs")
    settings = config(method="ce", student="convnet-small", epochs=5, name="t", runs_dir=runs_dir)
    return fit(settings, digits).run.student


def check_of(teacher: Path, splits: Splits) -> TeacherCheck:
    """One epoch of 680 steps, so that these are enough."""
    check = fit(
        config(teacher=teacher, epochs=1, batch_size=2, name="s", teacher_cache="off"), splits
    ).teacher
    assert check is not None
    return check


def test_no_warning_with_a_good_teacher(workplace: Path, digits: Splits, digits_teacher: Path) -> None:
    check = check_of(digits_teacher, digits)
    assert check.plain > 95 and check.warning is None


def test_a_drop_on_the_views_is_noted(workplace: Path, digits: Splits, digits_teacher: Path) -> None:
    """Of mirrored digits, of which the teacher has seen none."""
    notes: list[Event] = []
    settings = {"teacher": digits_teacher, "epochs": 1, "batch_size": 2, "teacher_cache": "off"}
    check = fit(config(**settings, name="s", augment="flip"), digits, on_event=notes.append).teacher
    assert check is not None and check.warning is None
    [noted] = (event.text for event in notes if isinstance(event, Note) and "points lower" in event.text)
    assert f"{check.plain - check.views:.0f} points lower on the views: consider --augment none" in noted


def test_warning_with_a_teacher_of_other_classes(
    workplace: Path, digits: Splits, digits_teacher: Path
) -> None:
    """The rows of the last layer are moved by three: the names are right, the outputs are not."""
    model = models.load(digits_teacher)
    layer = models.final_linear(model.network)
    assert layer is not None
    with torch.no_grad():
        layer.weight.copy_(layer.weight.roll(3, 0))
        layer.bias.copy_(layer.bias.roll(3, 0))
    model.save(Path("shuffled.pt"))
    check = check_of(Path("shuffled.pt"), digits)
    assert check.plain < 10 and "labels alone" in (check.warning or "")


def test_warning_with_a_teacher_of_few_images(workplace: Path, digits: Splits) -> None:
    """One image of each class: 99 % of the training images are kept for validation."""
    few = config(method="ce", student="convnet-small", epochs=20, batch_size=4, val_fraction=0.99, name="t")
    check = check_of(fit(few, digits).run.student, digits)
    assert 20 < check.plain < 93 and "a better teacher" in (check.warning or "")
