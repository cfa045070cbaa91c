"""A student from a file: its weights and preprocessing; a converted Caffe network as one."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcli import models
from kdcli.base.config import ConvertConfig, ExportConfig, make
from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.events import Event, Note, ignore
from kdcli.cli import test, train
from kdcli.data import Splits
from kdcli.deploy import export
from kdcli.engine import RunDir, fit, read_metrics, student
from kdcli.engine.plan import load_data
from kdcli.engine.student import OutputScale
from kdcli.methods import TrainConfig
from kdcli.models import checkpoint
from tests.caffe_files import convert, field, layer, net, write
from tests.helpers import StopAfter, command_line, config, digest, image_folder, make_splits

RANDOM = np.random.default_rng(7)


def weights(*shape: int) -> np.ndarray:
    return RANDOM.normal(0, 0.3, shape).astype(np.float32)


LAYERS = [
    layer("Input", "data", "", "data", field(1, b"".join(field(1, side) for side in (1, 3, 12, 12)))),
    layer("Convolution", "conv/1", "data", "c", field(1, 6) + field(4, 3), (weights(6, 3, 3, 3), weights(6))),
    layer(
        "BatchNorm", "norm", "c", "c", b"", (weights(6), weights(6) ** 2 + 1, np.ones(1, np.float32))
    ),
    layer("Scale", "scale", "c", "c", field(4, 1), (weights(6) + 1, weights(6))),
    layer("PReLU", "prelu", "c", "c", b"", (weights(6),)),
    layer("LRN", "lrn", "c", "n", field(1, 3) + field(2, 0.1)),
    layer("Pooling", "pool", "n", "p", field(2, 3) + field(3, 2)),
    layer("Dropout", "drop", "p", "p", field(1, 0.3)),
    layer("InnerProduct", "ip", "p", "ip", field(1, 3), (weights(3, 150), weights(3))),
    layer("Softmax", "prob", "ip", "prob"),
]  # fmt: skip


@pytest.fixture
def splits() -> Splits:
    return make_splits(size=(12, 12, 3))


@pytest.fixture
def caffe_net(workplace: Path) -> Path:
    """A converted caffemodel, whose preprocessing takes 100 from each pixel."""
    text = workplace / "net.prototxt"
    model = write(workplace, net(LAYERS, v1=False))
    data = 'layer { name: "d" type: "Data" top: "data" include { phase: TRAIN } transform_param { mean_value: 100 } }'
    text.write_text(data + "\n" + caffe_text(model))
    convert(model, ConvertConfig(prototxt=text)).save(workplace / "caffe-net.pt")
    return Path("caffe-net.pt")


def caffe_text(model: Path) -> str:
    from google.protobuf import text_format

    from kdcli.caffe import schema

    message = schema.NetParameter()
    message.ParseFromString(model.read_bytes())
    for one in message.layer:
        one.ClearField("blobs")
    return str(text_format.MessageToString(message))


def still(**changes: Any) -> TrainConfig:
    """Training that changes nothing: steps too small for float32."""
    return config(**{"optimizer": "sgd", "lr": 1e-30, "epochs": 1, **changes})


def test_a_student_file_gives_weights_and_preprocessing(
    workplace: Path, caffe_net: Path, splits: Splits
) -> None:
    before = models.load(caffe_net)
    result = fit(still(method="ce", student=str(caffe_net), preprocess="mean-image"), splits)
    after = models.load(result.run.student)
    assert result.run.path.name == "ce-caffe-net-1"
    assert after.preprocess.spec()["name"] == before.preprocess.spec()["name"] != "mean-image"
    assert repr(after.network) == repr(before.network)
    for name, value in before.network.named_parameters():
        assert torch.equal(value, after.network.get_parameter(name)), name
    assert "published" not in after.provenance
    assert after.provenance["inputs"]["student"] is not None
    again = fit(still(method="ce", student=str(result.run.student)), splits)
    assert again.run.path.name == "ce-ce-caffe-net-1-1"  # named by the run, not "student"


def test_resize_of_the_data_is_the_students(workplace: Path) -> None:
    """A student from a file keeps that of the file, unless --resize is given; the teacher's other one is noted."""
    image_folder(workplace / "toy")
    notes: list[str] = []

    def trained(name: str, **changes: Any) -> models.Classifier:
        settings = config(
            data="toy", image_size=16, name=name, epochs=1, batch_size=64, **{"method": "ce", **changes}
        )

        def on_event(event: Event) -> None:
            if isinstance(event, Note):
                notes.append(event.text)

        return models.load(fit(settings, load_data(settings), on_event=on_event).run.student)

    assert trained("whole").resize == 0
    teacher = trained("teacher", resize=20)
    assert teacher.resize == 20
    assert trained("more", student="runs/teacher/student.pt").resize == 20
    assert trained("other", student="runs/teacher/student.pt", resize=32).resize == 32
    assert not any("--resize" in note for note in notes)
    for mode in ("views", "off"):
        notes.clear()
        trained(mode, method="kd", teacher="runs/teacher/student.pt", teacher_cache=mode)
        assert any("recorded with --resize 20, these images with --resize 16:" in note for note in notes)


