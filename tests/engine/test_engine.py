"""Training: results, determinism, resuming, and refused settings."""

from __future__ import annotations

import json
import signal
import threading
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcli import models
from kdcli.base.config import make
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Event, Note, Progress
from kdcli.base.recipes import RECIPES, read_recipe
from kdcli.base.runtime import World
from kdcli.data import ImageSet, Splits, incompatibility
from kdcli.data.split import split_validation
from kdcli.engine import RunDir, RunResult, fit, read_metrics
from kdcli.engine.plan import batch_size_for, make_plan, resolve
from kdcli.engine.step import Ema, learning_rate, make_optimizer
from kdcli.engine.student import OutputScale
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint, external
from kdcli.teacher import CachedLogits, Teacher, freeze
from tests.helpers import StopAfter, config, digest, make_splits, slow


@pytest.fixture
def splits() -> Splits:
    return make_splits()


@pytest.fixture
def trained_teacher(workplace: Path, splits: Splits) -> Path:
    """A teacher by `--method ce`, as a user makes one."""
    fit(config(method="ce", student="convnet-small", epochs=4, name="teacher"), splits)
    return Path("runs/teacher/student.pt")


def test_training_from_labels_alone(workplace: Path, splits: Splits) -> None:
    result = fit(config(method="ce", epochs=20), splits)
    assert result.evaluation.accuracy > 90
    assert result.teacher_passes == 0
    assert result.evaluation.agreement is None
    model = models.load(result.run.student)
    logits = models.predict_logits(model, splits.test.images)
    # the file holds the very model that was measured
    assert 100 * float((logits.argmax(1).numpy() == splits.test.labels).mean()) == result.evaluation.accuracy
    assert model.provenance["test_accuracy"] == result.evaluation.accuracy
    assert model.classes == splits.test.classes


@pytest.mark.parametrize(
    ("images", "batch", "steps"), [(17, 16, 1), (33, 16, 2), (32, 16, 2), (34, 16, 3), (5, 1, 5), (1, 4, 1)]
)
def test_a_last_batch_of_one_image_joins_the_one_before(
    workplace: Path, images: int, batch: int, steps: int
) -> None:
    settings = config(method="ce", batch_size=batch, val_fraction=0)
    plan = make_plan(settings, make_splits(train=images), World.alone())
    assert (plan.steps_per_epoch, plan.steps) == (steps, 3 * steps)


