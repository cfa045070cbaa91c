"""Networks of torchvision, timm and of a user's function: as students, their weights, and what a file may name."""

from __future__ import annotations

import signal
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models as zoo
from torchvision.transforms.functional import resize

from kdcli import models
from kdcli.base import code
from kdcli.base.config import ExportConfig, InfoConfig
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Event, Note
from kdcli.cli.arguments import existing_model
from kdcli.data import incompatibility
from kdcli.deploy.export import export
from kdcli.deploy.info import info
from kdcli.engine import RunDir, fit
from kdcli.engine.identity import input_hashes
from kdcli.models import checkpoint, external, weights
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.reproducible import DropoutKeys, use_sample_dropout
from kdcli.teacher import Teacher
from tests.helpers import StopAfter, config, make_splits, slow

FACTORY = """
import torch
from torch import nn

class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.tensor(2.0)  # no buffer

    def forward(self, maps):
        return (self.gain.item() * maps).relu()

def make(classes=7, input_size=None, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2), Gain(), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(width * 9, classes)
    )
"""


@pytest.fixture
def factory(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's function in the current folder, not allowed yet."""
    Path("own_networks.py").write_text(FACTORY)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return "own_networks:make"


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_b0",  # dropout and stochastic depth
        *map(slow, ["mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet18", "squeezenet1_1"]),
    ],
)
def test_student_of_torchvision_resumes_exactly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    splits = make_splits(train=16, test=6, size=(32, 32, 3))
    settings: dict[str, Any] = {
        "method": "ce",
        "student": f"torchvision:{name}",
        "epochs": 2,
        "batch_size": 8,
    }
    settings |= {"val_fraction": 0}
    whole = fit(config(**settings, name="whole"), splits)
    with pytest.raises(Interrupted):
        fit(config(**settings, name="cut"), splits, on_event=StopAfter(17, signal.SIGINT))
    torch.manual_seed(99)  # the resumed run draws nothing from here
    cut = fit(config(**settings, name="cut"), splits, resume=RunDir.existing(Path("runs/cut")))
    first, second = (checkpoint.load(each.run.student) for each in (whole, cut))
    assert first.arch == f"torchvision:{name}"
    assert checkpoint.digest(first.state_dict) == checkpoint.digest(second.state_dict)


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v2",
        "mobilenet_v3_small",
        "shufflenet_v2_x0_5",
        "efficientnet_b0",
        "resnet18",
        "squeezenet1_1",
    ],
)
def test_student_of_torchvision_is_exported(name: str) -> None:
    channels = 1 if name == "squeezenet1_1" else 3
    splits = make_splits(train=40, test=12, size=(32, 32, channels))
    result = fit(config(method="ce", student=f"torchvision:{name}", epochs=1, batch_size=8), splits)
    settings, student = {"parity_images": 12, "calibration_images": 8}, models.load(result.run.student)
    plain = export(student, ExportConfig(**settings), splits)
    assert plain.path.is_file() and plain.parity.images == 12
    assert export(student, ExportConfig(int8_recipe="auto", **settings), splits).trials


def test_features_of_a_torchvision_student(workplace: Path) -> None:
    """The embedding is the input of the last linear layer; layers are named as `kd info` lists them."""
    splits = make_splits(train=16, test=6, size=(32, 32, 3))
    teacher = fit(config(method="ce", student="torchvision:resnet18", epochs=1, val_fraction=0), splits)
    assert models.load(teacher.run.student).network.head_name == "fc"
    fit(
        config(
            method="at+rkd",
            student="torchvision:squeezenet1_1",
            student_stages="features.3,features.6",
            teacher=teacher.run.student,
            teacher_stages="layer1,layer2",
            epochs=1,
            val_fraction=0,
        ),
        splits,
    )


def test_stochastic_depth_drops_whole_samples() -> None:
    from torchvision.ops import StochasticDepth

    network = nn.Sequential(StochasticDepth(0.25, "row"), nn.Dropout2d(0.5)).train()
    keys = DropoutKeys(1)
    use_sample_dropout(network, keys)
    keys.step(0, torch.arange(4000).numpy(), torch.device("cpu"))
    kept = network[0](torch.ones(4000, 3, 2, 2)).flatten(1)
    assert torch.equal(kept.amin(dim=1), kept.amax(dim=1))
    assert float((kept[:, 0] != 0).double().mean()) == pytest.approx(0.75, abs=0.02)  # three standard errors
    assert torch.unique(kept).tolist() == pytest.approx([0, 1 / 0.75])
    channels = network[1](torch.ones(4000, 3, 2, 2)).flatten(2)
    assert torch.equal(channels.amin(dim=2), channels.amax(dim=2))
    assert len(torch.unique(channels[:, :, 0], dim=0)) == 8


def test_torchvision_network_is_described_by_name() -> None:
    shown = info("torchvision:resnet18", InfoConfig(classes=1000, image_size=224))
    assert shown.parameters == 11_689_512  # torchvision's own figure
    assert round(shown.macs / 1e9, 2) == 1.81  # type: ignore[operator]
    assert shown.layers[-1].name == "fc"


