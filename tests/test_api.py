"""The functions of `import kdcli as kd` beside the commands of the same name."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import kdcli as kd
from kdcli.api import Run
from kdcli.api.arguments import path_of, several
from kdcli.base.config import make
from kdcli.base.errors import Interrupted, UsageError
from kdcli.base.results import Result
from kdcli.cli import compare as compare_command
from kdcli.cli import export as export_command
from kdcli.cli import output
from kdcli.cli import test as test_command
from kdcli.cli import train as train_command
from kdcli.data import Splits
from kdcli.engine import fit
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint, external
from tests.helpers import ROOT, StopAfter, command_line, digest, digits_student, image_folder

SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 16, "precision": "32", "threads": 1}
WORDS = ("--epochs", "1", "--batch-size", "16", "--precision", "32", "--threads", "1")


@pytest.fixture
def photos(workplace: Path) -> Splits:
    """Images of 12×12 of three classes, loaded at another size than their own."""
    image_folder(Path("photos"))
    found = kd.load_data("photos", image_size=12)
    assert "array" not in repr(found)
    return found


@pytest.fixture
def run(photos: Splits) -> Run:
    teacher = kd.distill(method="ce", student="convnet-small", data=photos, name="teacher", **SHORT)
    assert teacher.teacher is None and teacher.student == Path("runs/teacher/student.pt")
    return kd.distill(teacher.student, "convnet-tiny", photos, tau=2.0, **SHORT)


def test_import_loads_no_library() -> None:
    code = "import sys, kdcli; print(len({'torch', 'numpy', 'pydantic', 'rich', 'typer'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "0\n"
    assert not hasattr(kd, "absent") and kd.distill.__doc__


def test_training_and_figures_are_those_of_the_commands(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    call = command_line(monkeypatch, train_command, test_command, export_command)
    words = ("--data", "photos", "--image-size", "12", "--tau", "2", *WORDS)
    call("train", "--teacher", str(run.teacher), "--student", "convnet-tiny", *words)
    again = Path("runs/kd-convnet-tiny-2/student.pt")
    assert (run.student, run.teacher) == (
        Path("runs/kd-convnet-tiny-1/student.pt"),
        Path("runs/teacher/student.pt"),
    )
    assert digest(again) == digest(run.student)
    assert run.result.config.image_size == 12  # of the data that were loaded before
    # figures: of a path and of a model in memory, with the recorded teacher and data
    document = json.loads(call("test", str(again), "--json", "--threads", "1").stdout)["test"]
    model = kd.load_model(run.student)
    for each in (run.student, "kd-convnet-tiny-1", model):
        found = kd.evaluate(each, "photos", teacher=run.teacher, threads=1)
        assert json.loads(json.dumps(found.to_dict())) == document
    assert found.accuracy == run.result.evaluation.accuracy
    # the file of kd export
    exported = kd.export(run.student, "x.onnx", parity_images=7)
    assert exported.path == Path("x.onnx") and exported.quantisation is None
    call("export", str(run.student), "-o", "y.onnx", "--parity-images", "7")
    assert Path("x.onnx").read_bytes() == Path("y.onnx").read_bytes()


def test_models_in_memory_stand_for_their_content(run: Run, photos: Splits) -> None:
    model: Any = kd.load_model(run.student)
    with torch.no_grad():
        model.network.fc.bias.copy_(torch.tensor([0.0, 1e3, 0.0]))  # always the second class
    images = torch.from_numpy(photos.test.images[:4].copy())
    assert model(images).argmax(dim=1).tolist() == [1, 1, 1, 1]
    with pytest.raises(kd.KdError, match=r"must be torch\.uint8"):
        model(images / 255)
    shares = kd.evaluate(model, photos).per_class
    assert shares == (0, 100, 0)
    kd.export(model, "changed.onnx", data=photos, parity_images=7)
    Image.new("RGB", (40, 30)).save("new.png")
    for each in (model, "changed.onnx", kd.load_model("changed.onnx")):
        [found] = kd.predict(each, "new.png", top_k=1)
        assert found.classes == ("class-1",)
    result = kd.bench(
        [run.student, model, kd.load_model("changed.onnx")],
        data=photos, rounds=3, max_seconds=1, no_memory=True, batch=(1, 2), engine="onnxruntime", threads=1,
    )  # fmt: skip
    assert [row.accuracy for row in result.rows][1:] == [pytest.approx(100 / 3)] * 2
    assert result.batches == (1, 2) and result.rows[0].path == run.student
    # as a teacher and as the start of a student; the same content is one file
    again = kd.distill([model, run.student], model, photos, teacher_weight=(1, 3), **SHORT)
    [file] = Path("cache/models").iterdir()
    assert again.teacher == file and again.result.config.student_file == file


class Brightness(nn.Module):
    """Classes by the mean pixel m, nearest of 60, 120 and 180: logits (2·m·c − c²)/200, perfect on `image_folder`."""

    def __init__(self, unit: float = 1.0) -> None:
        super().__init__()
        self.unit = unit  # of the pixels, and not among the weights
        self.fc = nn.Linear(1, 3)
        centres = torch.tensor([60.0, 120.0, 180.0])
        self.fc.weight.data, self.fc.bias.data = centres[:, None] / 100, -(centres**2) / 200

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.fc(pixels.mean(dim=(1, 2, 3))[:, None] * self.unit)


class Small(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.out = nn.Linear(400, classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.out(self.layers(pixels))


def test_modules_teach_and_learn(photos: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    student = Small()
    before = checkpoint.digest(dict(student.state_dict()))
    run = kd.distill(Brightness(), student, photos, **SHORT)
    assert run.result.teacher is not None and run.result.teacher.plain == 100
    assert run.result.teacher_passes > 0 and checkpoint.digest(dict(student.state_dict())) == before
    images = torch.from_numpy(photos.test.images[:9].copy())
    planes = images.permute(0, 3, 1, 2).float()
    assert torch.equal(kd.load_model(run.teacher)(images), Brightness()(planes))
    # other code with the same weights is another teacher, the same is found in the cache
    assert path_of(Brightness(), photos) == run.teacher != path_of(Brightness(1.5), photos)
    assert kd.distill(Brightness(), "convnet-tiny", photos, **SHORT).result.teacher_passes == 0
    scaled = kd.distill(Brightness(255), "convnet-tiny", photos, teacher_scale="1/255", **SHORT)
    assert scaled.teacher != run.teacher and scaled.result.teacher_passes > 0
    # the student is a model as any other, in this process and, with its module, in others
    learned: Any = kd.load_model(run.student)
    assert isinstance(learned.network, Small) and learned.arch.startswith("module:Small-")
    assert kd.evaluate(run.student).accuracy == run.result.evaluation.accuracy
    assert kd.export(run.student, "small.onnx", parity_images=7).parity.same_top1 == 7
    limits = {"rounds": 3, "max_seconds": 1, "batch": 1, "engine": "torch", "threads": 1}
    [row, _] = kd.bench([run.teacher, "small.onnx"], data=photos, **limits).rows
    assert row.accuracy == 100 and row.footprint is None and "memory not measured" in row.notes[-1]
    monkeypatch.setattr(external, "_OWN", {})
    with pytest.raises(kd.KdError, match=r"the module Small-.* is not known to this process") as caught:
        kd.load_model(run.student)
    assert "kd.load_model(module" in caught.value.hint
    kd.load_model(Small(), data=photos)
    assert torch.equal(kd.load_model(run.student)(images), learned(images))


def test_module_takes_pixels_as_set(photos: Splits) -> None:
    module = Small()
    model = kd.load_model(
        module, data=photos, scale="1/255", mean=(0.5, 0.4, 0.3), std=0.25, channel_order="bgr"
    )
    images = torch.from_numpy(photos.test.images[:4].copy())
    mean = torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    expected = module.eval()((images.permute(0, 3, 1, 2).float().flip(1) / 255 - mean) / 0.25)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    cases: list[tuple[Any, str]] = [
        (lambda: kd.load_model(Small()), "a torch.nn.Module needs data"),
        (lambda: kd.predict(Small(), "x.png"), "a torch.nn.Module needs data"),
        (lambda: kd.distill(Brightness(), "convnet-tiny", "photos"), "a torch.nn.Module needs data"),
        (
            lambda: kd.load_model(Small(7), data=photos),
            r"Small-.* gives \(2, 7\) for 2 images",
        ),
        (
            lambda: kd.distill(student=nn.Linear(5, 3), data=photos, method="ce"),
            "Linear-.* does not take 12×12×3 images",
        ),
    ]
    for call, message in cases:
        with pytest.raises(kd.KdError, match=message) as caught:
            call()
        assert caught.value.hint
        assert ("kd.load_model(module, data=kd.load_data(…))" in caught.value.hint) == (
            "needs data" in message
        )
    with pytest.raises(kd.KdError, match=r"accuracy 33\.\d %") as caught:
        kd.distill(Brightness(255), "convnet-tiny", photos, **SHORT)
    assert "--teacher-scale 1/255" in caught.value.hint


def test_one_model_is_a_list_of_one(workplace: Path) -> None:
    file = digits_student(Path("student.pt"))
    [row] = kd.bench(
        str(file), rounds=3, max_seconds=1, no_memory=True, batch=1, engine="torch", threads=1
    ).rows
    assert row.path == file
    with pytest.raises(UsageError, match="must be numbers"):
        kd.bench(file, batch=())
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # which itself can be iterated over
    assert several(module) == [module] and several((module, file)) == [module, file]


def test_comparison_has_the_runs_of_the_command(photos: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"student": "convnet-tiny", "data": photos}
    found = kd.compare(["ce", "ls"], seeds=range(3, 4), out="here", **common, **SHORT)
    assert [(each.method, each.seed) for each in found.runs] == [("ce", 3), ("ls", 3)]
    call = command_line(monkeypatch, compare_command)
    words = ("--methods", "ce,ls", "--seeds", "3,", "--student", "convnet-tiny", "--out", "there")
    call(*words, "--data", "photos", "--image-size", "12", *WORDS)
    [file] = Path().glob("there/*/comparison.json")
    written = json.loads(file.read_text())
    assert [row["test_mean"] for row in written["standings"]] == [row.test_mean for row in found.standings]
    assert (file.parent.parent.parent / "here" / file.parent.name / "figure.svg").is_file()
    assert kd.compare(resume=file.parent).standings == found.standings


@pytest.mark.parametrize("is_module", [False, True])
def test_interrupted_run_is_resumed(photos: Splits, is_module: bool) -> None:
    student = external.own(Small()) if is_module else "convnet-tiny"
    values = {**SHORT, "student": student, "method": "ce", "epochs": 2}
    settings = make(TrainConfig, {**photos.settings, **values, "name": "cut"})
    with pytest.raises(Interrupted) as stopped:
        fit(settings, photos, on_event=StopAfter(64, signal.SIGINT))
    line = "kd.distill(resume='runs/cut')" if is_module else "kd train --resume runs/cut"
    assert stopped.value.hint == line
    again = kd.distill(resume="cut") if not is_module else eval(line)
    whole = kd.distill(data=photos, name="whole", **values)
    assert again.result.run.path == Path("runs/cut") and digest(again.student) == digest(whole.student)


def test_errors_have_a_hint_and_leave_nothing(workplace: Path) -> None:
    digits = kd.load_data("digits")
    before = sorted(workplace.rglob("*"))
    cases: list[tuple[Any, str, str]] = [
        (lambda: kd.load_data("digits", epochs=3), "unknown setting: epochs", "image_size"),
        (lambda: kd.load_data("absent"), "no dataset or path: absent", "digits"),
        (lambda: kd.distill(data=digits, method="ce", image_size=9), "image_size is a setting", "load_data"),
        (lambda: kd.distill(data=digits, method="ce", epoch=9), "unknown setting: epoch", "epochs"),
        (lambda: kd.distill("absent.pt", data=digits), "no such file: absent.pt", "kd demo"),
        (lambda: kd.distill(data=digits, method="ce", devices=2), "one process", "kd train --devices"),
        (lambda: kd.bench(plot="x.svg"), "unknown setting: plot", "command line"),
        (lambda: kd.bench([digits_student(Path("student.pt"))], teacher="x.pt"), "first model", "first"),
        (
            lambda: kd.predict("absent.pt", "x.png", class_map="x.csv"),
            "unknown setting: class_map",
            "class_names",
        ),
        (lambda: kd.compare("ce", seed=3), "unknown setting: seed", "seeds"),
        (lambda: kd.export("absent.pt", int8="small"), "--int8-recipe small: must be", ""),
        (lambda: kd.distill(len, data=digits), "builtin_function_or_method is not a model", "kd.load_model"),  # type: ignore[arg-type]
        (lambda: kd.evaluate(digits, digits), "Splits is not a model", "`student`"),  # type: ignore[arg-type]
        (lambda: kd.distill(data=digits, method="ce", student=len), "is not a model", "kd.load_model"),  # type: ignore[arg-type]
        (lambda: kd.load_data(np.zeros(3)), "ndarray is no data set", "save_to_disk"),  # type: ignore[arg-type]
        (lambda: kd.predict("student.pt", [np.zeros(3)]), "images are paths", "image files"),  # type: ignore[list-item]
        (lambda: kd.evaluate("student.pt", digits, test_fraction=0.5), "a setting of the data", "load_data"),
    ]
    for call, message, hint in cases:
        with pytest.raises(kd.KdError) as caught:
            call()
        assert message in caught.value.message and hint in caught.value.hint
        assert not hint or f"hint: {caught.value.hint}" in "".join(traceback.format_exception(caught.value))
    model = kd.load_model("student.pt")
    with pytest.raises(UsageError, match="scale is a setting of the model"):
        kd.predict(model, "x.png", scale="1/255")
    assert sorted(workplace.rglob("*")) == sorted([*before, workplace / "student.pt"])


def test_results_are_tables_of_their_values(run: Run) -> None:
    [accuracy] = re.findall(r"^test\.accuracy +(\S+)$", str(run), re.MULTILINE)
    assert float(accuracy) == pytest.approx(run.result.evaluation.accuracy, rel=1e-3)
    assert json.loads(json.dumps(run.to_dict()))["student"] == "convnet-tiny"

    @dataclass
    class Written(Result):
        path: Path

    assert json.dumps(Written(Path("a/b")).to_dict()) == '{"path": "a/b"}'

    class Odd(Result):
        def to_dict(self) -> dict[str, Any]:
            return {"name": "<b>\x1b[1m", "inner": {"shares": (0.5, None), "many": list(range(99))}}

    assert str(Odd()).splitlines()[1:] == [
        "name          <b> [1m",
        "inner.shares  0.5, —",
        "inner.many    99 values",
    ]
    assert "<td>&lt;b&gt; [1m</td>" in Odd()._repr_html_()


def test_bars_in_notebooks_need_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_stderr", Console(stderr=True, force_jupyter=True))
    monkeypatch.setattr(output, "find_spec", lambda name: None)
    assert not output._draws()
    monkeypatch.setattr(output, "find_spec", lambda name: name == "ipywidgets")
    assert output._draws()
    monkeypatch.setattr(output.activity.bars.live, "ipy_widget", object())  # of an earlier call, closed
    with output.activity.running():
        assert output.activity.bars.live.ipy_widget is None


def test_functions_run_in_other_threads(workplace: Path) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(kd.load_data("digits")))
    thread.start()
    thread.join()
    assert np.shape(found[0].test.images)[1:] == (8, 8, 1)