def test_batch_norm_of_vectors_with_one_image_left_over(workplace: Path) -> None:
    """All 17 images are in one batch of an epoch, of 16 and one."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3, momentum=None))
    settings = config(method="ce", student=external.own(network), epochs=2, val_fraction=0)
    result = fit(settings, make_splits(train=17))
    trained = checkpoint.load(result.run.student).state_dict
    assert int(trained["2.num_batches_tracked"]) == 2


@pytest.mark.parametrize("method", ["logits", "noisy", "kd"])
def test_the_teacher_is_run_once_for_all_methods(trained_teacher: Path, splits: Splits, method: str) -> None:
    notes: list[Event] = []
    first = fit(config(method="kd", teacher=trained_teacher), splits)
    assert first.teacher_passes == 2  # train and test images
    second = fit(config(method=method, teacher=trained_teacher), splits, on_event=notes.append)
    assert second.teacher_passes == 0
    assert any(isinstance(event, Note) and "the teacher is not run" in event.text for event in notes)
    assert second.evaluation.agreement is not None


def test_cached_teacher_equals_live_teacher(trained_teacher: Path, splits: Splits) -> None:
    found = Teacher.open(trained_teacher, Path("cache")).logits(
        splits.train, augment_name="flip", seed=4, views=2
    )
    model = models.load(trained_teacher)
    from kdcli.data import augment

    for view in (0, 1):
        seen = augment.apply(
            "flip", torch.from_numpy(splits.train.images), 4, view, np.arange(len(splits.train))
        )
        with torch.inference_mode():
            expected = model(seen).numpy()
        np.testing.assert_allclose(found[view].logits().numpy(), expected, rtol=2e-3, atol=2e-3)
    assert found[0].stored[0].dtype == np.float16
    assert not np.array_equal(found[0].stored[0], found[1].stored[0])


def test_cached_logits_depend_on_data_seed_and_weights(trained_teacher: Path, splits: Splits) -> None:
    def passes(
        path: Path = trained_teacher, data: Splits = splits, seed: int = 0, augment: str = "flip"
    ) -> int:
        opened = Teacher.open(path, Path("cache"))
        opened.logits(data.train, augment_name=augment, seed=seed)
        return opened.views_computed

    assert passes() == 1
    assert passes() == 0
    assert passes(seed=1) == 1
    assert passes(augment="none") == 1
    assert passes(augment="none", seed=1) == 0  # a view without chance has no seed
    assert passes(data=make_splits(train=93)) == 1
    other = Path("other.pt")
    model = models.load(trained_teacher)
    with torch.no_grad():
        next(model.network.parameters()).add_(1e-3)
    model.save(other)
    assert passes(path=other) == 1


def test_a_damaged_cache_file_is_computed_again(trained_teacher: Path, splits: Splits) -> None:
    opened = Teacher.open(trained_teacher, Path("cache"))
    right = opened.logits(splits.train)[0].logits()
    [file] = Path("cache/teacher").glob("*/view-0000.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = opened.logits(splits.train)[0].logits()
    assert opened.views_computed == 2
    assert torch.equal(again, right)


def test_training_does_not_change_the_teacher(trained_teacher: Path, splits: Splits) -> None:
    """No gradient, no batch-norm statistic and no byte of the file moves, live dropout or not."""
    before = trained_teacher.read_bytes()
    opened = Teacher.open(trained_teacher, Path("cache"))
    model = opened.members[0].model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    opened.logits(splits.train)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    fit(config(method="kd", teacher=trained_teacher), splits)
    assert trained_teacher.read_bytes() == before


def test_teacher_dropout_runs_the_teacher_live_and_moves_only_dropout(workplace: Path) -> None:
    splits = make_splits(size=(8, 8, 3))
    fit(config(method="ce", student="nin", epochs=1, lr=1e-4, name="t"), splits)
    path = Path("runs/t/student.pt")
    live = Teacher.open(path, Path("cache")).live(dropout=0.5)
    images = torch.from_numpy(splits.train.images[:8])
    assert torch.equal(live(images, 0, np.arange(8))[0], live(images, 0, np.arange(8))[0])
    assert not torch.equal(live(images, 0, np.arange(8))[0], live(images, 1, np.arange(8))[0])
    on = [type(m) for m in freeze(models.load(path), 0.5).modules() if m.training and not list(m.children())]
    assert on == [nn.Dropout] * 2
    result = fit(config(method="kd", teacher=path, teacher_dropout=0.5, epochs=1), splits)
    assert result.teacher_passes == 1  # the test images; the training images were seen live
    plain = models.load(Path("runs/t/student.pt"))
    assert torch.equal(plain(images), plain(images))


def test_teacher_without_dropout_refuses_it(trained_teacher: Path, splits: Splits) -> None:
    with pytest.raises(KdError, match="no dropout layers"):
        fit(config(method="kd", teacher=trained_teacher, teacher_dropout=0.5), splits)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["teacher"]


def test_a_teacher_of_other_classes_or_size_is_refused(trained_teacher: Path) -> None:
    with pytest.raises(KdError, match="has 3 classes, the data has 4"):
        fit(config(method="kd", teacher=trained_teacher), make_splits(classes=4))
    with pytest.raises(KdError, match="takes 8×8×1 images") as caught:
        fit(config(method="kd", teacher=trained_teacher), make_splits(size=(12, 12, 1)))
    assert caught.value.hint == "Try --image-size 8."
    for size, hint in (((8, 8, 3), "Try --grey."), ((12, 8, 3), "Try --grey --image-size 8.")):
        with pytest.raises(KdError, match="takes 8×8×1 images") as caught:
            fit(config(method="kd", teacher=trained_teacher), make_splits(size=size))
        assert caught.value.hint == hint


def test_student_is_in_training_mode_in_every_epoch(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    step = torch.optim.Adam.step

    def watch(self: torch.optim.Adam, *rest: Any) -> Any:
        seen.append(all(module.training for module in students[-1].modules()))
        return step(self, *rest)

    students: list[nn.Module] = []
    build = models.build

    def keep(*arguments: Any, **rest: Any) -> nn.Module:
        students.append(build(*arguments, **rest))
        return students[-1]

    monkeypatch.setattr(models, "build", keep)
    monkeypatch.setattr(torch.optim.Adam, "step", watch)
    fit(config(method="ce", val_fraction=0.2), splits)
    assert len(seen) == 3 * 5  # 72 samples in batches of 16
    assert all(seen)


def test_test_data_is_read_once_and_after_training(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    predict = models.predict_logits

    def watch(model: Any, images: Any, *samples: Any, **rest: Any) -> torch.Tensor:
        order.append("test" if images is splits.test.images else "validation")
        return predict(model, images, *samples, **rest)

    monkeypatch.setattr(models, "predict_logits", watch)
    fit(config(method="ce", val_fraction=0.2), splits)
    assert order == ["validation"] * 3 + ["test"]


def test_the_seed_decides_the_student(trained_teacher: Path, splits: Splits) -> None:
    settings = {"method": "noisy", "teacher": trained_teacher, "augment": "flip"}
    results = [fit(config(**settings, seed=seed), splits) for seed in (3, 3, 4)]
    first, same, other = (checkpoint.load(result.run.student).state_dict for result in results)
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("images", [slow(1), slow(40), slow(85), 100, slow(200)])
@pytest.mark.parametrize("method", ["ce", "noisy"])
def test_stopped_and_resumed_is_bit_identical(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, method: str, images: int
) -> None:
    """nin has dropout, so the generator's state counts; noisy has draws and an output scale of its own."""
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    splits = make_splits(size=(8, 8, 3))
    student = {"ce": "nin", "noisy": "convnet-tiny"}[method]
    settings = {"method": method, "student": student, "augment": "flip-crop", "save_every": 2, "lr": 1e-3}
    settings |= {"log_every": 4, "width": 0.25 if method == "ce" else 1.0}
    if method == "noisy":
        fit(config(method="ce", epochs=1, name="teacher"), splits)
        settings["teacher"] = Path("runs/teacher/student.pt")
    whole = fit(config(**settings, name="whole"), splits)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        fit(config(**settings, name="cut"), splits, on_event=StopAfter(images, signal.SIGINT))
    assert caught.value.exit_code == 130
    assert caught.value.hint == "kd train --resume runs/cut"
    assert signal.getsignal(signal.SIGINT) is handler
    run = RunDir.existing(Path("runs/cut"))
    resumed = fit(run.read_config(), splits, resume=run)
    assert digest(resumed.run.last) == digest(whole.run.last)
    assert digest(resumed.run.student) == digest(whole.run.student)
    assert resumed.evaluation == whole.evaluation

    def lines(result: RunResult) -> list[dict[str, Any]]:
        read = [json.loads(line) for line in result.run.metrics_file.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in read]

    assert lines(resumed) == lines(whole)
    assert [line["epoch"] for line in lines(whole) if line["kind"] == "epoch"] == [1, 2, 3]


