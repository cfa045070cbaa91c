"""The commands of README.md and docs/ are run, in a folder with the files that they name, on small data."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import models as zoo

from kdcli.base import code
from kdcli.cli import export, train
from tests.caffe_files import field, layer, net, write
from tests.cli.helpers import Outcome
from tests.cli.test_first_steps import save_pictures
from tests.helpers import ROOT, command_line
from tests.teacher.test_assumptions import write_teacher
from tests.test_docs import PAGES, blocks

SHORT = ("--epochs", "1", "--threads", "1")
NOT_RUN = {  # beginnings of commands: where else they are run, or why not
    "python3 -m venv ": "installation: .ci/run",
    "python -m pip ": "installation: .ci/run",
    "python -m pytest": ".ci/run",
    "pip install ": "changes the environment",
    "kd demo": "tests/cli/test_demo.py",
    "kd train --method mymethods:": "tests/methods/test_custom_methods.py",
    "kd train --method kd+mymethods:": "tests/methods/test_custom_methods.py",
    "kd train --devices ": "tests/base/test_processes.py",
    "torchrun ": "tests/base/test_processes.py; two hosts: by hand",
    "python benchmarks/": "minutes, some with other packages; their options are checked here",
}
SMALLER = (  # in a page
    ("--data cifar10 ", "--data photos "),
    ("weights/cifar10_nin.caffemodel", "weights/cifar10_nin.caffemodel --data photos"),
    ("--method noisy --noisy-ratio 0.5", "--method noisy --noisy-ratio 0.5 --data photos"),
    ("--seeds 5", "--seeds 2 --data photos"),
    (".venv/bin/", ""),
    ("--name kd-lenet-1", "--name another"),
    ("--budget-ms 0.5 --max-drop 1 ", "--budget-ms 1000 --max-drop 100 "),
    ("--engine all", "--engine both"),
    ("dkd=0:2:5 ", "dkd=0:2:1 "),
    ("in 0 1 2 3 4;", "in 0;"),
    ("resnet50", "resnet18"),
    (
        "torchvision:mobilenet_v3_small --data photos",
        "torchvision:squeezenet1_1 --data photos --image-size 64",
    ),
    ("resnet56", "resnet8"),
)
RECORD = """command_not_found_handle() { printf '%q ' ${KD_NETWORKS:+"KD_NETWORKS=$KD_NETWORKS"} "$@"; echo; }
"""  # bash calls it for each command, as its PATH is empty
BRIGHTNESS = np.array([30.0, 110.0, 190.0])  # of the classes of `save_pictures`
NETWORK = """from torch import nn

def make(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
"""


def write_caffemodel(folder: Path) -> None:
    """A Caffe network that takes the class of the nearest brightness m: logits (2·m·c − c²) / 200."""
    weights = np.full((4, 3, 1, 1), 1 / 3), np.zeros(4)
    layers = [
        layer("Convolution", "conv", "data", "conv", field(1, 4) + field(4, 1), weights),
        layer("ReLU", "relu", "conv", "conv"),
        layer("Pooling", "pool", "conv", "pool", field(1, 1) + field(12, 1)),  # the mean of the whole map
        layer("InnerProduct", "ip", "pool", "ip", field(1, 3),
              (np.repeat(BRIGHTNESS[:, None] / 400, 4, 1), -(BRIGHTNESS**2) / 200)),
    ]  # fmt: skip
    inputs = field(3, "data") + b"".join(field(4, side) for side in (1, 3, 32, 32))
    write(folder, net(layers, v1=False, inputs=inputs), "cifar10_nin.caffemodel")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files and runs that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_pictures(Path("photos"), 8)
        shutil.copyfile("photos/ape/0.jpg", "photo.jpg")
        shutil.copyfile("photos/bee/0.jpg", "new.jpg")
        with tarfile.open("cifar10-jpeg.tar.xz", "w:xz", preset=0) as archive:
            archive.add("photos", ".")
        write_teacher(Path("big.onnx"), range(3))
        write_teacher(Path("x.onnx"), range(3), scale=1 / 255)
        torch.save(zoo.resnet18(num_classes=3).state_dict(), "finetuned.pth")
        Path("my_package").mkdir()
        Path("my_package/networks.py").write_text(NETWORK)
        Path("weights").mkdir()
        for place in ("weights", "."):
            write_caffemodel(Path(place))
        call = command_line(patch, train, export)
        call("train", "--method", "ce", "--student", "convnet-small", "--data", "photos", *SHORT)
        shutil.copyfile("runs/ce-convnet-small-1/student.pt", "weights/teacher.pt")
        call("train", *SHORT)
        call("export", "kd-lenet-1")
    return folder


def commands_of(block: str) -> list[str]:
    """The commands that bash would start, with small data, loops and variables resolved."""
    for long, short in SMALLER:
        block = block.replace(long, short)
    environment = {"PATH": "/nowhere", "D": "cifar10-jpeg.tar.xz"}
    words = ["/bin/bash", "-euc", RECORD + block]
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def check_benchmark(command: str) -> None:
    """Check that the program exists and defines the options."""
    _, program, *words = shlex.split(command)
    text = (ROOT / program).read_text(encoding="utf-8")
    for word in words:
        defined = f'"{word}"' in text or f" {word[2:].replace('-', '_')}: " in text
        assert defined or not word.startswith("--"), command


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_page(
    page: Path,
    prepared: Path,
    follow: Callable[[Outcome], Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = blocks(page, "sh")
    if "--against" in "".join(commands):
        pytest.importorskip("cv2")
    if commands:
        shutil.copytree(prepared, ".", dirs_exist_ok=True)
    for block in commands:
        for command in commands_of(block):
            if command.startswith("python benchmarks/"):
                check_benchmark(command)
            elif not command.startswith(tuple(NOT_RUN)):
                found = re.fullmatch(rf"(?:{code.ALLOWED}=(\S+) )?(kd .*)", command)
                assert found, f"{command} is neither run nor listed in NOT_RUN"
                monkeypatch.setenv(code.ALLOWED, found[1] or "")
                follow(Outcome(0, f"next: {found[2]}", ""))
