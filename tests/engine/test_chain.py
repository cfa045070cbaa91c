"""Chains of trainings: teacher of each link, and continuation after any stop."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Event, Note, Progress
from kdcli.base.runtime import stop_on_signals
from kdcli.cli import train
from kdcli.data import Splits
from kdcli.engine import RunDir, RunResult, fit, fit_chain, read_metrics, read_result, resume_config
from kdcli.models import checkpoint
from tests.helpers import ROOT, command_line, config, digest_without_clocks, image_folder, make_splits, slow

KD = (sys.executable, "-m", "kdcli")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CHAIN: dict[str, Any] = {
    "method": "kd",
    "teacher": Path("teacher.pt"),
    "student": "convnet-tiny",
    "assistant": ("convnet-small", "lenet-caffe"),
    "generations": 2,
    "lr": 1e-3,
    "epochs": 2,
}
LINKS = ("x-assistant-1", "x-assistant-2", "x-generation-1", "x")


def weights(run: Path) -> str:
    """SHA-256 of all tensors of a run's student."""
    return checkpoint.digest(checkpoint.load(run / "student.pt").state_dict)


def state(run: Path) -> str:
    """SHA-256 of all that is saved but the teacher's file, in which is what torch called it while it was written."""
    stored = checkpoint.load(run / "last.pt")
    training = {name: value for name, value in (stored.training or {}).items() if name != "teacher"}
    return digest_without_clocks([stored.state_dict, training])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(results: tuple[RunResult, ...]) -> list[str]:
    return [result.run.path.name for result in results]


def notes_of(events: list[Event]) -> str:
    return " | ".join(event.text for event in events if isinstance(event, Note))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and the whole chain, made without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    before = Path.cwd()
    os.chdir(folder)
    try:
        splits = make_splits(size=(16, 16, 1))
        fit(config(method="ce", student="convnet-small", epochs=1, name="teacher"), splits)
        shutil.move("runs/teacher/student.pt", "teacher.pt")
        shutil.rmtree("runs")
        fit_chain(config(**CHAIN, name="x"), splits)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def splits() -> Splits:
    return make_splits(size=(16, 16, 1))


