"""Photographs to an int8 student: minutes of the commands, and images/s of their parts beside a torchvision loop.

    python benchmarks/photographs.py photos [--teacher-weights r18.pth]

`photos` are class folders; a split in them is ignored. The commands, from an empty folder, are kd train (packing, the
teacher over each view, training, test) and kd export --int8. Then, in interleaved rounds:

    kd      kd's training loop, the teacher's outputs cached
    pack    kd decodes and resizes the photographs; once for all runs
    load    ImageFolder and DataLoader alone: decode, random crop, flip, normalise; in each epoch
    c       the plain loop: that loader, the teacher in each step on views resized to its own 224 pixels, as in kd
    c96     the same, the teacher on the student's 96 pixels: less work, and other logits

Networks, augmentation, optimiser and batch size are the same; the plain loop is float32 with as many workers as
threads. kd's views are crops of the packed 96 pixels, the loader's of the whole photograph. Without --teacher-weights
the teacher is a ResNet-18 of random weights whose last layer is fitted to the training photographs: accuracies then
mean nothing.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from kd_loop import KdLoop
from naive_loop import Loader, NaiveLoop, loader_of
from pair import TeacherOnLoader, new_network
from rounds import Side, Timing, log, machine, measure, pass_rates, spread_of, summary, table
from torch import nn
from torch.nn import functional as F
from torchvision import datasets, transforms
from torchvision.models import resnet18

from kdcli import data, models
from kdcli.base import runtime
from kdcli.data.decode import SUFFIXES
from kdcli.deploy.pretrained import load_pretrained
from kdcli.engine import read_result
from kdcli.engine.plan import load_data
from kdcli.methods import TrainConfig

PHOTOS, SIDE, NAME = "photos", 96, "photographs"
TEACHER, STUDENT, AUGMENT = "torchvision:resnet18", "torchvision:mobilenet_v3_small", "flip-resized-crop"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def copy_unsplit(source: Path) -> None:
    """Copy photographs to class folders without a split."""
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            place = Path(PHOTOS, path.parent.name, f"{path.parent.parent.name}-{path.name}")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def make_weights(path: Path) -> None:
    """Save a ResNet-18 of random weights; its last layer is fitted by least squares."""
    train = data.load(PHOTOS, image_size=SIDE, cache_dir=Path("other-cache")).train
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=len(train.classes)).state_dict(), path)
    teacher: Any = load_pretrained(f"{TEACHER}:{path}")
    head, teacher.network.fc = teacher.network.fc, nn.Identity()
    features = F.pad(models.predict_logits(teacher, train.images), (0, 1), value=1.0)
    targets = 10 * F.one_hot(torch.tensor(train.labels)).float()
    fitted = torch.linalg.lstsq(features, targets, rcond=1e-4, driver="gelsd").solution
    head.weight.data, head.bias.data = fitted[:-1].T.contiguous(), fitted[-1]
    teacher.network.fc = head
    torch.save(teacher.network.state_dict(), path)


def minutes_of(command: str) -> float:
    """Run a command of kd."""
    log(f"kd {command}")
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kdcli", *shlex.split(command)], check=True, stdout=sys.stderr)
    return (time.perf_counter() - started) / 60


class Packing:
    """Photographs to packed pixels, into an empty cache."""

    key = "pack"
    label = "kd's packing"
    note = "once"
    keeps_memory = False

    def warm_up(self) -> None:
        self.round()

    def round(self) -> Timing:
        started = time.perf_counter()
        splits = data.load(PHOTOS, image_size=SIDE, cache_dir=Path("packed"))
        seconds = time.perf_counter() - started
        shutil.rmtree("packed")
        return Timing(len(splits.train) + len(splits.test), seconds)


class Loading:
    """An epoch of a loader without training."""

    key = "load"
    label = "ImageFolder and DataLoader alone"
    note = "in each epoch"
    keeps_memory = False

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def warm_up(self) -> None:
        next(iter(self.loader))

    def round(self) -> Timing:
        started = time.perf_counter()
        images = sum(len(labels) for _, labels in self.loader)
        return Timing(images, time.perf_counter() - started)


def sides_of(config: TrainConfig, threads: int) -> list[Side]:
    """All sides; kd's loop has the settings, data and cached outputs of the commands' run."""
    config = config.model_copy(update={"name": "", "epochs": 2, "views": 2})
    splits = load_data(config)
    steps = [
        transforms.RandomResizedCrop(SIDE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    folder = datasets.ImageFolder(PHOTOS, transforms.Compose(steps))
    loader = loader_of(folder, threads, config.batch_size)
    teacher = TeacherOnLoader(models.load(config.teacher[0]), MEAN, STD)
    kd = KdLoop(config, splits)
    plain = NaiveLoop(teacher, new_network(STUDENT, splits.train), loader)
    small = NaiveLoop(teacher.network, new_network(STUDENT, splits.train), loader)
    kd.key, kd.label = "kd", "kd's training loop"
    plain.label, plain.note = "plain loop", "teacher in each step, 224 pixels"
    small.key, small.label, small.note = "c96", "plain loop", f"teacher in each step, {SIDE} pixels"
    return [kd, plain, small, Packing(), Loading(loader)]


def main(
    photos: Annotated[Path, typer.Argument(help="Class folders of photographs.")],
    teacher_weights: Annotated[
        Path | None, typer.Option(help="A state_dict of ResNet-18 (.pth) of these classes.")
    ] = None,
    epochs: int = 8,
    rounds: int = 5,
    threads: int = 2,
) -> None:
    """Print minutes of the commands, and images/s of their parts."""
    threads = runtime.set_threads(threads)
    source, weights = photos.resolve(), teacher_weights and teacher_weights.resolve()
    with tempfile.TemporaryDirectory(prefix="kd-photographs-") as scratch, contextlib.chdir(scratch):
        copy_unsplit(source)
        if weights is None:
            weights = Path("r18.pth").resolve()
            make_weights(weights)
        # 1. The commands
        commands = [
            f"train --teacher {TEACHER} --teacher-weights {shlex.quote(str(weights))} --student {STUDENT} "
            f"--data {PHOTOS} --image-size {SIDE} --augment {AUGMENT} --epochs {epochs} "
            f"--accelerator cpu --threads {threads} --name {NAME}",
            f"export runs/{NAME}/student.pt --int8 -o student-int8.onnx",
        ]
        minutes = [minutes_of(command) for command in commands]
        size = Path("student-int8.onnx").stat().st_size
        run = read_result(Path("runs", NAME, "result.json"))
        config, test = run.config, run.evaluation
        # 2. Images/s
        sides = sides_of(config, threads)
        rows = summary(sides, measure(sides, rounds, threads))
        count, rates = pass_rates(config.cache_dir, config.teacher[0], AUGMENT)
        row = {"side": "pass", "label": "kd's teacher's pass", "note": "once a view", "images_a_round": count}
        rows.insert(-2, {**row, "images_per_s": spread_of(rates)})
    print(f"{machine(threads)}; batch {config.batch_size}, kd in {config.precision}, {rounds} rounds\n")
    print("\n".join(table(rows)))
    print(
        f"\nkd train, {epochs} epochs: {minutes[0]:.1f} min; kd export --int8: {minutes[1]:.1f} min; in all "
        f"{sum(minutes):.1f} min to {size / 1e6:.1f} MB. Test accuracy {test.accuracy:.1f} % (teacher "
        f"{test.teacher_accuracy:.1f} %)."
    )


if __name__ == "__main__":
    typer.run(main)
