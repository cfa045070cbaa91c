"""External networks on the command line: as teachers and students, and what a recipe may not name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models as zoo

from kdcli.base import code
from kdcli.models import checkpoint
from tests.cli.helpers import Kd
from tests.helpers import image_folder

SMALL = "--epochs 1 --threads 1 --precision 32 --batch-size 16 --val-fraction 0"


@pytest.mark.usefixtures("workplace")
def test_teacher_and_student_of_torchvision(kd: Kd) -> None:
    """The teacher resizes the student's images of 32×32 by itself, and is afterwards a file as any other."""
    image_folder(Path("photos"))
    for image in Path("photos").glob("*/*/*.png"):
        if int(image.stem) > 2:
            image.unlink()
    torch.manual_seed(0)
    torch.save({"model": zoo.squeezenet1_1(num_classes=3).state_dict()}, "s.pth")
    common = f"--data photos --image-size 32 {SMALL}".split()
    teacher = ["--teacher", "torchvision:squeezenet1_1", "--teacher-weights", "s.pth"]
    outcome = kd("train", *teacher, "--student", "torchvision:shufflenet_v2_x0_5", *common)
    assert outcome.code == 0, outcome
    [file] = Path("weights").glob("squeezenet1_1-*.pt")
    assert (
        f"is {file}: 3 classes, 224×224×3, preprocessing of SqueezeNet1_1_Weights.IMAGENET1K_V1"
        in outcome.err
    )
    assert checkpoint.load(Path("runs/kd-shufflenet_v2_x0_5-1/student.pt")).input_size == (32, 32, 3)
    shown = kd("info", str(file), "--json")
    assert json.loads(shown.out)["arch"] == "torchvision:squeezenet1_1"
    tested = kd("test", str(file), "--data", "photos", "--json")
    assert tested.code == 0, tested


FACTORY = """
from torch import nn

def make(classes=3):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes))

twin = make
"""


def test_function_of_the_user(kd: Kd, monkeypatch: pytest.MonkeyPatch) -> None:
    """The brightness of toy images gives their class away, so that the teacher can be right."""
    monkeypatch.setenv(code.ALLOWED, "")
    image_folder(Path("photos"))
    Path("brightness.py").write_text(FACTORY)
    teacher = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    with (
        torch.no_grad()
    ):  # the classes' mean pixels are 60, 120 and 180: the largest logit changes at 90 and 150
        teacher[2].weight.copy_(torch.tensor([[0.2], [0.4], [0.6]]).expand(3, 3))
        teacher[2].bias.copy_(torch.tensor([0.0, -54.0, -144.0]))
    torch.save(teacher.state_dict(), "b.pth")
    common = f"--data photos {SMALL}".split()
    small = [*common[:-1], "0.2"]
    spec = ["--teacher", "brightness:make", "--teacher-weights", "b.pth", "--teacher-scale", "1"]
    Path("recipe.toml").write_text('teacher = ["brightness:make"]\nstudent = "brightness:make"\n')
    refused = kd("train", "--recipe", "recipe.toml", *common)
    assert refused.code == 2 and "is a custom function, which runs only if you name it" in refused.err
    made = kd("train", *spec, "--student", "brightness:make", *common)
    assert made.code == 0, made
    stored = checkpoint.load(Path("runs/kd-make-1/student.pt"))
    assert stored.arch == "brightness:make"
    assert "teacher_weights = []" in Path("runs/kd-make-1/config.toml").read_text()
    monkeypatch.setenv(code.ALLOWED, "")
    refused = kd("test", "runs/kd-make-1")
    assert refused.code == 1 and "export KD_NETWORKS=brightness:make" in refused.err
    searched = kd(
        "tune", "--tune", "student=brightness:make|brightness:twin", *small, "--method", "ce", "--trials", "1"
    )
    assert searched.code == 0, searched
    monkeypatch.setenv(code.ALLOWED, "brightness:make")
    assert kd("test", "runs/kd-make-1").code == 0
