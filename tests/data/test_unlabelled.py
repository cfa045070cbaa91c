"""Images without labels: what becomes of the files, that nothing leaks, and that no label is read."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import signal
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdcli import data, methods, models
from kdcli.base.config import CompareConfig, make
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Event, Note
from kdcli.cli import export as export_command
from kdcli.cli import test as test_command
from kdcli.cli import train as train_command
from kdcli.cli import tune as tune_command
from kdcli.data import Splits, rows, unlabelled
from kdcli.data.split import split_validation
from kdcli.engine import RunDir, RunResult, fit
from kdcli.engine.feed import Feed
from kdcli.engine.plan import load_data
from kdcli.models import checkpoint
from kdcli.studies.compare import compare, make_plan
from kdcli.studies.reproduce import check_inputs, read_finished
from tests.helpers import StopAfter, command_line, config, digest_without_clocks, image_set

UInt8 = npt.NDArray[np.uint8]
SIZE = (8, 8, 3)
COUNTS = {"train": 18, "test": 12}
MORE = 60


def save(path: Path, pixels: UInt8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with toy/ (a data set of three classes), more/ (images of the same classes) and teacher.pt."""
    place = tmp_path_factory.mktemp("made")
    for seed, (part, count) in enumerate(COUNTS.items()):
        images = image_set(count, SIZE, seed=seed)
        for number, (pixels, label) in enumerate(zip(images.images, images.labels, strict=True)):
            save(place / "toy" / part / f"class {label}" / f"{number:03d}.png", np.asarray(pixels))
    for number, pixels in enumerate(image_set(MORE, SIZE, seed=7).images):
        save(place / "more" / "abc"[number % 3] / "deep" / f"{number:03d}.png", pixels)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        learned = replace(data.load("toy"), train=image_set(90, SIZE, seed=7))
        fit(config(method="ce", student="convnet-small", epochs=6, name="teacher"), learned)
        shutil.copy("runs/teacher/student.pt", "teacher.pt")
        shutil.rmtree("runs")
        shutil.rmtree("cache")
    return place


@pytest.fixture
def place(made: Path, workplace: Path) -> Path:
    shutil.copytree(made, workplace, dirs_exist_ok=True)
    return workplace


def taught(**changes: Any) -> Any:
    plain = {"method": "logits", "teacher": "teacher.pt", "student": "convnet-tiny", "val_fraction": 0.0}
    return config(**{**plain, **changes})


def loaded(notes: list[Event] | None = None, path: str = "more", **more: Any) -> Splits:
    heard = [] if notes is None else notes
    return data.load("toy", unlabelled=Path(path), on_event=heard.append, **more)


def texts(notes: list[Event]) -> list[str]:
    return [event.text for event in notes if isinstance(event, Note)]


def weights_of(result: RunResult) -> str:
    return checkpoint.digest(checkpoint.load(result.run.student).state_dict)


def more_of(splits: Splits) -> UInt8:
    assert splits.unlabelled is not None
    return rows.take(splits.unlabelled.images, slice(None))


# --- what becomes of the files -------------------------------------------------------------------------------


def by_name(folder: str) -> UInt8:
    paths = sorted(Path(folder).rglob("*.png"), key=lambda path: path.relative_to(folder).as_posix())
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def test_images_at_any_depth_are_taken_by_name_and_have_no_labels(place: Path) -> None:
    notes: list[Event] = []
    splits = loaded(notes)
    np.testing.assert_array_equal(more_of(splits), by_name("more"))
    assert splits.unlabelled is not None
    assert splits.unlabelled.labels.tolist() == [-1] * MORE
    assert f"{MORE} unlabelled images from more." in texts(notes)
    plain = data.load("toy")
    assert splits.train.fingerprint == plain.train.fingerprint
    assert splits.trained_on.fingerprint != plain.trained_on.fingerprint == plain.train.fingerprint
    assert splits.trained_on.labels.tolist() == [*plain.train.labels.tolist(), *[-1] * MORE]