def test_student_that_resizes_larger_images(workplace: Path) -> None:
    splits = make_splits(train=8, test=4, size=(40, 40, 3))
    settings = config(method="ce", student_size=16, epochs=1, batch_size=4, val_fraction=0)
    student = models.load(fit(settings, splits).run.student)
    assert (student.input_size, student.network_size) == ((40, 40, 3), (16, 16, 3))
    pixels = torch.from_numpy(splits.test.images.copy()).permute(0, 3, 1, 2)
    small = resize(pixels, [16, 16], antialias=True).float()
    mean, std = (
        torch.from_numpy(measure(splits.train.images, axis=(0, 1, 2))) for measure in (np.mean, np.std)
    )
    expected = (small - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(
        student.prepare(pixels.permute(0, 2, 3, 1)), expected.float(), rtol=0, atol=1e-4
    )
    with pytest.raises(UsageError, match="--student-size requires --preprocess mean-std"):
        config(student_size=16, preprocess="none")


def test_stored_network_that_resizes_trains_at_another_size(workplace: Path) -> None:
    torch.save(zoo.squeezenet1_1(num_classes=3).state_dict(), "s.pth")
    file = existing_model(Path("torchvision:squeezenet1_1:s.pth"))
    settings = config(method="ce", student=str(file), epochs=1, batch_size=4, val_fraction=0)
    student = models.load(fit(settings, make_splits(train=4, test=3, size=(40, 40, 3))).run.student)
    assert (student.input_size, student.network_size) == ((40, 40, 3), (224, 224, 3))


def test_grey_images_are_taken_as_rgb(workplace: Path) -> None:
    grey = models.build("torchvision:squeezenet1_1", classes=3, input_size=(32, 32, 1)).eval()
    colour = zoo.squeezenet1_1(num_classes=3).eval()
    colour.load_state_dict(grey.state_dict())
    pixels = torch.rand(2, 1, 32, 32)
    with torch.inference_mode():
        assert torch.equal(grey(pixels), colour(pixels.expand(-1, 3, -1, -1)))
    torch.save(colour.state_dict(), "s.pth")
    teacher, data = (
        models.load(existing_model(Path("torchvision:squeezenet1_1:s.pth"))),
        make_splits(size=(40, 40, 1)),
    )
    assert incompatibility(teacher, data.test) is None
    assert teacher(torch.from_numpy(data.test.images[:2])).shape == (2, 3)


@pytest.mark.parametrize(
    ("arch", "side", "message"),
    [
        ("torchvision:resnet81", 32, "no classifier resnet81"),
        ("torchvision:inception_v3", 128, "no classifier inception_v3"),
        ("torchvision:alexnet", 16, "does not take 16×16×3 images"),
        ("torchvision:resnet18:x", 32, "no classifier resnet18:x"),
        ("own_networks:make", 32, "is a custom function, which runs only if you name it"),
    ],
)
def test_names_that_are_refused(arch: str, side: int, message: str, factory: str) -> None:
    with pytest.raises(UsageError, match=message):
        models.build(arch, classes=3, input_size=(side, side, 3))


def test_a_file_cannot_make_torchvision_fetch_weights(workplace: Path) -> None:
    stored = Checkpoint(
        arch="torchvision:resnet18",
        arch_args={"weights": "DEFAULT"},
        state_dict=zoo.resnet18(num_classes=2).state_dict(),
        preprocess={"name": "none", "args": {}, "state": {}},
        classes=("a", "b"),
        input_size=(32, 32, 3),
    )
    with pytest.raises(KdError, match="does not take these arguments"):
        models.from_checkpoint(stored)


def test_function_of_the_user_as_student(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = make_splits(train=16, test=6, size=(8, 8, 3))
    settings = config(method="ce", student=factory, epochs=1, val_fraction=0)
    with pytest.raises(UsageError, match="runs only if you name it"):
        fit(settings, splits)
    code.allow(factory)
    result = fit(settings, splits)
    assert result.run.path.name == "ce-make-1"
    student = models.load(result.run.student)
    assert (student.arch, student.network.head_name) == (factory, "4")
    assert "code of own_networks:make" in student.provenance["inputs"]
    monkeypatch.setenv(code.ALLOWED, "")
    with pytest.raises(KdError, match="is a custom function") as error:
        models.load(result.run.student)
    assert error.value.hint == "If you trust its code: export KD_NETWORKS=own_networks:make"


def test_edited_function_is_another_teacher(factory: str) -> None:
    """Its outputs are computed again, and a run from it is another run."""
    code.allow(factory)
    splits = make_splits(train=14, test=7, size=(8, 8, 3), classes=7)
    path = existing_model(Path(factory), image_size=8)
    settings = config(teacher=path, augment="none")

    def outputs(computed: int) -> torch.Tensor:
        teacher = Teacher.open(path, Path("cache"))
        [found] = teacher.logits(splits.train)
        assert teacher.views_computed == computed
        return found.logits()

    before, inputs = outputs(1), input_hashes(settings, splits)
    assert torch.equal(outputs(0), before)
    Path("own_networks.py").write_text(FACTORY.replace("tensor(2.0)", "tensor(-1.25)"))
    with pytest.raises(UsageError, match="changed since it was imported"):
        outputs(0)
    del sys.modules["own_networks"]
    assert not torch.equal(outputs(1), before)
    changed = dict(input_hashes(settings, splits).items() ^ inputs.items())
    assert list(changed) == ["code of own_networks:make"]


def test_weights_of_a_module_belong_to_the_run(workplace: Path) -> None:
    """Modules that differ in their weights have one name, by which a trained one is read."""
    splits, found = make_splits(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        arch = external.own(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
        found.append(input_hashes(config(method="ce", student=arch), splits))
    assert found[0] == found[1] != found[2]
    assert found[0].keys() == found[2].keys()


def test_command_that_resumes_a_function_allows_it(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    code.allow(factory)
    settings = config(method="ce", student=factory, epochs=2, batch_size=8, val_fraction=0, name="cut")
    with pytest.raises(Interrupted) as stopped:
        fit(settings, make_splits(train=16, size=(8, 8, 3)), on_event=StopAfter(9, signal.SIGINT))
    assert stopped.value.hint == f"KD_NETWORKS={factory} kd train --resume runs/cut"


def prefixed(state: dict[str, torch.Tensor], before: str) -> dict[str, torch.Tensor]:
    return {before + name: value for name, value in state.items()}


@pytest.mark.parametrize("form", ["bare", "module", "compiled", "ema", "lightning", "net", "old"])
def test_forms_of_weights(form: str, tmp_path: Path) -> None:
    def network_of(classes: int) -> nn.Module:  # its own names have a prefix, too
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))
        return nn.Sequential(OrderedDict(net=layers))

    network = network_of(5)
    state = network.state_dict()
    document: Any = {
        "bare": state,  # an OrderedDict with the attribute `_metadata`
        "module": {"epoch": 3, "state_dict": OrderedDict(prefixed(state, "module.")), "arch": "x"},
        "compiled": {"model": prefixed(state, "module._orig_mod.")},
        "ema": {"ema": {**prefixed(state, "module."), "n_averaged": torch.tensor(7)}},
        "lightning": {"hyper_parameters": {"lr": 0.1}, "state_dict": prefixed(state, "model.")},
        "net": {"net": state, "acc": 91.5, "scheduler": {"milestones": Counter([60, 80]), "gamma": 0.1}},
        "old": {name: value for name, value in state.items() if "num_batches" not in name},
    }[form]
    path = tmp_path / "weights.pth"
    torch.save(document, path, _use_new_zipfile_serialization=form != "old")
    found, head = weights.match(network, weights.read(path), str(path))
    assert head == ()
    assert checkpoint.digest(found) == checkpoint.digest(dict(state))
    assert weights.match(network_of(9), weights.read(path), str(path))[1] == ("net.3.weight", "net.3.bias")


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    wide = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(24, 5)).state_dict()
    del wide["2.bias"]
    with pytest.raises(KdError) as error:
        weights.match(network, {**wide, "extra": torch.ones(1)}, "w.pth")
    assert error.value.message == (
        "w.pth does not fit the network: 2.bias is missing; extra is unknown; 0.weight is 6×3×3×3, not 4×3×3×3; "
        "0.bias is 6, not 4; 2.weight is 5×24, not 5×16"
    )
    backbone = nn.Sequential(OrderedDict(features=network[0], flat=nn.Flatten(), fc=nn.Linear(16, 5)))
    with pytest.raises(KdError, match=r"the network: fc\.weight is missing; fc\.bias is missing\n"):
        weights.match(backbone, prefixed(network[0].state_dict(), "features."), "w.pth")


def test_a_file_of_weights_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(KdError, match="refuses torch"):
        weights.read(path)
    path.write_bytes(b"no weights")
    with pytest.raises(KdError, match="cannot be read safely"):
        weights.read(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(KdError, match="holds no weights"):
        weights.read(path)


def test_student_starts_from_weights(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    network = zoo.squeezenet1_1(num_classes=4)
    torch.save({"state_dict": network.state_dict()}, "start.pth")
    splits = make_splits(train=16, test=6, size=(32, 32, 3))
    notes: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    start = config(
        method="ce",
        student="torchvision:squeezenet1_1",
        student_weights="start.pth",
        epochs=1,
        lr=1e-12,
        val_fraction=0,
    )
    result = fit(start, splits, on_event=note)
    assert (
        "start.pth is of 4 classes: the last layer is new (classifier.1.weight, classifier.1.bias)" in notes
    )
    trained = checkpoint.load(result.run.student)
    torch.testing.assert_close(trained.state_dict["features.0.weight"], network.features[0].weight.detach())
    assert "student weights" in trained.provenance["inputs"]
    folder = workplace / "other"
    folder.mkdir()
    monkeypatch.chdir(folder)
    again = RunDir(workplace / result.run.path).read_config()
    assert again.student_weights == workplace / "start.pth"


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = nn.Linear(2, 3).state_dict()
    safetensors.save_file(dict(state), tmp_path / "w.safetensors")
    assert checkpoint.digest(weights.read(tmp_path / "w.safetensors")) == checkpoint.digest(dict(state))
