"""Resuming: a run that was killed, stopped or out of disk space ends with the same bits."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Epoch, Event, Note
from kdcli.data import Splits
from kdcli.engine import RunDir, fit, read_metrics, read_result
from kdcli.engine.state import State
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint
from tests.helpers import ROOT, StopAfter, config, digest_without_clocks, image_folder, make_splits, slow

KILLS = 20
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
KD = (sys.executable, "-m", "kdcli")


def state_of(run: RunDir) -> dict[str, Any]:
    """All that a run leaves, without what the clock says."""
    stored = checkpoint.load(run.last)
    result = json.loads(run.result_file.read_text())
    return {
        "student": checkpoint.digest(checkpoint.load(run.student).state_dict),
        "state": digest_without_clocks([stored.state_dict, stored.training]),
        "metrics": [
            {key: value for key, value in line.to_dict().items() if key not in ("seconds", "images_per_s")}
            for line in read_metrics(run.metrics_file)
        ],
        "test": result["test"],
        "marks": result["resumed_with_differences"],
    }


@pytest.mark.slow
def test_a_run_killed_twenty_times_is_bit_identical(workplace: Path) -> None:
    """SIGKILL to a real `kd train`: the first while it starts, the others wherever they hit between two lines."""
    image_folder(Path("images"))  # not the digits: scikit-learn alone would be a second of each start
    common = "--data images --student lenet-caffe --threads 1 --precision 32 -q"
    settings = shlex.split(
        f"{common} --method noisy --augment flip-crop --views 2 --epochs 4 --batch-size 16 --save-every 3steps "
        "--log-every 1 --val-fraction 0.1"
    )
    teacher = shlex.split(f"train {common} --method ce --epochs 1 --name teacher")
    subprocess.run([*KD, *teacher], env=ENVIRONMENT, check=True)
    settings += ["--teacher", "runs/teacher/student.pt"]
    subprocess.run([*KD, "train", *settings, "--name", "whole"], env=ENVIRONMENT, check=True)
    shutil.rmtree("cache/teacher")  # its passes are among what is killed
    expected = state_of(RunDir(Path("runs/whole")))
    total = len(expected["metrics"])
    run = RunDir(Path("runs/cut"))
    killed = 0
    for kill in range(KILLS + 1):
        words = ["--resume", "runs/cut", "-q"] if run.config_file.exists() else [*settings, "--name", "cut"]
        process = subprocess.Popen([*KD, "train", *words], env=ENVIRONMENT)
        if kill == 0:
            time.sleep(0.3)
        while process.poll() is None and kill < KILLS:
            lines = run.metrics_file.read_bytes().count(b"\n") if run.metrics_file.exists() else 0
            if kill == 0 or lines >= kill * total / KILLS:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.0005)
        killed += process.wait() == -signal.SIGKILL
    assert process.returncode == 0
    assert killed >= KILLS - 1  # the last one may have come too late
    assert state_of(run) == expected
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]  # no scratch is left


def test_a_run_is_trained_by_one_process_at_a_time(workplace: Path, splits: Splits) -> None:
    run = stopped("x", splits, method="ce")
    code = (
        "import pathlib, time\nfrom kdcli.engine import RunDir\n"
        "with RunDir(pathlib.Path('runs/x')).held():\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    before = run.last.read_bytes(), run.metrics_file.read_bytes()
    with pytest.raises(UsageError, match=f"runs/x is in use: process {other.pid} on .* trains it"):
        fit(run.read_config(), splits, resume=run)
    assert (run.last.read_bytes(), run.metrics_file.read_bytes()) == before
    other.kill()
    other.wait()
    fit(run.read_config(), splits, resume=run)


def test_a_new_run_is_held_while_it_is_trained(workplace: Path, splits: Splits) -> None:
    def second(event: Event) -> None:
        if isinstance(event, Epoch):
            with pytest.raises(UsageError, match=f"runs/x is in use: process {os.getpid()} on "):
                fit(config(method="ce", name="x"), splits, resume=RunDir(Path("runs/x")))
            refused.append(event.epoch)

    refused: list[int] = []
    fit(config(method="ce", name="x"), splits, on_event=second)
    assert refused == [1, 2, 3]


# --- what must be in the state -------------------------------------------------------------------------------


def stopped(name: str, splits: Splits, **settings: Any) -> RunDir:
    """A run interrupted in the middle of its second epoch, between two lines of metrics."""
    with pytest.raises(Interrupted):
        fit(config(**settings, name=name), splits, on_event=StopAfter(115, signal.SIGINT))
    return RunDir.existing(Path("runs") / name)


def rewrite(run: RunDir, change: Callable[[dict[str, Any]], None]) -> None:
    """Alter last.pt as a faulty saver would have written it."""
    stored = checkpoint.load(run.last)
    document = asdict(stored)
    change(document)
    checkpoint.save(run.last, checkpoint.Checkpoint(**document))


SETTINGS: dict[str, Any] = {
    "method": "ce",
    "student": "nin",  # it has dropout
    "width": 0.25,
    "augment": "flip-crop",
    "lr": 1e-3,
    "val_fraction": 0.2,
    "log_every": 2,
    "ema": 0.9,
}
TIMES = {"seconds", "epoch_seconds", "logged_seconds", "marks"}
PARTS = ["weights", "optimizer", "ema", *(field.name for field in fields(State) if field.name not in TIMES)]


def reference_runs(folder: Path, splits: Splits, **settings: Any) -> Path:
    """A folder with three runs of the same settings: `whole`, `start` (stopped in its first epoch), `cut`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
        fit(config(**settings, name="whole"), splits)
        with pytest.raises(Interrupted):
            fit(config(**settings, name="start"), splits, on_event=StopAfter(1, signal.SIGINT))
        stopped("cut", splits, **settings)
    return folder / "runs"