def test_a_tar_and_a_zip_file_give_what_the_folder_gives(place: Path) -> None:
    with tarfile.open("more.tar.gz", "w:gz") as tar, zipfile.ZipFile("more.zip", "w") as archive:
        for path in sorted(Path("more").rglob("*.png"), reverse=True):  # in another order
            tar.add(path)
            archive.write(path)
    expected = more_of(loaded())
    for name in ("more.tar.gz", "more.zip"):
        np.testing.assert_array_equal(more_of(loaded(path=name)), expected)
    assert not Path("more.tar").exists()


def test_unlabelled_images_get_the_size_and_channels_of_the_data(place: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    save(Path("wide/one.png"), pixels)
    found = more_of(loaded(path="wide", grey=True))
    resized = Image.fromarray(pixels).convert("L").resize((12, 8), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((2, 0, 10, 8)))
    np.testing.assert_array_equal(found, expected[None, :, :, None])
    assert more_of(loaded(path="wide", image_size=16)).shape == (1, 16, 16, 3)


def test_images_that_are_not_square_must_have_the_size_of_the_data(place: Path) -> None:
    for part in ("train", "test"):
        for label in range(2):
            value = 100 * label + len(part)
            save(Path("flat") / part / str(label) / "0.png", np.full((6, 9, 3), value, np.uint8))
    save(Path("same/a.png"), np.full((6, 9, 3), 77, np.uint8))
    save(Path("other/a.png"), np.full((9, 9, 3), 77, np.uint8))
    assert more_of(data.load("flat", unlabelled=Path("same"))).shape == (1, 6, 9, 3)
    with pytest.raises(KdError, match=r"image a\.png is 9×9×3, the data's images are 6×9×3"):
        data.load("flat", unlabelled=Path("other"))


def test_images_of_the_data_are_left_out_and_counted(place: Path) -> None:
    for number, path in enumerate(sorted(Path("toy/test").rglob("*.png"))[:5]):
        Image.open(path).save(f"more/a/copy {number}.bmp")  # other bytes, the same pixels
    shutil.copy("toy/train/class 0/000.png", "more/z.png")
    almost = np.asarray(Image.open("toy/test/class 0/000.png")).copy()
    almost[0, 0, 0] ^= 1
    save(Path("more/zz.png"), almost)
    notes: list[Event] = []
    found = more_of(loaded(notes))
    assert len(found) == MORE + 1
    np.testing.assert_array_equal(found[-1], almost)
    told = texts(notes)
    assert "Left out 5 images in more that are among the test images." in told
    assert "Left out 1 images in more that are among the training images." in told
    tests = {image.tobytes() for image in by_name("toy/test")}
    assert not tests & {image.tobytes() for image in found}
    again: list[Event] = []
    loaded(again)  # from the cache
    assert texts(again) == told


def test_a_copy_of_other_test_images_is_found_though_the_same_folder_was_read_before(place: Path) -> None:
    before = more_of(loaded())
    shutil.copytree("toy", "other")
    save(Path("other/test/class 1/new.png"), before[4])
    found = more_of(data.load("other", unlabelled=Path("more")))
    np.testing.assert_array_equal(found, np.delete(before, 4, axis=0))


def test_hidden_files_and_other_files_are_skipped(place: Path) -> None:
    for name in (".hidden/a.png", "__MACOSX/a.png", "a/.b.png"):
        save(Path("more") / name, np.zeros(SIZE, np.uint8))
    Path("more/readme.txt").write_text("not an image")
    notes: list[Event] = []
    assert len(more_of(loaded(notes))) == MORE
    assert "more: Skipped 1 files that are not images (readme.txt)." in texts(notes)


def test_a_broken_image_is_an_error_or_left_out(place: Path) -> None:
    whole = Path("more/a/deep/000.png").read_bytes()
    Path("more/a/deep/003.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(KdError, match=r"cannot read image a/deep/003\.png"):
        loaded()
    notes: list[Event] = []
    assert len(more_of(loaded(notes, skip_broken=True))) == MORE - 1
    assert "more: Skipped 1 broken images (a/deep/003.png)." in texts(notes)
    with pytest.raises(KdError, match="cannot read image"):  # not the pack that has a gap
        loaded()
    shutil.rmtree("more")
    Path("more").mkdir()
    Path("more/a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(KdError, match=r"no images in more: all are broken, as a\.png"):
        loaded(skip_broken=True)
    assert not list(Path("cache/data").glob(".*"))  # nothing half-written


def test_unreadable_sources_are_one_error_line(place: Path) -> None:
    with pytest.raises(UsageError, match="no unlabelled images at nowhere"):
        loaded(path="nowhere")
    Path("text").write_text("text")
    with pytest.raises(KdError, match="text is not an archive") as caught:
        loaded(path="text")
    assert "Give a folder" in caught.value.hint
    Path("empty").mkdir()
    with pytest.raises(KdError, match=r"no images in empty\n"):
        loaded(path="empty")
    with pytest.raises(KdError, match="all 12 images in toy/test are among those of toy"):
        loaded(path="toy/test")
    with zipfile.ZipFile("climbs.zip", "w") as archive:
        archive.write("more/a/deep/000.png", "../a.png")
    with pytest.raises(KdError, match="unsafe name"):
        loaded(path="climbs.zip")


def test_files_are_decoded_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = more_of(loaded())
    monkeypatch.setattr(unlabelled, "decode_all", lambda *_: pytest.fail("decoded again"))
    np.testing.assert_array_equal(more_of(loaded()), first)


# --- two arrays as one ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[rows.Images, rows.Images, UInt8]:
    folder = tmp_path_factory.mktemp("maps")
    arrays = [
        np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), np.uint8) for seed, n in ((0, 7), (1, 5))
    ]
    maps = []
    for number, array in enumerate(arrays):
        np.save(folder / f"{number}.npy", array)
        maps.append(np.load(folder / f"{number}.npy", mmap_mode="r"))
    return maps[0], maps[1], np.concatenate(arrays)


@settings(max_examples=50, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 11), max_size=9),
    bounds=st.tuples(*[st.none() | st.integers(-14, 14)] * 2),
    step=st.none() | st.integers(1, 4),
)
def test_joined_maps_give_what_their_concatenation_gives(
    parts: tuple[rows.Images, rows.Images, UInt8],
    numbers: list[int],
    bounds: tuple[int | None, int | None],
    step: int | None,
) -> None:
    first, second, whole = parts
    joined = rows.Joined(first, second)
    assert (joined.shape, joined.nbytes, len(joined)) == (whole.shape, whole.nbytes, len(whole))
    for chosen in (np.array(numbers, dtype=np.int64), slice(*bounds, step)):
        found = rows.take(joined, chosen)
        np.testing.assert_array_equal(found, whole[chosen])
        assert found.flags.c_contiguous
        assert found.flags.writeable  # a copy: torch takes no read-only map