def test_sigterm_leaves_with_143(workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    with pytest.raises(Interrupted) as caught:
        fit(config(method="ce"), splits, on_event=StopAfter(1, signal.SIGTERM))
    assert caught.value.exit_code == 143


def test_resume_with_other_data_is_refused(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    with pytest.raises(Interrupted):
        fit(config(method="ce", name="x"), splits, on_event=StopAfter(1, signal.SIGINT))
    run = RunDir.existing(Path("runs/x"))
    with pytest.raises(KdError, match="the train images of runs/x changed"):
        fit(run.read_config(), make_splits(train=87), resume=run)


def test_training_works_outside_the_main_thread(workplace: Path, splits: Splits) -> None:
    results: list[RunResult] = []
    thread = threading.Thread(target=lambda: results.append(fit(config(method="ce", epochs=1), splits)))
    thread.start()
    thread.join()
    assert len(results) == 1


def test_an_exploding_loss_is_an_error(workplace: Path, splits: Splits) -> None:
    with pytest.raises(KdError, match="no longer finite"):
        fit(
            config(method="ce", optimizer="sgd", lr=100.0, student="lenet-caffe", epochs=5),
            make_splits(size=(16, 16, 1)),
        )


def test_files_of_a_run_folder(workplace: Path, splits: Splits) -> None:
    result = fit(config(method="ce", val_fraction=0.2), splits)
    names = {path.name for path in result.run.path.iterdir()}
    assert names == {
        "config.toml",
        "metrics.jsonl",
        "last.pt",
        "student.pt",
        "result.json",
        "environment.json",
        "last-000000010.pt",
        "lock",
    }
    assert result.run.path == Path("runs/ce-convnet-tiny-1")
    assert fit(config(method="ce", epochs=1), splits).run.path == Path("runs/ce-convnet-tiny-2")
    stored = json.loads(result.run.result_file.read_text())
    assert stored["schema_version"] == 2
    assert stored["test"]["accuracy"] == result.evaluation.accuracy
    environment = json.loads(result.run.environment_file.read_text())
    assert environment["precision"] == "32"
    repeated = make(TrainConfig, {**result.config.model_dump(), "name": "again"})
    again = fit(repeated, splits)
    assert digest(again.run.student) == digest(result.run.student)


def test_a_taken_name_is_refused_and_nothing_is_lost(workplace: Path, splits: Splits) -> None:
    first = fit(config(method="ce", name="mine", epochs=1), splits)
    before = first.run.student.read_bytes()
    with pytest.raises(UsageError, match="run mine exists"):
        fit(config(method="ce", name="mine", epochs=1), splits)
    assert first.run.student.read_bytes() == before


def test_a_regressing_student_starts_at_the_teachers_mean_and_spread(workplace: Path, splits: Splits) -> None:
    """With steps too small to learn anything, its logits lie where the teacher's do."""
    fit(config(method="ce", student="convnet-small", name="teacher"), splits)
    path = Path("runs/teacher/student.pt")
    far = models.load(path)
    with torch.no_grad():
        head = models.final_linear(far.network)
        assert head is not None
        head.weight.mul_(20)
        head.bias.add_(torch.tensor([100.0, 50.0, 0.0]))
    far.save(Path("far.pt"))
    expected = models.predict_logits(far, splits.train.images).mean(0)
    result = fit(config(method="logits", teacher=Path("far.pt"), lr=1e-9, epochs=1, val_fraction=0.0), splits)
    student = models.load(result.run.student)
    mean = models.predict_logits(student, splits.train.images).mean(0)
    spread = models.predict_logits(far, splits.train.images).std()
    assert float((mean - expected).abs().max()) < 2 * float(spread)
    assert float((mean - expected).abs().max()) < 0.2 * float(expected.abs().max())
    assert checkpoint.load(result.run.student).arch == "convnet-tiny"


def test_folding_changes_no_logit() -> None:
    random = np.random.default_rng(0)
    targets = (random.normal(size=(50, 4)) * 9 + [10, 20, 30, 40]).astype(np.float32)
    output = OutputScale.of_logits(CachedLogits((targets,), (1.0,), 4), np.arange(50), torch.device("cpu"))
    np.testing.assert_allclose(output.shift.numpy(), targets.mean(axis=0), rtol=1e-6)
    assert output.scale == pytest.approx(np.sqrt(np.mean(targets.var(axis=0))))
    network = models.build("convnet-tiny", classes=4, input_size=(8, 8, 1)).eval()
    pixels = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        before = output(network(pixels))
        output.fold(network)
        torch.testing.assert_close(network(pixels), before, rtol=1e-5, atol=1e-4)


def test_other_names_of_classes_are_refused(trained_teacher: Path, splits: Splits) -> None:
    train = splits.train
    for names in (("class 0", "class 1", "ape"), ("0", "1", "2"), ("class 0", "class 1", "Class_1")):
        other = replace(splits, train=replace(train, classes=names, fingerprint="f" * 64))
        with pytest.raises(KdError, match="where the data has") as caught:
            fit(config(method="kd", teacher=trained_teacher), other)
        assert "--class-map FILE.csv" in caught.value.hint


def test_only_a_model_without_names_fits_any_names(splits: Splits) -> None:
    """Numbers in the data are names; numbers in the model are names where they come from data."""
    words = splits.train
    numbered = replace(words, classes=("0", "1", "2"))

    def fits(classes: tuple[str, ...], images: ImageSet, /, **provenance: object) -> bool:
        model = SimpleNamespace(classes=classes, input_size=(8, 8, 1), any_size=False, provenance=provenance)
        return incompatibility(model, images) is None

    assert fits(("0", "1", "2"), words)
    assert fits(("0", "1", "2"), words, kind="caffe")
    assert not fits(("0", "1", "2"), words, data={"label": "digits"})
    assert not fits(("0", "1", "2"), words, class_names="labels.txt")
    assert not fits(("1", "2", "3"), words)
    assert not fits(words.classes, numbered)
    assert fits(("0", "1", "2"), numbered, data={"label": "digits"})


def test_a_saved_state_is_not_loaded_as_a_model(trained_teacher: Path) -> None:
    with pytest.raises(KdError, match="not a finished model") as caught:
        models.load(trained_teacher.with_name("last.pt"))
    assert "student.pt" in caught.value.hint


def test_a_run_killed_before_its_first_checkpoint_starts_over(workplace: Path, splits: Splits) -> None:
    result = fit(config(method="ce", name="k"), splits)
    result.run.last.unlink()  # as after SIGKILL with --save-every 0: lines of metrics, no state
    again = fit(result.run.read_config(), splits, resume=result.run)
    assert len(read_metrics(result.run.metrics_file)) == 3
    assert again.evaluation == result.evaluation


def test_split_is_stratified_and_disjoint() -> None:
    labels = np.repeat(np.arange(5), [100, 50, 10, 2, 1])
    train, validation = split_validation(labels, 0.2)
    assert sorted([*train, *validation]) == list(range(163))
    assert np.bincount(labels[validation], minlength=5).tolist() == [20, 10, 2, 1, 0]
    train, validation = split_validation(labels, 0.99)
    assert (np.bincount(labels[train], minlength=5) >= 1).all()
    assert split_validation(labels, 0.0)[1].tolist() == []


def test_split_equals_a_plain_loop_over_the_classes() -> None:
    from kdcli.data import augment

    labels = np.random.default_rng(0).integers(0, 40, 3000) * 3
    shuffled = augment.order(0, augment.SPLIT_EPOCH, np.arange(3000))
    expected = []
    for label in np.unique(labels):
        members = [sample for sample in shuffled if labels[sample] == label]
        expected += members[: min(max(1, round(0.07 * len(members))), len(members) - 1)]
    assert split_validation(labels, 0.07)[1].tolist() == sorted(expected)


def test_default_number_of_views() -> None:
    def views(**changes: Any) -> int:
        return resolve(config(epochs=20, **changes)).views

    assert views(method="kd") == 1
    assert views(method="kd", augment="flip") == 2
    assert views(method="kd", augment="flip-crop") == 8
    assert views(method="ce", augment="flip-crop") == 20
    assert views(method="kd", augment="flip-crop", views=5) == 5
    with pytest.raises(UsageError, match="2 distinct"):
        views(method="kd", augment="flip", views=3)


def test_cache_top_k_is_refused_with_a_live_teacher() -> None:
    for live in ({"teacher_cache": "off"}, {"teacher_dropout": 0.5}):
        with pytest.raises(UsageError, match="--cache-top-k"):
            resolve(config(cache_top_k=2, **live))
        assert resolve(config(method="ce", cache_top_k=2, **live)).cache_top_k == 2  # it is named as unread
    assert resolve(config(cache_top_k=2)).cache_top_k == 2


@pytest.mark.parametrize(
    ("samples", "size"),
    [(10, 4), (76, 4), (77, 4), (153, 8), (1365, 64), (4864, 128), (4865, 256), (47_500, 256)],
)
def test_the_automatic_batch_has_twenty_steps_an_epoch(samples: int, size: int) -> None:
    """Of 4,864 images 19 batches of 256 are full and none is left; one more image makes the 20th step."""
    assert batch_size_for(samples) == size


def test_split_and_batch_are_told_and_recorded_as_derived(workplace: Path) -> None:
    """54 images and 6: an epoch of 14 steps, each class validated by one of its ten images."""
    ten_each = make_splits(60, 12, classes=6)
    notes: list[str] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    automatic = fit(config(method="ce", batch_size=0, epochs=1), ten_each, on_event=on_event)
    assert notes == ["54 images to train on, 6 for validation; 14 steps an epoch in batches of 4"]
    written = tomllib.loads(automatic.run.config_file.read_text())
    assert written["batch_size"] == 4 and "batch_size" in written["filled"]
    assert automatic.val_accuracy is not None
    explicit = fit(
        config(method="ce", batch_size=54, val_fraction=0.0, epochs=1), ten_each, on_event=on_event
    )
    assert notes[1:] == ["60 images to train on, 0 for validation; 2 steps an epoch in batches of 54"]
    assert "batch_size" not in tomllib.loads(explicit.run.config_file.read_text())["filled"]
    assert explicit.val_accuracy is None


@pytest.mark.parametrize(
    ("fraction", "validated"), [(0.0, [0, 0, 0, 0]), (0.05, [0, 1, 1, 5]), (0.001, [0, 1, 1, 1])]
)
def test_each_class_of_two_or_more_images_is_validated(fraction: float, validated: list[int]) -> None:
    labels = np.repeat(np.arange(4), [1, 2, 10, 100])
    assert np.bincount(labels[split_validation(labels, fraction)[1]], minlength=4).tolist() == validated


def test_learning_rates() -> None:
    step = [learning_rate("step", 1.0, number, 10) for number in (0, 7, 8, 9)]
    assert step == pytest.approx([1, 1, 0.1, 0.1])
    assert learning_rate("cosine", 2.0, 5, 10) == pytest.approx(1.0)
    # onecycle, 101 steps: up over 30 of them, then down over 70
    for number, expected in (
        (0, 1e-3 / 25),
        (15, (1e-3 + 1e-3 / 25) / 2),
        (30, 1e-3),
        (65, (1e-3 + 1e-7) / 2),
        (100, 1e-7),
    ):
        assert learning_rate("onecycle", 1e-3, number, 101) == pytest.approx(expected)


def test_the_seed_recipe_equals_the_reference() -> None:
    recipe = make(TrainConfig, RECIPES["seed"])
    assert (recipe.optimizer, recipe.lr, recipe.schedule, recipe.batch_size, recipe.epochs) == (
        "adam",
        1e-3,
        "step",
        256,
        100,
    )
    assert (recipe.augment, recipe.preprocess, recipe.teacher_dropout) == ("none", "mean-image", 0.5)


def test_a_run_can_be_resumed_from_the_moment_its_folder_is_there(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(config(method="ce", name="whole"), splits)
    create = RunDir.create

    def killed(*arguments: Any) -> RunDir:
        create(*arguments)
        raise RuntimeError("killed")

    monkeypatch.setattr(RunDir, "create", killed)
    with pytest.raises(RuntimeError):
        fit(config(method="ce", name="cut"), splits)
    run = RunDir.existing(Path("runs/cut"))
    fit(run.read_config(), splits, resume=run)
    assert digest(run.last) == digest(whole.run.last)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["cut", "whole"]  # and no scratch


def test_a_taken_name_hints_at_resume_only_where_there_is_a_run(workplace: Path, splits: Splits) -> None:
    Path("runs/other").mkdir(parents=True)
    Path("runs/other/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists") as caught:
        fit(config(method="ce", name="other"), splits)
    assert "--resume" not in caught.value.hint
    fit(config(method="ce", name="my run", epochs=1), splits)
    with pytest.raises(UsageError, match="exists") as caught:
        fit(config(method="ce", name="my run"), splits)
    assert "--resume 'runs/my run'" in caught.value.hint


def test_progress_shows_the_last_validation_accuracy_in_one_bar(workplace: Path, splits: Splits) -> None:
    events: list[Event] = []
    result = fit(config(method="ce", val_fraction=0.2), splits, on_event=events.append)
    shown = [event for event in events if isinstance(event, Progress) and event.task.startswith("epoch")]
    assert {event.group for event in shown} == {"training"}
    assert [event.values.get("val_accuracy") for event in shown] == [
        None,
        *(epoch.val_accuracy for epoch in result.history[:-1]),
    ]


def test_derived_settings_are_derived_again_from_changed_ones(trained_teacher: Path, splits: Splits) -> None:
    fit(config(method="ce", augment="flip-crop", epochs=20, name="a", batch_size=512), splits)
    file = "runs/a/config.toml"
    assert resolve(make(TrainConfig, read_recipe(file, {"method": "ce"}))).views == 20
    assert RunDir(Path("runs/a")).read_config().views == 20
    other = make(TrainConfig, {**read_recipe(file, {"method": "logits"}), "method": "logits"})
    assert resolve(other).views == 8
    fit(config(method="ce", epochs=1, views=1, name="b"), splits)
    assert read_recipe("runs/b/config.toml", {"method": "kd"})["views"] == 1


def test_views_of_a_recipe_are_of_its_augmentation() -> None:
    assert read_recipe("patient", {"tau": 2.0})["views"] == 10
    for augment_name, views in (("none", 1), ("flip", 2), ("flip-crop", 10), ("flip-crop-mixup", 8)):
        plain = make(
            TrainConfig, read_recipe("patient", {"augment": augment_name}) | {"augment": augment_name}
        )
        assert resolve(plain).views == views


def test_steps_are_logged_as_means_over_the_steps_between(workplace: Path, splits: Splits) -> None:
    every = fit(config(method="ce", val_fraction=0.2, log_every=1, name="every"), splits)
    third = fit(config(method="ce", val_fraction=0.2, log_every=3, name="third"), splits)
    none = fit(config(method="ce", val_fraction=0.2, log_every=0, name="none"), splits)
    one = [line for line in read_metrics(every.run.metrics_file) if line.kind == "step"]
    some = [line for line in read_metrics(third.run.metrics_file) if line.kind == "step"]
    assert [line.kind for line in read_metrics(none.run.metrics_file)] == ["epoch"] * 3
    assert [line.step for line in one] == list(range(1, 16))  # 72 samples: 4 batches of 16 and one of 8
    assert [line.step for line in some] == [3, 6, 9, 12, 15]
    sizes = [16, 16, 16, 16, 8] * 3
    for line in some:  # within its epoch: 6 is the first step of the second one
        first = max(line.step - 3, (line.step - 1) // 5 * 5)
        chosen = slice(first, line.step)
        expected = np.average([step.loss for step in one[chosen]], weights=sizes[chosen])
        assert line.loss == pytest.approx(expected, rel=1e-6)
        assert line.epoch == (line.step - 1) // 5 + 1
    epochs = [line for line in read_metrics(every.run.metrics_file) if line.kind == "epoch"]
    for number, line in enumerate(epochs):
        chosen = slice(5 * number, 5 * number + 5)
        expected = np.average([step.loss for step in one[chosen]], weights=sizes[chosen])
        assert line.loss == pytest.approx(expected, rel=1e-6)


def test_missing_tensorboard_is_an_error_before_the_run(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--tensorboard"):
        fit(config(method="ce", tensorboard=True), splits)
    assert not Path("runs").exists()


def test_tensorboard_gets_every_line(workplace: Path, splits: Splits) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fit(config(method="ce", val_fraction=0.2, log_every=5, tensorboard=True), splits)
    events = EventAccumulator(str(result.run.path / "tensorboard"))
    events.Reload()
    lines = read_metrics(result.run.metrics_file)
    for kind in ("step", "epoch"):
        expected = [(line.step, line.loss) for line in lines if line.kind == kind]
        found = [(event.step, event.value) for event in events.Scalars(f"{kind}/loss")]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([loss for _, loss in expected], rel=1e-6)
    assert len(events.Scalars("epoch/val_accuracy")) == 3


def test_a_compiled_step_trains_and_leaves_an_ordinary_checkpoint(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    result = fit(config(method="ce", compile=True), splits)
    assert len(compiled) == 1
    plain = fit(config(method="ce"), splits)
    assert digest(result.run.student) == digest(plain.run.student)

    class CannotCompile(Exception):
        __module__ = "torch._inductor.exc"

    def broken(*rest: Any) -> None:
        raise CannotCompile("InvalidCxxCompiler: no working C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda network: broken)
    with pytest.raises(KdError, match="cannot compile") as caught:
        fit(config(method="ce", compile=True), splits)
    assert "C++" in caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    ["flop", "flip-flip", "", "flip-none", "none-crop", "flip,crop", "flip--crop", "resized", "mixup-cutmix"],
)
def test_unknown_augmentations_are_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="--augment"):
        config(augment=wrong)


def test_steps_of_an_augmentation_have_one_order() -> None:
    assert config(augment="mixup-crop-flip").augment == "flip-crop-mixup"
    assert config(augment="cutmix-resized-crop-flip").augment == "flip-resized-crop-cutmix"


def test_a_missing_accelerator_is_refused(workplace: Path, splits: Splits) -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this machine has MPS")
    with pytest.raises(UsageError, match="--accelerator mps"):
        fit(config(method="ce", accelerator="mps"), splits)
    with pytest.raises(UsageError, match="runs in one process"):
        fit(config(method="ce", devices=2), splits)


def test_constants_of_a_preprocessing_are_measured_once(
    workplace: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again for another split, other data, or when the file is damaged."""
    from kdcli.data import preprocess

    fits: list[str] = []
    measure = preprocess.fit

    def watch(name: str, *rest: Any, **more: Any) -> Any:
        fits.append(name)
        return measure(name, *rest, **more)

    monkeypatch.setattr(preprocess, "fit", watch)
    settings = {"method": "ce", "epochs": 1, "preprocess": "gcn-zca"}
    first = fit(config(**settings), splits)
    second = fit(config(**settings), splits)
    assert fits == ["gcn-zca"]
    assert digest(first.run.student) == digest(second.run.student)
    fit(config(**settings, val_fraction=0.3), splits)
    fit(config(**settings), make_splits(train=87))
    plain = fit(config(**{**settings, "preprocess": "mean-std"}), splits)
    assert len(fits) == 4
    trained_on = splits.train.images[split_validation(splits.train.labels, plain.config.val_fraction)[0]]
    mean = models.load(plain.run.student).preprocess.mean
    np.testing.assert_allclose(mean, trained_on.mean(axis=(0, 1, 2)), rtol=1e-6)
    for path in Path("cache/preprocess").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    again = fit(config(**settings), splits)
    assert len(fits) == 5
    assert digest(first.run.student) == digest(again.run.student)


def test_ema_is_its_recurrence() -> None:
    """Of a network whose two layers share their weights."""
    layer = nn.Linear(3, 3)
    ema = Ema(nn.Sequential(layer, layer), decay=0.9)
    expected = layer.weight.detach().double().numpy().copy()
    for step in range(100):
        with torch.no_grad():
            layer.weight.normal_(generator=torch.Generator().manual_seed(step))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double().numpy()
    last = layer.weight.detach().clone()
    ema.swap()
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, atol=1e-6)
    ema.swap()
    assert torch.equal(layer.weight, last)


def test_sgd_multiplies_the_rate_of_some_parameters_and_not_their_decay() -> None:
    """One step of SGD with Nesterov momentum 0.9: p − lr · f · (1.9 · g) − 1.9 · lr · decay · p."""
    network = models.build("cifarnet", classes=3, input_size=(32, 32, 3), width=0.1)
    optimizer = make_optimizer(config(optimizer="sgd", lr=0.5, weight_decay=0.01), network)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for value in network.parameters():
        value.grad = torch.full_like(value, 0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.5 * group["factor"]
    optimizer.step()
    factors = {"fc.weight": 1 / 81} | {f"group{n}.norm{m}.bias": 64.0 for n in (1, 2, 3) for m in (1, 2)}
    for name, value in network.named_parameters():
        fixed = name == "whiten.weight" or (".norm" in name and name.endswith("weight"))
        factor = 0.0 if fixed else factors.get(name, 1.0)
        decay = 0.0 if fixed else 0.01
        expected = before[name] - 1.9 * 0.5 * (factor * 0.1 + decay * before[name])
        torch.testing.assert_close(value.detach(), expected)
