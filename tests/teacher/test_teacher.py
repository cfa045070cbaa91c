"""Teacher passes: parts, sharing between runs, engines, damaged caches; several teachers."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from kdcli import models
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Event, Note, Progress
from kdcli.data import ImageSet, augment
from kdcli.data.preprocess import MeanStd
from kdcli.deploy.load import teachers_of
from kdcli.engine import fit
from kdcli.engine.plan import resolve
from kdcli.models import Classifier, checkpoint
from kdcli.teacher import CachedLogits, Teacher, runner
from kdcli.teacher.cache import top_k_of
from kdcli.teacher.runner import Engine, choose_engine
from tests.helpers import ROOT, config, disk_calls, image_set, make_splits, slow


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.teacher.cache.PART", 20)


def make_teacher(path: Path, classes: int = 3, scale: float = 1.0) -> Classifier:
    torch.manual_seed(5)
    network = models.build("convnet-tiny", classes=classes, input_size=(8, 8, 1))
    with torch.no_grad():
        network.fc.weight.mul_(scale)  # type: ignore[union-attr, operator]
    names = tuple(f"class {index}" for index in range(classes))
    made = Classifier(
        network,
        MeanStd(torch.tensor([90.0]), torch.tensor([60.0])),
        arch="convnet-tiny",
        arch_args={},
        classes=names,
        input_size=(8, 8, 1),
    ).eval()
    made.save(path)
    return made


@pytest.fixture
def images() -> ImageSet:
    return image_set(90)


def expected_of(model: Classifier, images: ImageSet) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        return model(torch.from_numpy(images.images)).numpy()


def test_a_stopped_pass_continues_with_its_missing_parts(workplace: Path, images: ImageSet) -> None:
    model = make_teacher(Path("t.pt"))
    seen: list[Progress] = []

    def note(event: Event) -> None:
        if isinstance(event, Progress):
            seen.append(event)

    opened = Teacher.open(Path("t.pt"), Path("cache"))
    assert opened.logits(images, on_event=note, stop=lambda: len(seen) >= 3) == []
    parts = sorted(Path("cache/teacher").rglob("part-*.npy"))
    assert [path.name for path in parts] == ["part-00000.npy", "part-00001.npy", "part-00002.npy"]
    os.truncate(parts[1], 200)
    seen.clear()
    [outputs] = Teacher.open(Path("t.pt"), Path("cache")).logits(images, on_event=note)
    assert [event.done for event in seen] == [60, 80, 90]  # the damaged part, and those that were missing
    np.testing.assert_allclose(outputs.logits().numpy(), expected_of(model, images), rtol=2e-3, atol=2e-3)
    assert not list(Path("cache/teacher").rglob("part-*"))


def test_two_runs_at_once_compute_each_view_once(workplace: Path, images: ImageSet) -> None:
    make_teacher(Path("t.pt"))
    ran: list[int] = []
    results: list[list[CachedLogits]] = []
    started = threading.Barrier(2)

    def run() -> None:
        opened = Teacher.open(Path("t.pt"), Path("cache"))
        started.wait()
        results.append(opened.logits(images, augment_name="flip-crop", views=6))
        ran.append(opened.views_computed)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(ran) == 6
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one.stored[0], two.stored[0])


def test_the_lock_of_a_view_is_waited_for_and_free_after_a_kill(workplace: Path, images: ImageSet) -> None:
    """A process takes the lock of a view and is then killed: until then a second run waits, and says so."""
    make_teacher(Path("t.pt"))
    opened = Teacher.open(Path("t.pt"), Path("cache"))
    opened.logits(images)
    [folder] = Path("cache/teacher").iterdir()
    (folder / "view-0000.npy").unlink()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom filelock import FileLock\n"
            f"lock = FileLock({str((folder / 'view-0000.lock').resolve())!r})\nlock.acquire()\n"
            "print('held', flush=True)\ntime.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    told: list[str] = []
    waited = threading.Event()

    def note(event: Event) -> None:
        if isinstance(event, Note):
            told.append(event.text)
            waited.set()

    found: list[list[CachedLogits]] = []
    thread = threading.Thread(target=lambda: found.append(opened.logits(images, on_event=note)))
    thread.start()
    assert waited.wait(30)
    assert "waiting" in told[0]
    time.sleep(0.1)
    assert not found
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    thread.join(30)
    assert len(found) == 1
    assert opened.views_computed == 2


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_a_teacher_replaced_before_its_first_use_is_refused(
    workplace: Path, images: ImageSet, suffix: str
) -> None:
    """Nothing is cached under the hash of the file that was opened, and the file is good for the next run."""
    path, other = Path(f"t{suffix}"), Path(f"other{suffix}")
    for place, scale in ((path, 1.0), (other, 2.0)):
        model = make_teacher(place.with_suffix(".pt"), scale=scale)
        if suffix == ".onnx":
            from kdcli.deploy.onnx_model.translate import to_onnx

            place.write_bytes(to_onnx(model, opset=18, with_preprocessing=True).SerializeToString())
    opened = Teacher.open(path, Path("cache"))
    other.replace(path)
    for use in (opened.logits, lambda data: opened.live()):
        with pytest.raises(KdError, match="was replaced"):
            use(images)
    assert not list(Path("cache").rglob("*.npy"))
    Teacher.open(path, Path("cache")).logits(images)


def test_a_live_teacher_with_dropout_is_read_once_more_as_it_was(workplace: Path) -> None:
    make_teacher(Path("t.pt"))
    opened = Teacher.open(Path("t.pt"), Path("cache"))
    assert opened.members[0].model is not None
    make_teacher(Path("t.pt"), scale=2.0)
    with pytest.raises(KdError, match="was replaced"):
        opened.live(dropout=0.5)


def test_views_that_torchvision_makes_are_cached_by_its_version(workplace: Path, images: ImageSet) -> None:
    make_teacher(Path("t.pt"))
    opened = Teacher.open(Path("t.pt"), Path("cache"))
    named = {
        name: "torchvision" in opened.cache(opened.members[0], images, name, 0, np.arange(3), False).key
        for name in ("none", "flip-crop-cutout", "resized-crop", "randaugment", "flip-jitter-mixup")
    }
    assert list(named.values()) == [False, False, True, True, True]


def test_outputs_of_another_precision_are_cached_apart(workplace: Path, images: ImageSet) -> None:
    make_teacher(Path("t.pt"))
    passes = [Teacher.open(Path("t.pt"), Path("cache"), precision=name) for name in ("32", "bf16", "auto")]
    for opened in passes:
        opened.logits(images)
    assert [opened.views_computed for opened in passes] == [1, 1, 1]
    exact = [opened.logits(images, exact=True) for opened in passes]  # float32 whatever the option says
    assert [opened.views_computed for opened in passes] == [2, 1, 1]
    assert len({outputs[0].stored[0].tobytes() for outputs in exact}) == 1


# --- what is kept ---------------------------------------------------------------------------------------------


def test_top_k_keeps_the_largest_and_the_mass_of_the_rest() -> None:
    logits = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32) * 4
    dense = CachedLogits((top_k_of(logits, 5),), (1.0,), 30).logits().numpy()
    order = np.argsort(-logits, axis=1)
    for row in range(40):
        top, rest = order[row, :5], order[row, 5:]
        np.testing.assert_allclose(dense[row, top], logits[row, top], rtol=1e-3, atol=1e-3)
        # the rest: one logit for all, with the same sum of exponentials
        assert len(np.unique(dense[row, rest])) == 1
        exact = np.log(np.exp(logits[row, rest].astype(np.float64)).sum())
        assert np.log(np.exp(dense[row, rest].astype(np.float64)).sum()) == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_a_cache_of_top_k_is_small_and_trains(workplace: Path, scale: float) -> None:
    """Also of logits that float16 cannot hold."""
    model = make_teacher(Path("t.pt"), classes=12, scale=scale)
    images = image_set(90, classes=12)
    opened = Teacher.open(Path("t.pt"), Path("cache"), top_k=2)
    [outputs] = opened.logits(images)
    assert outputs.stored[0].dtype.itemsize == (2 if scale == 1 else 4) * 2 + 2 * 2 + 4
    expected = expected_of(model, images)
    assert (outputs.logits().numpy().argmax(1) == expected.argmax(1)).mean() > 0.95  # float16 makes ties
    splits = make_splits(classes=12)
    result = fit(config(method="kd", teacher=Path("t.pt"), cache_top_k=2, epochs=1), splits)
    assert result.teacher_passes == 1  # the test images, whole; the training images are in the cache
    assert result.evaluation.agreement is not None


def test_the_largest_logits_are_found_in_order() -> None:
    random = np.random.default_rng(3).normal(size=(50, 400)).astype(np.float32)
    np.testing.assert_array_equal(
        top_k_of(random, 7)["class"], np.argsort(-random, axis=1, kind="stable")[:, :7]
    )


def test_invalid_top_k_is_refused(workplace: Path) -> None:
    make_teacher(Path("t.pt"))
    with pytest.raises(UsageError, match="regresses all logits"):
        fit(config(method="logits", teacher=Path("t.pt"), cache_top_k=2), make_splits())
    with pytest.raises(UsageError, match="there are 3 classes"):
        fit(config(method="kd", teacher=Path("t.pt"), cache_top_k=3), make_splits())
    assert not Path("runs").exists()


# --- fixed, views, off ----------------------------------------------------------------------------------------


def targets_seen(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[tuple[Any, ...]]:
    """(epoch, samples, images, teacher's logits) of each step."""
    from kdcli.engine import step

    seen: list[tuple[Any, ...]] = []
    original = step.Step.__call__

    def watch(self: Any, batch: Any, epoch: int, rate: float, done: float, teacher: Any) -> torch.Tensor:
        seen.append((epoch, batch.samples, batch.images.clone(), teacher[0].clone()))
        return original(self, batch, epoch, rate, done, teacher)

    monkeypatch.setattr(step.Step, "__call__", watch)
    fit(config(teacher=Path("t.pt"), method="kd", **settings), make_splits())
    return seen


@pytest.mark.parametrize("mode", ["views", "off", "fixed"])
def test_teacher_cache_modes(workplace: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    model = make_teacher(Path("t.pt"))
    steps = targets_seen(
        monkeypatch,
        augment="flip-crop-cutout",
        teacher_cache=mode,
        epochs=3,
        views=2 if mode == "views" else 0,
    )
    train = make_splits().train
    pictures: dict[int, dict[int, bytes]] = {}
    for epoch, samples, images, targets in steps:
        shown = torch.from_numpy(train.images[samples]) if mode == "fixed" else images
        with torch.inference_mode():
            torch.testing.assert_close(targets, model(shown), rtol=2e-3, atol=2e-3)
        view = pictures.setdefault(epoch, {})
        view.update({int(s): i.numpy().tobytes() for s, i in zip(samples, images, strict=True)})
    assert pictures[0] != pictures[1]
    assert (pictures[2] == pictures[0]) == (mode == "views")  # two views are cycled; else each is fresh


@pytest.mark.parametrize("name", ["flip-mixup", "flip-cutmix", "resized-crop-randaugment-jitter"])
def test_the_teacher_sees_the_views_of_the_student(
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_teacher(Path("t.pt"))
    for _, _, images, targets in targets_seen(monkeypatch, augment=name, epochs=2, ce_weight=1.0):
        with torch.inference_mode():
            torch.testing.assert_close(targets, model(images), rtol=2e-3, atol=2e-3)
    with pytest.raises(UsageError, match="has logits of unmixed images"):
        resolve(config(method="kd", augment="mixup", teacher_cache="fixed"))
    assert resolve(config(method="ce", augment="mixup", teacher_cache="fixed")).views == 3


def test_images_kept_for_validation_are_not_mixed_in(workplace: Path) -> None:
    samples = np.arange(1000)
    pool = np.arange(0, 1000, 7)
    mixed = augment.mixing("mixup", 3, 1, samples, pool, (1, 1))
    assert mixed is not None
    assert set(mixed.partners.tolist()) == set(pool.tolist())
    make_teacher(Path("t.pt"))
    opened = Teacher.open(Path("t.pt"), Path("cache"))
    for last in (40, 40, 50):  # another split is another cache
        opened.logits(image_set(90), augment_name="mixup", pool=np.arange(last))
    assert opened.views_computed == 2


# --- engine, precision, batch ---------------------------------------------------------------------------------


FORWARD_OF = functools.cache(runner.forward_of)  # a translation to ONNX takes seconds


class SimulatedClock:
    """A clock by which each engine takes the time it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: dict[str, float]) -> None:
        self.now = 0.0
        self.cost = cost
        self.name = ""
        monkeypatch.setattr("kdcli.base.timing.time.perf_counter", lambda: self.now)

        def timed(model: Any, engine: Engine, threads: int = 0) -> Any:
            forward = FORWARD_OF(model, engine, threads)

            def call(images: torch.Tensor) -> torch.Tensor:
                self.now += self.cost[f"{engine.name} {engine.precision}"] * (len(images) + 16)
                return forward(images)

            return call

        monkeypatch.setattr(runner, "forward_of", timed)


COSTS = {"torch 32": 1.0, "torch bf16": 0.5, "onnxruntime 32": 0.7}


def test_the_fastest_engine_with_the_same_classes_is_chosen(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, images: ImageSet
) -> None:
    model = make_teacher(Path("t.pt"))

    def take(count: int) -> torch.Tensor:
        return torch.from_numpy(images.images[:count])

    def engine(costs: dict[str, float], precision: str = "auto", count: int = 90) -> Engine:
        with monkeypatch.context() as patch:
            SimulatedClock(patch, costs)
            return choose_engine(model, take, count=count, precision=precision, on_event=lambda event: None)

    chosen = engine({**COSTS, "torch bf16": 9.0})
    assert (chosen.name, chosen.precision, chosen.batch_size) == (
        "onnxruntime",
        "32",
        128,
    )  # 90: no more are there
    assert chosen.agreement == 100
    assert engine(COSTS, "32").name == "onnxruntime"
    assert engine({**COSTS, "torch 32": 0.1}).name == "torch"
    bf16 = engine(COSTS)  # taken only if it agrees; these logits lie far apart or not, the check decides
    with torch.inference_mode():
        plain, half = model(take(90)), runner.forward_of(model, Engine("torch", "bf16"))(take(90))
    agreement = 100 * float((plain.argmax(1) == half.argmax(1)).double().mean())
    assert (bf16.precision == "bf16") == (agreement >= 99.9)
    assert engine(COSTS, "bf16") == Engine("torch", "bf16")
    short = engine(COSTS, "32", count=40)  # 50 s
    assert (short.name, short.batch_size) == ("torch", 64)


@pytest.mark.slow
def test_bf16_that_changes_classes_is_not_chosen(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, images: ImageSet
) -> None:
    model = make_teacher(Path("t.pt"))
    SimulatedClock(monkeypatch, {**COSTS, "torch bf16": 0.01})
    made = runner.forward_of

    def wrong(model: Any, engine: Engine, threads: int = 0) -> Any:
        forward = made(model, engine, threads)
        return (lambda images: -forward(images)) if engine.precision == "bf16" else forward

    monkeypatch.setattr(runner, "forward_of", wrong)
    chosen = choose_engine(
        model,
        lambda count: torch.from_numpy(images.images[:count]),
        count=90,
        precision="auto",
        on_event=lambda event: None,
    )
    assert chosen.name == "onnxruntime"


def test_onnxruntime_equals_torch(workplace: Path, images: ImageSet) -> None:
    model = make_teacher(Path("t.pt"))
    with torch.inference_mode():
        found = runner.forward_of(model, Engine("onnxruntime"))(torch.from_numpy(images.images)).numpy()
    np.testing.assert_allclose(found, expected_of(model, images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_warm_cache_loads_neither_teacher_nor_onnxruntime(
    workplace: Path,
) -> None:
    """A second run of another method never reads the teacher."""
    make_teacher(Path("t.pt"))
    data = make_splits()
    fit(config(method="kd", teacher=Path("t.pt"), augment="flip", name="a"), data)
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom kdcli import models\nfrom kdcli.teacher import member\n"
        "def refuse(*rest): raise AssertionError('the teacher was read')\n"
        "member.load_model = refuse\n"
        "from tests.helpers import make_splits\nfrom tests.helpers import config\n"
        "from kdcli.engine import fit\n"
        "result = fit(config(method='logits', teacher=Path('t.pt'), augment='flip', name='b'), make_splits())\n"
        "assert result.teacher_passes == 0\n"
        "assert not {'onnxruntime', 'onnx', 'lightning_fabric', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_manifest_records_the_engine(workplace: Path, images: ImageSet) -> None:
    make_teacher(Path("t.pt"))
    Teacher.open(Path("t.pt"), Path("cache"), precision="bf16").logits(images)
    [manifest] = Path("cache/teacher").glob("*/manifest.json")
    made = json.loads(manifest.read_text())["made_by"]["view-0000.npy"]
    assert (made["name"], made["precision"]) == ("torch", "bf16")


def test_a_view_is_on_the_disk_before_it_is_listed(
    workplace: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_teacher(Path("t.pt"))
    calls = disk_calls(monkeypatch)
    Teacher.open(Path("t.pt"), Path("cache")).logits(images)
    named, listed = (calls.index(("rename", name)) for name in ("view-0000.npy", "manifest.json"))
    [folder] = Path("cache/teacher").iterdir()
    assert calls[named - 1][0] == "sync" and calls[named - 1][1].startswith(".view-0000.npy.")
    assert calls[named + 1] == ("sync", folder.name) and named + 1 < listed


def test_a_live_onnx_teacher(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX file can teach in each step, from raw images to probabilities; it has no dropout to leave on."""
    from kdcli.deploy.onnx_model.metadata import make_metadata
    from kdcli.deploy.onnx_model.translate import to_onnx

    model = make_teacher(Path("t.pt"))
    exported = to_onnx(model, opset=18, with_preprocessing=True)
    onnx.helper.set_model_props(exported, make_metadata(model, with_preprocessing=True))
    Path("t.onnx").write_bytes(exported.SerializeToString())
    with pytest.raises(KdError, match="needs a \\.pt teacher"):
        fit(config(method="kd", teacher=Path("t.onnx"), teacher_dropout=0.5), make_splits())
    images = torch.from_numpy(make_splits().train.images[:9])
    live = Teacher.open(Path("t.onnx"), Path("cache")).live()
    with torch.inference_mode():
        expected = model(images).log_softmax(1)
    torch.testing.assert_close(live(images, 0, np.arange(9))[0], expected, rtol=1e-4, atol=1e-4)
    result = fit(config(method="kd", teacher=Path("t.onnx"), teacher_cache="off", epochs=1), make_splits())
    assert result.teacher_passes == 1  # the test images


@pytest.mark.parametrize("count", [3, slow(63)])
def test_views_of_fewer_images_than_a_batch(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """A pass over all views is longer than the data: what is timed first must be taken from the images there are."""
    make_teacher(Path("t.pt"))
    splits = make_splits(train=count, test=6)
    for measured_from_s in (runner._MEASURED_FROM_S, 0.0):  # a short pass, and one that is measured first
        monkeypatch.setattr(runner, "_MEASURED_FROM_S", measured_from_s)
        opened = Teacher.open(Path("t.pt"), Path(f"cache-{measured_from_s}"))
        views = opened.logits(splits.train, augment_name="flip-crop", views=30)
        assert [len(view.stored[0]) for view in views] == [count] * 30


# --- several teachers ------------------------------------------------------------------------------------------


def test_several_teachers_are_the_weighted_mean_of_their_logits(workplace: Path) -> None:
    splits = make_splits()
    first, second = make_teacher(Path("a.pt")), make_teacher(Path("b.pt"), scale=3.0)
    both = Teacher.open([Path("a.pt"), Path("b.pt")], Path("cache"), weights=(3.0, 1.0))
    [kept] = both.logits(splits.train)
    images = torch.from_numpy(splits.train.images)
    expected = 0.75 * first(images) + 0.25 * second(images)
    torch.testing.assert_close(kept.logits(), expected.detach(), rtol=2e-3, atol=2e-3)  # kept as float16
    samples = np.array([4, 1])
    torch.testing.assert_close(kept.logits(samples), kept.logits()[[4, 1]])
    wide = np.concatenate(list(kept.chunks(np.arange(len(splits.train)))))
    np.testing.assert_allclose(wide, kept.logits().numpy(), rtol=1e-6, atol=1e-6)
    live, _ = both.live()(images[:5], 0, np.arange(5))
    torch.testing.assert_close(live, expected[:5].detach(), rtol=1e-5, atol=1e-5)
    assert both.views_computed == 2
    turned = Teacher.open([Path("b.pt"), Path("a.pt")], Path("cache"))
    turned.logits(splits.train)
    assert turned.views_computed == 0  # each has its own outputs in the cache


def test_provenance_of_several_teachers(workplace: Path) -> None:
    splits = make_splits()
    for name, scale in (("a.pt", 1.0), ("b.pt", 3.0)):
        make_teacher(Path(name), scale=scale)
    result = fit(config(method="logits", teacher=["a.pt", "b.pt"], teacher_weight=[1, 3], epochs=1), splits)
    assert result.teacher_passes == 4  # two over the training images, two over the test images
    recorded = checkpoint.load(result.run.student).provenance
    assert [
        (path.name, round(entry["weight"], 6))
        for (path, _, _), entry in zip(teachers_of(recorded), recorded["teacher"]["teachers"], strict=True)
    ] == [("a.pt", 0.25), ("b.pt", 0.75)]
    assert result.config.teacher == (Path("a.pt"), Path("b.pt"))
    again = fit(config(method="kd", teacher=["b.pt"], epochs=1), splits)
    assert again.teacher_passes == 0
    for weights, told in (([1], "1 for 2 teachers"), ([0, 0], "above 0"), ([-1, 2], "0 or more")):
        with pytest.raises(UsageError, match=told):
            config(teacher=["a.pt", "b.pt"], teacher_weight=weights)


@pytest.mark.parametrize(
    "word",
    [None, "x", {}, {"path": 3}, {"path": "a\0b"}, {"teachers": [3, {"path": "a.pt", "sha256": "0"}]}, []],
)
def test_teachers_of_malformed_provenance(word: object) -> None:
    found = [(path, sha256) for path, sha256, _ in teachers_of({"teacher": word})]
    assert found == ([(Path("a.pt"), "0")] if isinstance(word, dict) and "teachers" in word else [])