# --- training ------------------------------------------------------------------------------------------------


def test_a_student_learns_from_them_and_no_label_is_read(place: Path) -> None:
    splits = loaded()
    first = fit(taught(epochs=8), splits)
    assert first.evaluation.accuracy > 90
    assert first.unlabelled is not None
    assert first.unlabelled.count == MORE
    train = splits.train
    turned = replace(train, labels=(train.labels + 1) % 3, fingerprint="turned")
    permuted = fit(taught(epochs=8), replace(splits, train=turned))
    assert weights_of(permuted) == weights_of(first)
    without = fit(taught(epochs=8), data.load("toy"))
    assert weights_of(without) != weights_of(first)
    assert without.unlabelled is None
    constants = [models.load(result.run.student).preprocess.spec() for result in (first, without)]
    assert checkpoint.digest(constants[0]) == checkpoint.digest(constants[1])  # measured on labelled images


def test_all_of_them_and_no_validation_image_are_trained_on_and_mixed_in(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools, seen = [], set()
    make = Feed.make

    def spied(self: Feed, view: int, samples: Any, *more: Any) -> Any:
        pools.append(self.pool)
        seen.update(samples.tolist())
        return make(self, view, samples, *more)

    monkeypatch.setattr(Feed, "make", spied)
    splits = loaded()
    result = fit(taught(augment="flip-mixup", epochs=1, val_fraction=0.3), splits)
    training, validation = split_validation(splits.train.labels, 0.3)
    assert len(validation) == 6
    expected = {*training.tolist(), *range(COUNTS["train"], COUNTS["train"] + MORE)}
    assert seen == set(pools[0].tolist()) == expected
    assert result.val_accuracy is not None


def test_another_method_does_not_run_the_teacher_again_and_other_images_do(place: Path) -> None:
    assert fit(taught(epochs=1), loaded()).teacher_passes == 2  # train and test images
    assert fit(taught(epochs=1, method="kd", lamda=0.0), loaded()).teacher_passes == 0
    save(Path("more/a/deep/000.png"), np.zeros(SIZE, np.uint8))
    assert fit(taught(epochs=1), loaded()).teacher_passes == 1


def test_feature_methods_train_on_unlabelled_images(place: Path) -> None:
    result = fit(taught(method="logits+at", epochs=1), loaded())
    assert set(result.history[0].terms) == {"logits", "at"}


def test_a_run_that_was_interrupted_ends_as_the_whole_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    changes = {"epochs": 3, "augment": "flip", "batch_size": 8, "val_fraction": 0.2}
    whole = fit(taught(**changes), loaded())
    with pytest.raises(Interrupted):
        fit(taught(**changes, name="cut"), loaded(), on_event=StopAfter(115, signal.SIGINT))
    run = RunDir.existing(Path("runs/cut"))
    settings_of_run = run.read_config()
    resumed = fit(settings_of_run, loaded(), resume=run)
    assert resumed.resumed_with_differences == ()
    states = [checkpoint.load(result.run.last) for result in (whole, resumed)]
    assert digest_without_clocks([states[0].state_dict, states[0].training]) == digest_without_clocks(
        [states[1].state_dict, states[1].training]
    )
    shutil.rmtree(resumed.run.path)
    with pytest.raises(Interrupted):
        fit(taught(**changes, name="cut"), loaded(), on_event=StopAfter(115, signal.SIGINT))
    for other in (data.load("toy"), _one_less()):
        with pytest.raises(KdError, match="the images without labels of runs/cut changed"):
            fit(settings_of_run, other, resume=run)


def _one_less() -> Splits:
    Path("more/a/deep/000.png").unlink()
    return loaded()


# --- methods that read labels --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"method": "ce"}, "logits"),
        ({"method": "ls"}, "logits"),
        ({"method": "kd"}, "--lamda 0"),
        ({"method": "kd", "lamda": 0.0, "ce_weight": 0.5}, "--ce-weight 0"),
        ({"method": "logits", "weight": ("ce=0:1",)}, "--ce-weight 0"),
        ({"method": "at"}, "logits+at"),
        ({"method": "dkd", "ce_weight": 0.0}, "logits"),
        ({"method": "crd", "ce_weight": 0.0}, "logits"),
        ({"method": "logits+ls"}, "logits"),
    ],
    ids=str,
)
def test_a_method_that_reads_labels_is_refused_before_anything_is_read(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], hint: str
) -> None:
    settings_of_run = config(**changes)
    with pytest.raises(UsageError, match=r"reads labels, and unlabelled images have none") as caught:
        methods.objective(settings_of_run).check(unlabelled=True)
    assert hint in str(caught.value.hint)
    images = image_set(9)
    with pytest.raises(UsageError, match="reads labels"):
        fit(settings_of_run, Splits("toy", "toy", images, images, unlabelled=images))
    words = []
    for name, value in changes.items():
        words += [f"--{name.replace('_', '-')}", value[0] if isinstance(value, tuple) else str(value)]
    with pytest.raises(UsageError, match="reads labels"):
        command_line(monkeypatch, train_command)(*words, "--unlabelled", "nowhere", "--data", "nowhere")
    assert not list(workplace.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "logits"},
        {"method": "noisy"},
        {"method": "kd", "lamda": 0.0},
        {"method": "kd", "ce_weight": 0.0},
        {"method": "logits+at"},
        {"method": "logits+dkd", "weight": ("dkd=0",)},
    ],
    ids=str,
)
def test_a_method_without_labels_is_accepted(changes: dict[str, Any]) -> None:
    methods.objective(config(**changes)).check(unlabelled=True)