def test_regression_starts_with_the_logits_of_the_student_file(workplace: Path) -> None:
    """The scale that a student regresses in must not change what a trained one says."""
    splits = make_splits(size=(16, 16, 3))
    fit(config(method="ce", student="convnet-small", name="teacher"), splits)
    first = fit(config(method="ce", student="lenet-caffe", lr=1e-3, name="first"), splits)  # no batch norm
    settings = {"teacher": Path("runs/teacher/student.pt"), "student": str(first.run.student)}
    after = fit(still(method="logits", **settings), splits)
    wanted = models.predict_logits(models.load(first.run.student), splits.test.images)
    found = models.predict_logits(models.load(after.run.student), splits.test.images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    fresh = fit(still(method="logits", **{**settings, "student": "lenet-caffe"}), splits)
    assert not torch.allclose(
        models.predict_logits(models.load(fresh.run.student), splits.test.images), wanted, atol=1
    )


def test_unfolding_undoes_folding() -> None:
    network = nn.Sequential()
    network.add_module("out", nn.Linear(4, 3))
    network.head_name = "out"  # type: ignore[assignment]
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    output = OutputScale(torch.tensor([3.0, -2.0, 10.0]), 7.0)
    wanted = network(x)
    output.unfold(network)
    torch.testing.assert_close(output(network(x)), wanted)
    output.fold(network)
    torch.testing.assert_close(network(x), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ce", "logits", "noisy", "kd"])
def test_a_caffe_net_trains_resumes_and_exports(
    workplace: Path, caffe_net: Path, splits: Splits, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any other student: exactly resumable, and the same as ONNX."""
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    fit(config(method="ce", student="convnet-small", epochs=1, name="teacher"), splits)
    settings = {
        "method": method,
        "student": str(caffe_net),
        "augment": "flip-crop",
        "save_every": "2steps",
        "lr": 1e-3,
    }
    if method != "ce":
        settings["teacher"] = Path("runs/teacher/student.pt")
    whole = fit(config(**settings, name="whole"), splits)
    assert models.final_linear(models.load(caffe_net).network) is not None
    lines = [line.loss for line in read_metrics(whole.run.metrics_file) if line.kind == "epoch"]
    assert lines[-1] < 0.9 * lines[0]
    before = checkpoint.load(caffe_net).state_dict
    after = checkpoint.load(whole.run.student).state_dict
    assert not any(torch.equal(value, after[name]) for name, value in before.items())  # statistics, too
    with pytest.raises(Interrupted):
        fit(config(**settings, name="cut"), splits, on_event=StopAfter(120, signal.SIGINT))
    run = RunDir.existing(Path("runs/cut"))
    resumed = fit(run.read_config(), splits, resume=run)
    assert digest(resumed.run.last) == digest(whole.run.last)
    student = models.load(whole.run.student)
    images = splits.train.images
    done = export.export_classifier(
        student, make(ExportConfig, {"output": Path("x.onnx")}), images, "toy", lambda event: None
    )
    assert done.parity.same_top1 == done.parity.images


def test_resuming_with_another_student_file_is_refused(
    workplace: Path, caffe_net: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcli.engine.trainer._SHOW_EVERY_S", 0.0)
    with pytest.raises(Interrupted):
        fit(
            config(method="ce", student=str(caffe_net), name="x"),
            splits,
            on_event=StopAfter(1, signal.SIGINT),
        )
    other = models.load(caffe_net)
    other.provenance["remark"] = "another file"
    other.save(caffe_net)
    run = RunDir.existing(Path("runs/x"))
    with pytest.raises(KdError, match="the student of runs/x changed"):
        fit(run.read_config(), splits, resume=run)


def test_a_student_file_that_does_not_fit_is_refused(
    workplace: Path, caffe_net: Path, splits: Splits
) -> None:
    with pytest.raises(KdError, match=r"student caffe-net\.pt has 3 classes, the data has 4"):
        fit(config(method="ce", student=str(caffe_net)), make_splits(size=(12, 12, 3), classes=4))
    with pytest.raises(KdError, match="takes 12×12×3 images, the data has 8×8×1"):
        fit(config(method="ce", student=str(caffe_net)), make_splits())
    with pytest.raises(KdError, match=r"(?i)no such file"):
        fit(config(method="ce", student="nothing.pt"), splits)
    with pytest.raises(UsageError, match=r"unknown network: net\.onnx") as caught:
        fit(config(method="ce", student="net.onnx"), splits)
    assert "a checkpoint (.pt)" in str(caught.value.hint)
    assert not Path("runs").exists()


def test_a_student_file_on_the_command_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Images are made to fit; options that the file decides are said to do nothing."""
    run = command_line(monkeypatch, train, test)
    common = ("--data", "digits", "--epochs", "1", "--method", "ce", "--precision", "32", "--threads", "1")
    with pytest.raises(UsageError, match=r"no such student: nothing\.pt"):
        run("train", *common, "--student", "nothing.pt")
    assert (
        run("train", *common, "--student", "convnet-tiny", "--image-size", "12", "--name", "a").exit_code == 0
    )
    shutil.copy("runs/a/student.pt", "my: net.pt")
    done = run("train", *common, "--student", "my: net.pt", "--preprocess", "none", "--dropout", "0.1")
    assert done.exit_code == 0
    assert "--preprocess has no effect with --student my: net.pt, which defines it" in done.stderr
    assert "--dropout has no effect" in done.stderr
    made = models.load(Path("runs/ce-my_ net-1/student.pt"))
    assert made.input_size == (12, 12, 1)
    run_dir = RunDir.existing(Path("runs/a"))
    assert run_dir.read_config().student == "convnet-tiny"


def test_a_network_is_fitted_on_images_of_the_whole_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten of thirty images, every third: data sets may be sorted by class."""
    monkeypatch.setattr(student, "_FITTED_PIXELS", 10 * 18 * 18)
    splits = make_splits(train=30, size=(18, 18, 3))
    settings = config(student="cifarnet", width=0.125)
    found = student.make_student(
        settings, splits.train, np.arange(30, dtype=np.int64), torch.device("cpu"), ignore
    )
    expected = models.build("cifarnet", classes=3, input_size=(18, 18, 3), width=0.125)
    expected.fit_to_images(found.prepare(torch.from_numpy(splits.train.images[::3].copy())))  # type: ignore[operator]
    assert torch.equal(found.network.whiten.weight, expected.whiten.weight)  # type: ignore[union-attr]
