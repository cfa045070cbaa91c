"""From a folder of pictures to a deployed file; what a command uses where no option says it, and what it suggests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcli import models
from kdcli.base.config import make
from kdcli.cli import demo
from kdcli.cli.defaults import with_defaults
from kdcli.methods import TrainConfig
from tests.cli.helpers import Kd, Outcome, printed_commands
from tests.helpers import ROOT, digits_student

Follow = Callable[[Outcome], Outcome]
SHORT = ("--epochs", "1", "--threads", "1")
CARD = (
    ("train", "--method", "noisy", "--noisy-ratio", "0.5"),
    ("validate",),
    ("export", "student.pt"),
    ("bench",),
)  # of the project's design


def save_pictures(folder: Path, count: int) -> None:
    """Three classes of mixed formats and of sizes from 30 to 90, without a split."""
    random = np.random.default_rng(0)
    for label, name in enumerate(("ape", "bee", "cat")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            height, width = random.integers(30, 91, 2)
            pixels = random.integers(80 * label, 80 * label + 60, (height, width, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(
                folder / name / f"{number}.{('jpg', 'png', 'gif', 'webp')[number % 4]}"
            )


@pytest.mark.slow
def test_three_commands_from_pictures_to_a_verified_file(kd: Kd, follow: Follow) -> None:
    save_pictures(Path("photos"), 40)
    teacher = kd("train", "--method", "ce", "--data", "photos", *SHORT)
    assert printed_commands(teacher) == ["kd train --teacher runs/ce-lenet-1/student.pt"]
    student = follow(teacher)
    assert printed_commands(student) == ["kd export runs/kd-lenet-1/student.pt"]
    export = follow(student)
    assert "top-1 class:" in export.out and Path("exports/kd-lenet-1.onnx").is_file()
    for outcome in (teacher, student, export):
        assert outcome.code == 0 and "hint:" not in outcome.err
        assert outcome.err.count("photos has no split: ") == 1
    follow(export)  # kd bench
    results = [
        json.loads(Path(f"runs/{run}/result.json").read_text()) for run in ("ce-lenet-1", "kd-lenet-1")
    ]
    assert [result["test_fraction"] for result in results] == [0.2, 0.2]
    assert results[0]["test"]["count"] == results[1]["test"]["count"]
    # from another folder: data and teacher are found from the run
    place = Path.cwd()
    Path("elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("elsewhere")
        for model in ("../runs/kd-lenet-1", place / "exports/kd-lenet-1.onnx"):
            found = kd("test", str(model), "--json")
            assert found.code == 0, found
            assert Path(json.loads(found.out)["teacher"]).samefile(place / "runs/ce-lenet-1/student.pt")
            assert json.loads(found.out)["test"]["count"] == results[1]["test"]["count"]
        assert kd("reproduce", "../runs/kd-lenet-1").code == 0


@pytest.mark.slow
def test_lines_of_the_readme_for_own_pictures(kd: Kd, follow: Follow) -> None:
    save_pictures(Path("photos"), 10)
    Image.new("RGB", (40, 30), "red").save("new.jpg")
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own images\n")[2]
    lines = section.split("```")[1].splitlines()[1:]
    assert len(lines) == 6
    for line in lines:
        outcome = follow(Outcome(0, f"next: {line.partition('  #')[0]}", ""))
        assert "hint:" not in outcome.err
    assert "kd-resnet8-1-images.onnx: " in outcome.out and "ratios to ce-resnet56-1" in outcome.out


@pytest.mark.parametrize("line", CARD, ids=" ".join)
def test_card_in_an_empty_folder_names_one_command(kd: Kd, line: tuple[str, ...]) -> None:
    outcome = kd(*line)
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == "hint: Start with: kd demo"
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_card_after_the_demo(kd: Kd, follow: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.TEACHER, "epochs", 1)
    monkeypatch.setitem(demo.TEACHER, "student", "convnet-small")
    monkeypatch.setitem(demo.STUDENT, "epochs", 1)
    first = kd("export", "student.pt")
    tested = follow(follow(first))  # kd demo, then kd test in its folder
    assert "student.pt on digits" in tested.out and Path("weights/teacher.pt").is_file()
    train, validate, export, bench = CARD
    trained = kd(*train, *SHORT)
    assert trained.code == 0 and "the student is convnet-tiny" in trained.err
    assert printed_commands(trained) == ["kd export runs/noisy-convnet-tiny-1/student.pt"]
    validated = kd(*validate)
    assert validated.code == 0 and "weights/teacher.pt on digits" in validated.out
    exported = kd(*export)
    assert (
        exported.code == 0
        and "runs/noisy-convnet-tiny-1/student.pt of the newest run is used" in exported.err
    )
    measured = kd(*bench, "--rounds", "3", "--max-seconds", "1", "--no-memory", "--batch", "1")
    assert measured.code == 0, measured
    follow(validated)
    follow(exported)


def make_run(name: str, method: str = "ce") -> Path:
    (Path("runs") / name).mkdir(parents=True)
    Path(f"runs/{name}/config.toml").write_text(f'method = "{method}"\n')
    return digits_student(Path(f"runs/{name}/student.pt"))


def test_the_only_teacher_is_used_and_several_are_listed(kd: Kd, follow: Follow) -> None:
    make_run("first")
    make_run("student", "kd")
    outcome = kd("validate")
    assert outcome.code == 0 and "runs/first/student.pt on digits" in outcome.out
    make_run("second run")
    several = kd("train", "--method", "kd", *SHORT, "--name", "x")
    assert several.code == 2 and "2 teachers in weights/ and runs/" in several.err
    command = "kd train --method kd --epochs 1 --threads 1 --name x --teacher"
    assert sorted(printed_commands(several)) == [
        f"{command} 'runs/second run/student.pt'",
        f"{command} runs/first/student.pt",
    ]
    follow(kd("validate"))
    Path("weights").mkdir()
    shutil.copyfile("runs/first/student.pt", "weights/teacher.pt")
    assert "weights/teacher.pt on digits" in kd("validate").out


def test_settings_that_are_typed_are_not_those_of_the_teacher(kd: Kd) -> None:
    make_run("t")
    made = kd("train", *SHORT, "--student", "convnet-small", "--name", "a", "--method", "logits")
    assert made.code == 0 and "--student" not in made.err and "teacher evaluated on " in made.out
    again = kd("train", *SHORT, "--student", "convnet-small", "--name", "b", "--method", "logits")
    assert "teacher outputs from the cache" in again.out
    stored = models.load(Path("runs/a/student.pt"))
    assert stored.arch == "convnet-small" and stored.provenance["data"]["spec"] == "digits"
    other = kd("train", *SHORT, "--data", "mnist", "--method", "logits")
    assert other.code == 1 and "MNIST not found" in other.err


def test_resize_of_the_teachers_data_is_for_its_image_size(workplace: Path) -> None:
    path = digits_student(Path("t.pt"), data={"spec": "digits", "image_size": 8, "resize": 10})
    for typed, expected in (({}, 10), ({"image_size": 8}, 10), ({"image_size": 16}, None)):
        config = make(TrainConfig, {"teacher": path, **typed})
        assert with_defaults(config, needs_teacher=True).resize == expected


def test_nothing_to_compare_a_teacher_with(kd: Kd, follow: Follow) -> None:
    make_run("t")
    outcome = kd("bench")
    assert outcome.code == 1 and "nothing to compare runs/t/student.pt with" in outcome.err
    follow(outcome)
    follow(kd("train", "--method", "ce", "--data", "digits", *SHORT))