@pytest.fixture(scope="module")
def splits() -> Splits:
    return make_splits(size=(8, 8, 3))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> Path:
    """`reference_runs` of SETTINGS."""
    return reference_runs(tmp_path_factory.mktemp("reference"), splits, **SETTINGS)


def copy_of_cut(reference: Path) -> RunDir:
    """The interrupted run, copied into the current folder."""
    shutil.copytree(reference / "cut", "runs/cut")
    return RunDir.existing(Path("runs/cut"))


@pytest.mark.parametrize("part", [None, *PARTS])
def test_each_part_of_the_state_is_needed(
    workplace: Path, splits: Splits, reference: Path, part: str | None
) -> None:
    """A saver that drops any one part is found out; the one that drops none is not."""
    start = checkpoint.load(reference / "start/last.pt")
    fresh = next(iter(start.state_dict.values()))
    run = copy_of_cut(reference)

    def drop(document: dict[str, Any]) -> None:
        training = document["training"]
        if part == "weights":
            name = next(iter(document["state_dict"]))
            document["state_dict"][name] = fresh
        elif part == "optimizer":
            training["optimizer"]["state"] = {}
        elif part == "ema":
            training["ema"] = start.training["ema"]  # type: ignore[index]
        elif part is not None:
            default = getattr(State(), part)
            assert training["state"][part] != default  # else nothing would be dropped
            training["state"][part] = default

    rewrite(run, drop)
    try:
        fit(run.read_config(), splits, resume=run)
        same = state_of(run) == state_of(RunDir(reference / "whole"))
    except KdError:
        same = False
    assert same == (part is None)


FEATURES: dict[str, Any] = {
    "method": "crd+reviewkd+vid",
    "student": "convnet-small",
    "lr": 1e-3,
    "crd_negatives": 5,
    "augment": "flip-crop",
}


@pytest.fixture(scope="module")
def wide_splits() -> Splits:
    return make_splits(size=(16, 16, 3))


@pytest.fixture(scope="module")
def feature_reference(tmp_path_factory: pytest.TempPathFactory, wide_splits: Splits) -> Path:
    """`reference_runs` of FEATURES, and their teacher."""
    folder = tmp_path_factory.mktemp("features")
    made = config(method="ce", student="convnet-small", epochs=1, runs_dir=folder, cache_dir=folder, name="t")
    teacher = fit(made, wide_splits).run.student
    return reference_runs(folder, wide_splits, **FEATURES, teacher=teacher)


