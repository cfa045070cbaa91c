"""Commands with teachers of other classes, and with stored outputs."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from kdcli import models
from kdcli.engine import RunDir
from tests.cli.helpers import Kd
from tests.helpers import digits_student, image_folder


def test_commands_with_a_class_map(kd: Kd) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    digits_student(Path("t.pt"), classes=tuple(words))
    Path("map.csv").write_text("".join(f"{word},{number}\n" for number, word in enumerate(words)))
    teacher = ("--teacher", "t.pt", "--data", "digits", "--threads", "1")
    refused = kd("validate", *teacher)
    assert (refused.code, "has a class 'zero' where the data has '0'" in refused.err) == (1, True)
    validated = kd("validate", *teacher, "--class-map", "map.csv")
    assert validated.code == 0
    assert "--teacher-class-map map.csv" in validated.out
    train = ("train", *teacher, "--student", "convnet-tiny", "--epochs", "1", "--class-map", "map.csv")
    trained = kd(*train, "--json")
    assert trained.code == 0, trained
    tested = kd("test", "kd-convnet-tiny-1", "--json", "--threads", "1")
    assert json.loads(tested.out)["test"]["agreement"] == json.loads(trained.out)["test"]["agreement"]


def test_commands_with_a_pack(kd: Kd) -> None:
    digits_student(Path("t.pt"))
    words = ("--data", "digits", "--augment", "flip", "--threads", "1")
    made = kd("teacher-logits", "--teacher", "t.pt", *words, "-o", "my pack")
    assert made.code == 0, made
    assert made.out.endswith("next: kd train --teacher 'my pack'\n")
    Path("t.pt").unlink()
    train = ("--student", "convnet-tiny", "--epochs", "1", "--json")
    trained = kd("train", "--teacher", "my pack", "--threads", "1", *train)  # its settings are the defaults
    assert trained.code == 0, trained
    tested = kd("test", "kd-convnet-tiny-1", "--threads", "1", "--json")
    assert json.loads(tested.out)["test"]["agreement"] == json.loads(trained.out)["test"]["agreement"]
    refused = kd("train", "--teacher", "my pack", *train, "--data", "digits", "--augment", "flip-crop")
    assert (refused.code, refused.err.count("error:")) == (1, 1)


def test_views_of_a_pack_are_for_its_augmentation(kd: Kd) -> None:
    digits_student(Path("t.pt"))
    Path("poetry.lock").touch()
    made = kd(
        "teacher-logits",
        "--teacher",
        "t.pt",
        "--data",
        "digits",
        "--augment",
        "flip",
        "--threads",
        "1",
        "-o",
        ".",
    )
    assert made.code == 0, made
    assert Path("poetry.lock").exists() and not list(Path("teacher").rglob("*.lock"))
    words = (
        "train",
        "--teacher",
        "pack.json",
        "--student",
        "convnet-tiny",
        "--epochs",
        "4",
        "--threads",
        "1",
    )
    for name, changes in (
        ("plain", ("--augment", "none")),
        ("fixed", ("--augment", "flip-crop", "--teacher-cache", "fixed")),
    ):
        trained = kd(*words, *changes, "--name", name)
        assert trained.code == 0, trained
    assert RunDir(Path("runs/plain")).read_config().views == 1
    assert RunDir(Path("runs/fixed")).read_config().views == 4


def test_a_pack_with_unlabelled_images(kd: Kd) -> None:
    image_folder(Path("photos"))
    words = ("--threads", "1", "--image-size", "8")
    made = kd(
        "train",
        "--method",
        "ce",
        "--data",
        "photos",
        "--epochs",
        "1",
        "--student",
        "convnet-tiny",
        *words,
        "--name",
        "t",
    )
    assert made.code == 0, made
    Image.effect_noise((8, 8), 50).convert("RGB").save("more.png")
    Path("more").mkdir()
    Path("more.png").rename("more/1.png")
    made = kd("teacher-logits", "--teacher", "t", "--unlabelled", "more", "--threads", "1")
    assert made.code == 0, made
    trained = kd(
        "train",
        "--teacher",
        "pack",
        "--unlabelled",
        "more",
        "--method",
        "logits",
        "--epochs",
        "1",
        "--student",
        "convnet-tiny",
        "--threads",
        "1",
    )
    assert trained.code == 0, trained


def test_a_pack_serves_the_same_images_at_any_path(kd: Kd) -> None:
    image_folder(Path("photos"))
    size = ("--image-size", "8", "--resize", "10")
    words = ("--epochs", "1", "--threads", "1", "--student", "convnet-tiny")
    made = kd("train", "--method", "ce", "--data", "photos", *size, *words, "--name", "t")
    assert made.code == 0, made
    made = kd("teacher-logits", "--teacher", "t", "--augment", "flip", "--view-seed", "3", "--threads", "1")
    assert made.code == 0, made
    Path("photos").rename("elsewhere")
    trained = kd("train", "--teacher", "pack", "--data", "elsewhere", *words)
    assert trained.code == 0, trained
    assert models.load(Path("runs/kd-convnet-tiny-1/student.pt")).resize == 10
