"""Every method on every pair of networks: two steps, an exact resume, a student without auxiliary modules."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from kdcli import methods, models
from kdcli.base.config import ExportConfig, make
from kdcli.base.errors import Interrupted
from kdcli.data import ImageSet, Splits
from kdcli.data.preprocess import fit as fit_preprocess
from kdcli.deploy.export import export
from kdcli.engine import RunDir, RunResult, fit, read_metrics
from kdcli.models import Classifier, checkpoint
from tests.helpers import StopAfter, config, digest_without_clocks, make_splits

# the field's (Tian et al. 2020), the reference's, and networks without a linear layer or with fewer stages
PAIRS = {
    "wrn-40-2": ("wrn-16-2", "wrn-40-1", "shufflenetv1"),
    "resnet56": ("resnet20",),
    "resnet110": ("resnet20", "resnet32"),
    "resnet32x4": ("resnet8x4", "shufflenetv1", "shufflenetv2"),
    "vgg13": ("vgg8", "mobilenetv2-half"),
    "nin": ("lenet", "convnet-small"),
}
COMBINED = ("kd+at", "dkd+vid+ls", "noisy+crd", "crd+reviewkd")
# oneDNN of torch 2.14 corrupts memory on CPUs without AVX-512 in the backward pass of strided 1×1 convolutions with
# fewer than 8 input channels: these families are less narrow
WIDTHS = {"wrn-40-2": 0.5, "wrn-16-2": 0.5, "wrn-40-1": 0.5, "resnet32x4": 0.25, "resnet8x4": 0.25}
WIDTHS |= dict.fromkeys(("resnet20", "resnet32", "resnet56", "resnet110"), 0.5)
NARROW = 0.125
ONE_PAIR, ONE_METHOD = ("vgg13", "vgg8"), "crd+reviewkd"  # the pair is quick; the method has two adapters


@pytest.fixture(scope="module")
def splits() -> Splits:
    return make_splits(train=8, test=3, size=(32, 32, 3))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> dict[str, Path]:
    """Untrained: what they know is not what is tested."""
    folder = tmp_path_factory.mktemp("teachers")
    return {name: write_teacher(folder / f"{name}.pt", name, splits.train) for name in PAIRS}


def write_teacher(path: Path, name: str, train: ImageSet, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    arguments = {"width": WIDTHS.get(name, NARROW)}
    network = models.build(name, classes=3, input_size=train.input_size, **arguments)
    preprocess = fit_preprocess("mean-std", train.images, np.arange(len(train)))
    Classifier(
        network,
        preprocess,
        arch=name,
        arch_args=arguments,
        classes=train.classes,
        input_size=train.input_size,
    ).save(path)
    return path


def state_of(run: RunDir) -> str:
    stored = checkpoint.load(run.last)
    return digest_without_clocks([stored.state_dict, stored.training])


def cases(*, quick: bool) -> list[tuple[str, str, str]]:
    """Quick: each method on one pair, and each pair with one method. Otherwise the rest of the grid."""
    pairs = [(teacher, student) for teacher, students in PAIRS.items() for student in students]
    return [
        (method, *pair)
        for method in (*methods.METHODS, *COMBINED)
        for pair in pairs
        if quick == (pair == ONE_PAIR or method == ONE_METHOD)
    ]


def settings_of(method: str, teacher: Path, student: str) -> dict[str, Any]:
    """Two steps."""
    return {
        "method": method,
        "teacher": teacher,
        "student": student,
        "width": WIDTHS.get(student, NARROW),
        "epochs": 1,
        "batch_size": 4,
        "lr": 1e-3,
        "val_fraction": 0.0,
        "save_every": "1steps",
        "crd_negatives": 5,
    }


def check_student(result: RunResult, width: float) -> None:
    """Two finite steps, and a file with the network's tensors only."""
    assert len({line.step for line in read_metrics(result.run.metrics_file)}) == 1
    assert np.isfinite(result.history[-1].loss)
    bare = models.build(result.student, classes=3, input_size=(32, 32, 3), width=width)
    stored = checkpoint.load(result.run.student)
    assert set(stored.state_dict) == set(bare.state_dict())
    assert stored.training is None


@pytest.mark.parametrize(("method", "teacher", "student"), cases(quick=True))
def test_method_trains_resumes_exactly_and_stores_the_student_only(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    splits: Splits,
    teachers: dict[str, Path],
    method: str,
    teacher: str,
    student: str,
) -> None:
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    settings = settings_of(method, teachers[teacher], student)
    whole = fit(config(**settings, name="whole"), splits)
    check_student(whole, settings["width"])
    with pytest.raises(Interrupted):
        fit(config(**settings, name="cut"), splits, on_event=StopAfter(4, signal.SIGINT))
    run = RunDir.existing(Path("runs/cut"))
    assert checkpoint.load(run.last).training["state"]["step"] == 1  # type: ignore[index]

    fit(run.read_config(), splits, resume=run)

    assert state_of(run) == state_of(whole.run)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "teacher", "student"), cases(quick=False))
def test_method_trains_on_every_pair(
    workplace: Path, splits: Splits, teachers: dict[str, Path], method: str, teacher: str, student: str
) -> None:
    """A resume depends on the method's modules and on the network's layers, each of which the quick cases cover."""
    settings = settings_of(method, teachers[teacher], student)

    check_student(fit(config(**settings), splits), settings["width"])


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name == ONE_METHOD else pytest.mark.slow)
        for name in (*methods.METHODS, *COMBINED)
    ],
)
def test_a_student_of_each_method_is_exported_alone(workplace: Path, method: str) -> None:
    """The ONNX file gives what the checkpoint gives, and has the weights of the bare network and no others."""
    small = make_splits(train=24, test=6, size=(16, 16, 3))
    teacher = write_teacher(Path("teacher.pt"), "convnet-small", small.train)
    settings = {"method": method, "teacher": teacher, "student": "convnet-tiny", "crd_negatives": 5}
    student = fit(config(**settings, epochs=1, val_fraction=0.0, name="s"), small).run.student

    made = export(models.load(student), make(ExportConfig, {"output": Path("s.onnx")}), small)

    assert made.path == Path("s.onnx")
    held = sum(
        int(np.prod(value.dims)) for value in onnx.load("s.onnx").graph.initializer if value.data_type == 1
    )
    assert held <= sum(value.numel() for value in checkpoint.load(student).state_dict.values())