@pytest.mark.parametrize(
    "part", [None, "crd", *map(slow, ("reviewkd", "vid", "student_bank", "scaled")), "all"]
)
def test_adapters_are_part_of_the_state(
    workplace: Path, wide_splits: Splits, feature_reference: Path, part: str | None
) -> None:
    start = checkpoint.load(feature_reference / "start/last.pt")
    fresh = start.training["adapters"]  # type: ignore[index]
    run = copy_of_cut(feature_reference)

    def drop(document: dict[str, Any]) -> None:
        training = document["training"]
        kept = training["adapters"]
        if part == "all":
            training["adapters"] = {}
        elif part in kept:
            assert checkpoint.digest(kept[part]) != checkpoint.digest(fresh[part])
            kept[part] = fresh[part]
        elif part == "scaled":
            kept["crd"][part] = torch.tensor(False)
        elif part is not None:
            kept["crd"][part] = fresh["crd"][part]

    rewrite(run, drop)
    try:
        fit(run.read_config(), wide_splits, resume=run)
        same = state_of(run) == state_of(RunDir(feature_reference / "whole"))
    except KdError as error:
        assert "does not fit its run" in error.message
        same = False
    assert same == (part is None)


def test_the_newest_readable_state_is_restored(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, splits: Splits, reference: Path
) -> None:
    """Cut short or with one bit flipped, a state is passed over, with a note, for the one before."""
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    run = stopped("cut", splits, **SETTINGS, save_every="2steps", keep=3)
    states = run.saved()
    assert [path.name for path in states] == ["last.pt", "last-000000006.pt", "last-000000004.pt"]
    content = bytearray(states[0].read_bytes())
    content[len(content) // 2] ^= 1  # among the weights: torch itself would not notice
    states[0].write_bytes(content)
    os.truncate(states[1], 1000)
    notes: list[Event] = []
    resumed = fit(run.read_config(), splits, resume=run, on_event=notes.append)
    told = [event.text for event in notes if isinstance(event, Note)]
    assert "SHA-256" in told[0]
    assert "last-000000006.pt" in told[1]
    assert "after step 4" in told[2]
    assert state_of(resumed.run) == state_of(RunDir(reference / "whole"))


def test_all_states_damaged_is_an_error_that_changes_no_file(
    workplace: Path, splits: Splits, reference: Path
) -> None:
    run = copy_of_cut(reference)
    for path in run.saved():
        path.write_bytes(b"junk")
    before = run.metrics_file.read_bytes()
    with pytest.raises(KdError, match="no saved state"):
        fit(run.read_config(), splits, resume=run)
    assert run.metrics_file.read_bytes() == before


@pytest.mark.parametrize("where", range(0, 100, 9))
def test_a_flipped_bit_in_a_checkpoint(tmp_path: Path, where: int) -> None:
    """In each of the file's regions; a bit of padding may flip and change nothing."""
    path = tmp_path / "x.pt"
    stored = checkpoint.Checkpoint(
        "convnet-tiny",
        {},
        {"w": torch.arange(300.0)},
        {"name": "none", "args": {}, "state": {}},
        ("a", "b"),
        (8, 8, 1),
        training={"state": {"step": 3}},
    )
    checkpoint.save(path, stored)
    content = bytearray(path.read_bytes())
    content[len(content) * where // 100] ^= 4
    path.write_bytes(content)
    try:
        found = checkpoint.load(path)
    except KdError:
        return
    assert torch.equal(found.state_dict["w"], stored.state_dict["w"])
    assert found.training == stored.training


def test_a_run_is_not_resumed_with_a_replaced_teacher(workplace: Path, splits: Splits) -> None:
    """It is refused before the new teacher is run, and continues when the old one is back."""
    for name, seed in (("old", 0), ("new", 1)):
        fit(config(method="ce", epochs=1, seed=seed, name=name), splits)
    shutil.copy("runs/old/student.pt", "teacher.pt")
    run = stopped("cut", splits, method="kd", teacher=Path("teacher.pt"))
    passes = set(Path("cache/teacher").iterdir())
    shutil.copy("runs/new/student.pt", "teacher.pt")
    with pytest.raises(KdError, match="the teacher of runs/cut changed"):
        fit(run.read_config(), splits, resume=run)
    assert set(Path("cache/teacher").iterdir()) == passes
    shutil.copy("runs/old/student.pt", "teacher.pt")
    fit(run.read_config(), splits, resume=run)
    assert run.student.is_file()


def test_older_states_are_kept_as_asked(workplace: Path) -> None:
    splits = make_splits()
    for keep, expected in ((1, []), (3, ["last-000000002.pt", "last-000000004.pt"])):
        settings = {"method": "ce", "epochs": 1, "save_every": "2steps", "keep": keep}
        result = fit(config(**settings, name=f"keep {keep}"), splits)  # 6 steps
        assert sorted(path.name for path in result.run.path.glob("last-*.pt")) == expected
        stored = checkpoint.load(result.run.last).training
        assert stored is not None
        assert stored["state"]["step"] == 6


def test_saving_by_the_clock(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcli.engine import state

    now = [0.0]
    monkeypatch.setattr(state.time, "monotonic", lambda: now[0])
    schedule = state.SaveSchedule(config(save_every="10min"))
    position = State(epoch=1, step=1)
    now[0] = 599.0
    assert not schedule.due(position, epoch_ended=False)
    assert not schedule.due(position, epoch_ended=True)
    now[0] = 600.0
    assert schedule.due(position, epoch_ended=False)
    assert schedule.due(position, epoch_ended=True)
    schedule.saved()
    assert not schedule.due(position, epoch_ended=False)
    never = state.SaveSchedule(config(save_every="0"))
    assert not never.due(position, epoch_ended=True)


@pytest.mark.parametrize(
    ("typed", "kept", "meaning"),
    [
        (1, "1", (1, "epochs")),
        ("2 epochs", "2", (2, "epochs")),
        ("500steps", "500steps", (500, "steps")),
        ("1 step", "1steps", (1, "steps")),
        ("10min", "10min", (10, "min")),
        ("0", "0", (0, "epochs")),
    ],
)
def test_units_of_save_every(typed: Any, kept: str, meaning: tuple[int, str]) -> None:
    settings = config(save_every=typed)
    assert (settings.save_every, settings.saving) == (kept, meaning)
    assert TrainConfig.model_validate(settings.model_dump()).saving == meaning


@pytest.mark.parametrize("wrong", ["", "-1", "1.5", "5 hours", "steps", "min"])
def test_invalid_save_every(wrong: str) -> None:
    with pytest.raises(UsageError, match="--save-every"):
        config(save_every=wrong)


def test_resuming_under_other_circumstances_is_noted_and_recorded(
    workplace: Path, splits: Splits, reference: Path
) -> None:
    run = copy_of_cut(reference)
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace("lr = 0.001", "lr = 0.002"))
    rewrite(run, lambda document: document["training"]["made_with"].update(torch="2.0"))
    notes: list[Event] = []
    result = fit(run.read_config(), splits, resume=run, on_event=notes.append)
    told = " ".join(event.text for event in notes if isinstance(event, Note))
    assert "torch was 2.0" in told
    assert "--lr was 0.001, is 0.002" in told
    marks = json.loads(run.result_file.read_text())["resumed_with_differences"]
    assert len(marks) == 2
    assert list(result.resumed_with_differences) == marks
    assert read_result(reference / "whole/result.json").resumed_with_differences == ()


# --- a full disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(workplace: Path) -> Iterator[Path]:
    """20 MB mounted as the folder of runs."""
    folder = workplace / "runs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of 20 MB cannot be mounted here: it takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_keeps_the_last_state(small_disk: Path) -> None:
    """A state takes some 8 MB: two of them fit, the third does not."""
    settings = shlex.split(
        "--method ce --data digits --image-size 32 --student lenet-caffe --epochs 4 --batch-size 256 --threads 1 "
        "--precision 32 -q"
    )
    full = subprocess.run(
        [*KD, "train", *settings, "--name", "full"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert full.returncode == 1
    assert full.stderr.count("error:") == 1
    assert "No space left" in full.stderr or "cannot write" in full.stderr
    assert "Traceback" not in full.stderr
    run = RunDir(small_disk / "full")
    for path in run.saved():
        assert checkpoint.load(path).training
    assert run.saved()[0] == run.last
    subprocess.run(["mount", "-o", "remount,size=90m", str(small_disk)], check=True)
    subprocess.run([*KD, "train", "--resume", "runs/full", "-q"], env=ENVIRONMENT, check=True)
    subprocess.run([*KD, "train", *settings, "--name", "whole"], env=ENVIRONMENT, check=True)
    assert state_of(run) == state_of(RunDir(small_disk / "whole"))
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]
