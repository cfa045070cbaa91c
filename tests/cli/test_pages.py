"""The commands of docs/ are run, in a folder with the files that they name, on small data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision import models as zoo

from tests.cli.helpers import Kd, Outcome
from tests.cli.test_first_steps import save_pictures
from tests.helpers import ROOT
from tests.teacher.test_assumptions import write_teacher
from tests.test_docs import blocks

ELSEWHERE = ("convert-caffe", "--against", "--devices", "$")  # tested with Caffe files and with processes
SMALLER = (
    (" cifar10-jpeg.tar.xz", " photos"),
    ("-cifar10-jpeg.tar.xz", "-photos"),
    ("--data cifar10 ", "--data photos "),
    ("--budget-ms 0.5 --max-drop 1 ", "--budget-ms 1000 --max-drop 100 "),
    ("--engine all", "--engine both"),
    ("dkd=0:2:5 ", "dkd=0:2:1 "),
    ("resnet50", "resnet18"),
    (
        "torchvision:mobilenet_v3_small --data photos",
        "torchvision:mobilenet_v3_small --data photos --image-size 64",
    ),
    ("exports/*.onnx", "exports/kd-lenet-1.onnx"),
)


@pytest.mark.slow
def test_commands_of_the_pages(kd: Kd, follow: Callable[[Outcome], Outcome]) -> None:
    save_pictures(Path("photos"), 12)
    write_teacher(Path("big.onnx"), range(3))
    write_teacher(Path("x.onnx"), range(3), scale=1 / 255)
    torch.manual_seed(0)
    torch.save(zoo.resnet18(num_classes=3).state_dict(), "finetuned.pth")
    words = ("--data", "photos", "--epochs", "1", "--threads", "1")
    assert kd("train", "--method", "ce", "--student", "convnet-small", *words, "--name", "first").code == 0
    Path("weights").mkdir()
    shutil.copyfile("runs/first/student.pt", "weights/teacher.pt")
    assert kd("train", *words).code == 0 and kd("export", "kd-lenet-1").code == 0
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
        for long, short in SMALLER:
            text = text.replace(long, short)
        for line in text.splitlines():
            if line.startswith("kd ") and not any(word in line for word in ELSEWHERE):
                follow(Outcome(0, f"next: {line.partition('  #')[0].strip()}", ""))