# --- by the command line -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_test_and_export_by_the_command_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.make_archive("more", "tar", "more")
    call = command_line(monkeypatch, train_command, test_command, export_command)
    words = "train --method kd --lamda 0 --teacher teacher.pt --data toy --student convnet-tiny --epochs 1"
    more = "--name one --threads 1 --unlabelled more.tar --json"
    assert call(*shlex.split(words), *shlex.split(more)).exit_code == 0
    written = json.loads(Path("runs/one/result.json").read_text())
    assert written["unlabelled"]["count"] == MORE
    assert 'unlabelled = "more.tar"' in Path("runs/one/config.toml").read_text()
    stored = checkpoint.load(Path("runs/one/student.pt")).provenance
    assert stored["data"]["unlabelled"] == written["unlabelled"]
    assert written["unlabelled"]["spec"] == "more.tar"
    Path("more.tar").unlink()
    assert call("test", "runs/one/student.pt", "--threads", "1").exit_code == 0
    assert call("export", "runs/one/student.pt").exit_code == 0
    assert Path("exports/one.onnx").is_file()
    with pytest.raises(KdError, match=r"no unlabelled images at more\.tar"):
        call("train", "--resume", "runs/one")


def test_a_forged_header_is_one_error_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "BMP")
    content = bytearray(buffer.getvalue())
    content[18:26] = (100_000).to_bytes(4, "little") * 2  # width and height
    Path("more/huge.bmp").write_bytes(bytes(content))
    with pytest.raises(KdError, match=r"image huge\.bmp has more than 64 million pixels"):
        command_line(monkeypatch, train_command)(
            *shlex.split("--method logits --teacher teacher.pt --data toy --unlabelled more")
        )
    assert not Path("runs").exists()