@pytest.fixture
def taught(workplace: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the same teacher and what it says, and no runs."""
    shutil.copy(whole / "teacher.pt", "teacher.pt")
    shutil.copytree(whole / "cache", "cache")
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    return workplace


@pytest.fixture
def finished(taught: Path, whole: Path) -> Path:
    """A folder with the whole chain in it."""
    shutil.copytree(whole / "runs", "runs")
    return taught


def test_each_link_has_the_link_before_as_its_teacher(finished: Path) -> None:
    assert sorted(path.name for path in Path("runs").iterdir()) == sorted(LINKS)
    teachers = ["teacher.pt", *(f"runs/{name}/student.pt" for name in LINKS)]
    students = ["convnet-small", "lenet-caffe", "convnet-tiny", "convnet-tiny"]
    for name, teacher, student, seed in zip(LINKS, teachers, students, (0, 0, 0, 1), strict=False):
        stored = checkpoint.load(Path("runs") / name / "student.pt")
        assert stored.arch == student
        assert stored.provenance["run"] == name
        assert stored.provenance["seed"] == seed
        assert stored.provenance["teacher"] == {"path": teacher, "sha256": sha256(Path(teacher))}
        settings = RunDir(Path("runs") / name).read_config()
        assert (settings.assistant, settings.generations, settings.teacher) == ((), 1, (Path(teacher),))
    assert weights(Path("runs/x")) != weights(Path("runs/x-generation-1"))


def test_a_link_equals_a_single_run_with_its_settings(finished: Path, splits: Splits) -> None:
    alone = config(
        method="kd", teacher="runs/x-generation-1/student.pt", lr=1e-3, epochs=2, seed=1, name="alone"
    )
    fit(alone, splits)
    assert weights(Path("runs/alone")) == weights(Path("runs/x"))


def test_a_finished_chain_is_not_trained_again(
    finished: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.engine.step.Step.__call__", None)
    told: list[Event] = []
    # what says where and how often, not what, may differ
    results = fit_chain(
        config(**{**CHAIN, "keep": 5, "save_every": "0"}, name="x"), splits, on_event=told.append
    )
    assert names(results) == list(LINKS)
    assert notes_of(told).count("it is not trained again") == 4
    for result in results:
        written = json.loads(result.run.result_file.read_text())
        assert {"schema_version": 2, **json.loads(json.dumps(result.to_dict()))} == written
        assert [line.epoch for line in result.history] == [1, 2]
    assert isinstance(results[-1].evaluation.confusion[0], tuple)


class _StopInLink:
    """An `on_event` that sends a signal when training, or another task, of one link has got somewhere."""

    def __init__(self, number: int, task: str, images: int, sent: int = signal.SIGINT) -> None:
        self.begins, self.task, self.images, self.sent = f"{number + 1}/", task, images, sent

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress) and event.task.startswith(self.begins):
            task = event.task.partition(": ")[2]
            if task.startswith(self.task) and event.done >= self.images:
                self.images = 10**9
                os.kill(os.getpid(), self.sent)


@pytest.mark.parametrize("by", [slow("resume"), "repeating"])
@pytest.mark.parametrize("number", [slow(0), slow(1), 2, slow(3)])
def test_a_stopped_and_continued_chain_is_bit_identical(
    taught: Path, whole: Path, splits: Splits, number: int, by: str
) -> None:
    """The links before the stop are the whole chain's own, which saves their time."""
    Path("runs").mkdir()
    for name in LINKS[:number]:
        shutil.copytree(whole / "runs" / name, Path("runs") / name)
    with pytest.raises(Interrupted) as caught:
        fit_chain(config(**CHAIN, name="x"), splits, on_event=_StopInLink(number, "epoch", 40))
    assert caught.value.exit_code == 130
    assert caught.value.message.startswith(f"{number + 1}/4 ")
    assert caught.value.hint == f"kd train --resume runs/{LINKS[number]}"
    assert sorted(path.name for path in Path("runs").iterdir()) == sorted(LINKS[: number + 1])
    run = RunDir.existing(Path("runs") / LINKS[number])
    assert not run.result_file.exists()
    told: list[Event] = []
    if by == "resume":
        fit_chain(resume_config(run), splits, resume=run, on_event=told.append)
    else:
        fit_chain(config(**CHAIN, name="x"), splits, on_event=told.append)
    assert f"continuing runs/{LINKS[number]} after step" in notes_of(told)
    for name in LINKS:
        assert weights(Path("runs") / name) == weights(whole / "runs" / name)
        assert state(Path("runs") / name) == state(whole / "runs" / name)


def test_a_signal_during_the_test_of_a_link_stops_the_chain(taught: Path, splits: Splits) -> None:
    """A run alone would go on to its end and be done; the next link is not begun."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="between two trainings") as caught:
        fit_chain(config(**CHAIN, name="x"), splits, on_event=_StopInLink(0, "testing", 1, signal.SIGTERM))
    assert caught.value.exit_code == 143
    assert caught.value.hint == "kd train --resume runs/x-assistant-1"
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [path.name for path in Path("runs").iterdir()] == ["x-assistant-1"]
    run = RunDir.existing(Path("runs/x-assistant-1"))
    assert run.result_file.exists()
    with pytest.raises(Interrupted, match="2/4"):  # it goes on with the second
        fit_chain(resume_config(run), splits, resume=run, on_event=_StopInLink(1, "epoch", 1))


def test_a_stop_before_the_first_folder_hints_at_the_same_command(taught: Path, splits: Splits) -> None:
    shutil.rmtree("cache")
    with pytest.raises(Interrupted) as caught:
        fit_chain(config(**CHAIN), splits, on_event=_StopInLink(0, "teacher", 0))
    assert caught.value.hint == "Rerun the same command."
    assert not Path("runs").exists()


def test_nested_stop_flags() -> None:
    with stop_on_signals() as outer:
        with stop_on_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.signal == signal.SIGTERM
        assert outer.exit_code == 143
    with stop_on_signals() as later:
        assert not later


def test_an_unnamed_chain_gets_a_number_free_for_all_links(taught: Path, splits: Splits) -> None:
    """Other chains are never continued by chance."""
    Path("runs/kd-convnet-tiny-1").mkdir(parents=True)
    Path("runs/kd-convnet-tiny-2-generation-1").mkdir()
    told: list[Event] = []
    settings = config(**{**CHAIN, "epochs": 1, "assistant": ()})
    results = fit_chain(settings, splits, on_event=told.append)
    assert names(results) == ["kd-convnet-tiny-3-generation-1", "kd-convnet-tiny-3"]
    assert "chain kd-convnet-tiny-3: convnet-tiny → convnet-tiny" in notes_of(told)
    assert "has no effect" not in notes_of(told)
    assert names(fit_chain(settings, splits)) == ["kd-convnet-tiny-4-generation-1", "kd-convnet-tiny-4"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lr": 2e-3}, "--lr was 0.001, is 0.002"),
        (
            {"assistant": ("convnet-small",)},
            "--assistant was ['convnet-small', 'lenet-caffe'], is ['convnet-small']",
        ),
        ({"teacher": Path("other.pt")}, "--teacher was ['teacher.pt'], is ['other.pt']"),
    ],
)
def test_a_link_of_a_chain_with_other_settings_is_refused(
    finished: Path, splits: Splits, change: dict[str, Any], told: str
) -> None:
    for name in LINKS[1:]:
        shutil.rmtree(Path("runs") / name)
    with pytest.raises(UsageError) as caught:
        fit_chain(config(**{**CHAIN, **change}, name="x"), splits)
    assert "x-assistant-1" in caught.value.message
    assert told in caught.value.message
    assert [path.name for path in Path("runs").iterdir()] == ["x-assistant-1"]


def test_a_name_taken_by_any_other_run_is_refused_before_the_first_link(taught: Path, splits: Splits) -> None:
    fit(config(method="ce", epochs=1, name="x"), splits)
    with pytest.raises(UsageError, match="run x exists"):
        fit_chain(config(**CHAIN, name="x"), splits)
    other = config(**{**CHAIN, "assistant": (), "generations": 2, "epochs": 1}, name="y-generation-1")
    fit_chain(other, splits)
    with pytest.raises(UsageError, match="run y-generation-1 exists"):  # a link, but of another chain
        fit_chain(config(**{**CHAIN, "assistant": (), "epochs": 1}, name="y"), splits)
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "x",
        "y-generation-1",
        "y-generation-1-generation-1",
    ]


def test_a_finished_link_with_other_inputs_is_refused(finished: Path, splits: Splits) -> None:
    settings = config(**CHAIN, name="x")
    with pytest.raises(KdError, match="the train images of runs/x-assistant-1 changed"):
        fit_chain(settings, make_splits(train=60, size=(16, 16, 1)))
    shutil.copy("runs/x/student.pt", "teacher.pt")
    with pytest.raises(KdError, match="the teacher of runs/x-assistant-1 changed"):
        fit_chain(settings, splits)
    Path("teacher.pt").unlink()  # not needed any more, and nothing to compare with
    assert names(fit_chain(settings, splits)) == list(LINKS)
    shutil.rmtree("runs/x-assistant-2")
    with pytest.raises(UsageError, match="x-generation-1 in runs learned from x-assistant-2") as caught:
        fit_chain(settings, splits)
    assert "runs/x-generation-1" in caught.value.hint
    Path("runs/x-assistant-1/result.json").write_text("{")
    shutil.rmtree("runs/x-generation-1")
    shutil.rmtree("runs/x")
    with pytest.raises(KdError, match=r"runs/x-assistant-1/result\.json: Invalid JSON"):
        fit_chain(settings, splits)


def test_a_renamed_link_resumes_as_a_single_run(finished: Path) -> None:
    shutil.move("runs/x", "runs/best")
    assert resume_config(RunDir(Path("runs/best"))).generations == 1
    shutil.move("runs", "moved")
    assert resume_config(RunDir(Path("moved/x-assistant-2"))) == config(
        **CHAIN, name="x", runs_dir=Path("moved")
    )


def test_errors_of_all_links_are_found_before_the_first_training(taught: Path) -> None:
    small = make_splits(size=(8, 8, 1))
    for splits, change, match in (
        (make_splits(), {"assistant": ("convnet-small", "resnet7")}, "unknown network: resnet7"),
        (small, {"assistant": ("convnet-small", "lenet")}, "too small for a LeNet"),
        (small, {"method": "at", "assistant": ("nin",), "student_stages": "nowhere"}, "nowhere"),
    ):
        with pytest.raises(UsageError, match=match):
            fit_chain(config(**{**CHAIN, **change}, name="x"), splits)
    with pytest.raises(UsageError, match=r"--assistant a\.pt: an assistant is trained anew"):
        config(**{**CHAIN, "assistant": ("a.pt",)})
    with pytest.raises(UsageError, match="one process"):
        fit_chain(config(**CHAIN, devices=2), small)
    with pytest.raises(UsageError, match="trains one student"):
        fit(config(**CHAIN), small)
    assert not Path("runs").exists()


def test_stages_and_teacher_weights_of_each_link() -> None:
    from kdcli.engine.fit import links

    settings = config(
        **{**CHAIN, "teacher": (Path("a.pt"), Path("b.pt")), "seed": 2**63 - 1},
        teacher_weight=(1, 2),
        teacher_stages="t",
        student_stages="s",
        name="x",
    )
    found = [
        (link.seed, link.teacher_weight, link.teacher_stages, link.student_stages) for link in links(settings)
    ]
    last = 2**63 - 1
    assert found == [(last, (1, 2), "t", ""), (last, (), "", ""), (last, (), "", "s"), (0, (), "s", "s")]
    assert links(settings)[0].teacher == (Path("a.pt"), Path("b.pt"))


def test_a_method_without_a_teacher_makes_no_chain(taught: Path, splits: Splits) -> None:
    told: list[Event] = []
    [result] = fit_chain(
        config(**{**CHAIN, "method": "ce", "epochs": 1}, name="a"), splits, on_event=told.append
    )
    assert result.evaluation.agreement is None
    assert "do nothing" not in notes_of(told)  # the command line says so, of what was typed
    [result] = fit_chain(
        config(**{**CHAIN, "epochs": 1, "method": "kd+ce", "kd_weight": 0}, name="b"),
        splits,
        on_event=told.append,
    )
    assert "--assistant and --generations do nothing" in notes_of(told)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["a", "b"]


@pytest.mark.parametrize(("student", "told"), [("convnet-tiny", True), ("convnet-small", False)])
def test_born_again_notes_a_teacher_of_another_network(
    taught: Path, splits: Splits, student: str, told: bool
) -> None:
    """The teacher is a convnet-small; the second generation's is always the student's own network."""
    events: list[Event] = []
    settings = {**CHAIN, "method": "born-again", "student": student, "assistant": (), "epochs": 1}
    fit_chain(config(**settings, name="x"), splits, on_event=events.append)
    text = "teacher teacher.pt is convnet-small, the student convnet-tiny: born-again"
    assert notes_of(events).count("born-again") == int(told)
    assert (text in notes_of(events)) == told
    events.clear()
    fit(config(method="kd", teacher="teacher.pt", epochs=1), splits, on_event=events.append)
    assert "plain distillation" not in notes_of(events)


# --- the command ---------------------------------------------------------------------------------------------

TYPED = shlex.split(
    "train --data images --threads 1 --precision 32 --teacher teacher.pt --student convnet-tiny --batch-size 16 "
    "--epochs 3 --log-every 1 --save-every 4steps --assistant convnet-small --generations 2"
)
OF_TYPED = ("x-assistant-1", "x-generation-1", "x")


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a teacher and the chain that `TYPED` makes, called x; and what was said of it."""
    folder = tmp_path_factory.mktemp("typed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        image_folder(Path("images"))
        kd = command_line(patch, train)
        kd(
            *shlex.split(
                "--data images --threads 1 --precision 32 --method ce --student convnet-small --epochs 1"
            )
        )
        shutil.move("runs/ce-convnet-small-1/student.pt", "teacher.pt")
        shutil.rmtree("runs")
        said = kd(*TYPED[1:], "--name", "x")
        assert said.exit_code == 0
        Path("said.txt").write_text(said.stdout)
    return folder


@pytest.fixture
def at(typed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    folder = tmp_path / "here"
    shutil.copytree(typed, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
def test_output_of_a_chain_has_a_line_for_each_link(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kd = command_line(monkeypatch, train)
    told = [read_result(Path("runs") / name / "result.json") for name in OF_TYPED]
    lines = Path("said.txt").read_text().splitlines()
    for line, result in zip(lines, told[:2], strict=False):
        figures = result.evaluation
        assert line == (
            f"{result.run.path.name}: {result.config.student}, test accuracy {figures.accuracy:.2f} %, "
            f"agreement with its teacher {figures.agreement:.2f} %"
        )
    assert lines[2].startswith("kd convnet-tiny on images: test accuracy")
    assert lines[-1] == "next: kd export runs/x/student.pt"
    assert all((Path("runs") / name / "curves.svg").is_file() for name in OF_TYPED)
    found = json.loads(kd(*TYPED[1:], "--name", "x", "--json").stdout)  # all there: only told again
    assert found["run"] == "runs/x"
    assert [link["run"] for link in found["chain"]] == ["runs/x-assistant-1", "runs/x-generation-1"]
    assert found["chain"][0]["student"] == "convnet-small"
    # the chain's settings are a recipe of the chain, a link's own are one of the link
    again = kd("--recipe", "runs/x-generation-1/chain.toml", "--name", "y", "--epochs", "1", "--json")
    assert [link["run"] for link in json.loads(again.stdout)["chain"]] == [
        "runs/y-assistant-1",
        "runs/y-generation-1",
    ]
    alone = kd("--recipe", "runs/x/config.toml", "--name", "z", "--json")
    assert "chain" not in json.loads(alone.stdout)
    assert weights(Path("runs/z")) == weights(Path("runs/x"))


def test_unread_chain_options_are_noted(taught: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(Path("images"))
    kd = command_line(monkeypatch, train)
    words = shlex.split("--data images --threads 1 --epochs 1 --student convnet-tiny --name c --method ls")
    said = kd(*words, "--assistant", "convnet-small", "--generations", "3")
    assert "--assistant has no effect with --method ls" in said.stderr
    assert "--generations has no effect with --method ls" in said.stderr
    assert "kd train" not in said.stderr
    assert not list(Path("runs").glob("c-*"))
    with pytest.raises(UsageError, match="unknown network: resnet7"):
        kd(*words[:-2], "--method", "kd", "--teacher", "teacher.pt", "--assistant", "resnet7")


@pytest.mark.slow
def test_a_chain_killed_in_each_link_is_bit_identical(at: Path) -> None:
    """SIGKILL to a real `kd train`; then it is typed again, or any of its links is resumed."""
    for name in OF_TYPED:
        shutil.move(Path("runs") / name, name)
    again = [*TYPED, "--name", "x", "-q"]
    for words, name in zip(
        (again, again, ["train", "--resume", "runs/x-generation-1", "-q"]), OF_TYPED, strict=True
    ):
        process = subprocess.Popen([*KD, *words], env=ENVIRONMENT)
        metrics = RunDir(Path("runs") / name).metrics_file
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 10):
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not RunDir(Path("runs") / name).result_file.exists()
    # a finished link, and not the one that was killed
    subprocess.run([*KD, "train", "--resume", "runs/x-assistant-1", "-q"], env=ENVIRONMENT, check=True)
    assert sorted(path.name for path in Path("runs").iterdir()) == sorted(OF_TYPED)
    for name in OF_TYPED:
        assert weights(Path("runs") / name) == weights(Path(name))
        assert state(Path("runs") / name) == state(Path(name))


@pytest.mark.slow
def test_two_processes_train_a_chain(at: Path) -> None:
    """The first link is there; the others are trained by both."""
    for name in OF_TYPED[1:]:
        shutil.move(Path("runs") / name, name)
    subprocess.run([*KD, *TYPED, "--name", "x", "-q", "--devices", "2"], env=ENVIRONMENT, check=True)
    for name in OF_TYPED[1:]:
        run, alone = RunDir(Path("runs") / name), RunDir(Path(name))
        assert json.loads(run.environment_file.read_text())["processes"] == 2
        assert run.read_chain() is not None
        losses = [[line.loss for line in read_metrics(each.metrics_file)] for each in (run, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert sorted(path.name for path in Path("runs").iterdir()) == sorted(OF_TYPED)