# --- comparisons, searches and repetitions --------------------------------------------------------------------


def test_runs_with_other_unlabelled_images_differ_in_identity(place: Path) -> None:
    settings = make(CompareConfig, {"methods": "logits,noisy", "seeds": "1", "name": "c"})
    values = taught(epochs=1, data="toy", unlabelled="more").model_dump(exclude_defaults=True)
    plan = make_plan(settings, {name: value for name, value in values.items() if name != "method"})
    compare(plan, load_data(plan.train))
    run = RunDir.of(plan.runs[0]).path
    assert check_inputs(read_finished(run)).unlabelled is not None
    Path("more/a/deep/000.png").unlink()
    with pytest.raises(KdError, match="images without labels of comparisons/c changed"):
        compare(plan, load_data(plan.train))
    with pytest.raises(KdError, match="the images without labels of"):
        check_inputs(read_finished(run))
    plain = fit(taught(epochs=1, data="toy", name="plain"), data.load("toy")).run
    with plain.config_file.open("a") as file:
        file.write('unlabelled = "more"\n')
    with pytest.raises(KdError, match="the images without labels of"):
        check_inputs(read_finished(plain.path))


@pytest.mark.slow
def test_a_search_trains_on_unlabelled_images_identified_by_content(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = command_line(monkeypatch, train_command, tune_command)
    words = shlex.split(
        "tune --tune lr=1e-3:1e-1 --method logits --teacher teacher.pt --student convnet-tiny --data toy "
        "--epochs 1 --threads 1 --precision 32 --val-fraction 0.2 --trials 1 --study s --unlabelled"
    )
    assert call(*words, "more").exit_code == 0
    [result] = [json.loads(path.read_text()) for path in Path("runs/s").glob("trial-*/result.json")]
    assert result["unlabelled"]["count"] == MORE
    shutil.move("more", "moved")
    assert call(*words, "moved").exit_code == 0
    Path("moved/a/deep/000.png").unlink()
    with pytest.raises(UsageError, match="images without labels was"):
        call(*words, "moved")
