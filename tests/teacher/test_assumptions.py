"""Assumptions about files that kd did not make, measured on labelled images."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

from kdcli import models
from kdcli.base.config import InputSettings, TeacherInputs, ValidateConfig, make
from kdcli.base.errors import KdError
from kdcli.base.events import Event, Note
from kdcli.cli import test as test_command
from kdcli.cli import validate
from kdcli.cli.defaults import with_defaults
from kdcli.data import ImageSet, Splits
from kdcli.data.images import NO_LABEL, fingerprint_of
from kdcli.data.preprocess import Preprocess
from kdcli.deploy.load import load_model, with_classes
from kdcli.engine import fit
from kdcli.engine.identity import input_hashes, recorded_inputs
from kdcli.models import Classifier
from kdcli.teacher import Teacher, assumptions
from tests.helpers import command_line, config, image_set, slow

TWELVE = tuple(str(number) for number in range(1, 13))  # sorted as texts: 1, 10, 11, 12, 2, …


def colours(names: Sequence[str], count: int = 120, seed: int = 0) -> ImageSet:
    """Images of one colour and a little noise, a colour for each class."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % len(names)
    images = np.array([centre(int(label)) for label in labels])[:, None, None, :] + random.normal(
        0, 6, (count, 8, 8, 3)
    )
    pixels = images.clip(0, 255).astype(np.uint8)
    return ImageSet(pixels, labels, tuple(names), fingerprint_of(pixels, labels, tuple(names)))


def centre(label: int) -> tuple[int, int, int]:
    return 40 + 85 * (label % 3), 30 + 60 * (label // 3), 128


def write_teacher(
    path: Path, order: Sequence[int], *, channels: Sequence[int] = (0, 1, 2), scale: float | None = None
) -> None:
    """An ONNX file that takes the class with the nearest colour; its outputs are the classes in `order`.

    Args:
        channels: order in which it takes red, green and blue.
        scale: of the pixels that it takes, as float32 NCHW; by default uint8 NHWC.
    """
    weights = np.array([centre(label) for label in order], np.float32)[:, channels].T * (scale or 1)  # (3, K)
    spread = 50 * (scale or 1) ** 2
    raw = scale is None
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["colour"], keepdims=0),
        helper.make_node("MatMul", ["colour", "weights"], ["products"]),
        helper.make_node("Add", ["products", "bias"], ["logits"]),
    ]
    values = [
        numpy_helper.from_array(np.array([1, 2] if raw else [2, 3], np.int64), "axes"),
        numpy_helper.from_array(weights / spread, "weights"),
        numpy_helper.from_array((-(weights**2).sum(0) / 2 / spread).astype(np.float32), "bias"),
    ]
    kind, sides = (TensorProto.UINT8, ["N", 8, 8, 3]) if raw else (TensorProto.FLOAT, ["N", 3, 8, 8])
    graph = helper.make_graph(
        nodes,
        "nearest colour",
        [helper.make_tensor_value_info("images", kind, sides)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(order)])],
        values,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)


def notes_of(model: Any, data: ImageSet, **settings: Any) -> list[str]:
    found: list[Event] = []
    assumptions.check("m.onnx", model, data, found.append, task="sample", **settings)
    return [event.text for event in found if isinstance(event, Note)]


def test_a_teacher_with_classes_in_text_order_is_refused_with_the_order(workplace: Path) -> None:
    train, test = colours(TWELVE), colours(TWELVE, 36, seed=1)
    by_text = [TWELVE.index(name) for name in sorted(TWELVE)]
    write_teacher(Path("t.onnx"), by_text)
    settings = config(method="kd", teacher=Path("t.onnx"), epochs=1)
    told: list[Event] = []
    with pytest.raises(KdError, match=r"accuracy 8\.3 % on 120 labelled images") as caught:
        fit(settings, Splits("toy", "toy", train, test), on_event=told.append)
    assert "sorted as texts (1, 10, 11, 12, 2, 3, …) its accuracy is 100.0 %" in caught.value.hint
    assert "--teacher-class-names classes.txt" in caught.value.hint
    assert any("names no classes" in event.text for event in told if isinstance(event, Note))
    assert not list(Path().rglob("view-*.npy"))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("channels", "most"),
    [((0, 1, 2), 128 + 11 * 16), ((2, 1, 0), 128 * 12)],
    ids=["right", "of other channels"],
)
def test_alternatives_end_as_soon_as_they_are_worse(
    channels: Sequence[int], most: int, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same alternatives as if 128 images were always looked at."""
    write_teacher(Path("t.onnx"), range(12), channels=channels, scale=1 / 255)
    model = load_model(Path("t.onnx"), assumed=make(TeacherInputs, {"scale": "1/255"}))
    data, runs = colours(TWELVE, 128), list[int]()
    predict = models.predict_logits

    def counted(forward: Any, images: Any, part: Any, **settings: Any) -> torch.Tensor:
        runs.append(len(part))
        return predict(forward, images, part, **settings)

    monkeypatch.setattr(models, "predict_logits", counted)
    found = assumptions.measure(model, data, "sample", lambda event: None)
    assert sum(runs) <= most
    monkeypatch.setattr(assumptions, "_STEP", 128)
    runs.clear()
    assert found == assumptions.measure(model, data, "sample", lambda event: None)
    assert sum(runs) == 128 * 12


@pytest.mark.parametrize("mode", ["views", slow("off")])
def test_a_right_teacher_without_names_is_used_and_its_order_noted(workplace: Path, mode: str) -> None:
    write_teacher(Path("t.onnx"), range(12))
    told: list[Event] = []
    settings = config(method="kd", teacher=Path("t.onnx"), epochs=1, teacher_cache=mode)
    result = fit(
        settings, Splits("toy", "toy", colours(TWELVE), colours(TWELVE, 36, seed=1)), on_event=told.append
    )
    assert result.evaluation.teacher_accuracy == 100
    notes = [event.text for event in told if isinstance(event, Note)]
    assert sum("names no classes" in text for text in notes) == 1
    assert not any("right on" in text for text in notes)


def test_another_order_of_channels_is_found(workplace: Path) -> None:
    """In the file of a uint8 input; the green channel is the same in both, so that some classes are right."""
    write_teacher(Path("t.onnx"), range(12), channels=(2, 1, 0))
    data = colours([f"{number:02d}" for number in range(12)])
    [note] = notes_of(load_model(Path("t.onnx")), data)
    assert "With channels bgr its accuracy is 100.0 %" in note
    assert note.endswith("add --channel-order bgr")


def test_another_scale_of_pixels_is_found(workplace: Path) -> None:
    write_teacher(Path("t.onnx"), range(12), scale=1 / 255)
    data = colours([f"{number:02d}" for number in range(12)])
    model = load_model(Path("t.onnx"), assumed=InputSettings(scale="1"))
    [note] = notes_of(model, data)
    assert "With pixels 0–1 its accuracy is 100.0 %" in note
    assert note.endswith("add --scale 1/255")
    assert notes_of(load_model(Path("t.onnx"), assumed=InputSettings(scale="1/255")), data) == []


class NearestColour(nn.Module):
    """Logits of the nearest colour for images (B, 3, H, W) in the order blue, green, red."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        colours = torch.tensor([centre(label)[::-1] for label in range(12)], dtype=torch.float32)
        return -((images.mean(dim=(2, 3))[:, None] - colours) ** 2).sum(dim=2)


@pytest.mark.parametrize(
    ("order", "kind", "told"), [("rgb", "caffe", 1), ("bgr", "caffe", 0), ("rgb", "", 0)]
)
def test_alternatives_of_a_converted_caffe_network(order: str, kind: str, told: int) -> None:
    """A note names what to convert it with; a network that kd trained needs none."""
    model = Classifier(
        NearestColour(),
        Preprocess(order),
        arch="nin",
        arch_args={},
        classes=TWELVE,
        input_size=(8, 8, 3),
        provenance={"kind": kind, "weights_sha256": "0" * 64},
    ).eval()
    notes = notes_of(model, colours(TWELVE))
    assert len(notes) == told
    assert all("convert it again with --channel-order bgr" in note for note in notes)


def test_a_teacher_of_kd_near_chance_is_noted(workplace: Path) -> None:
    """No assumption is behind it, and a weak teacher may be wanted."""
    model = Classifier(
        models.build("convnet-tiny", classes=3, input_size=(8, 8, 1)),
        Preprocess(),
        arch="convnet-tiny",
        arch_args={},
        classes=("class 0", "class 1", "class 2"),
        input_size=(8, 8, 1),
        provenance={"data": {}},
    ).eval()
    with torch.no_grad():
        model.network.fc.weight.zero_()  # type: ignore[union-attr, operator]
    [note] = notes_of(model, image_set(512), strict=True)
    assert "near chance" in note


@pytest.mark.parametrize(
    ("right", "count", "classes", "near"),
    [
        (51, 512, 10, True),
        (90, 512, 10, True),  # 17.6 %: below three times chance
        (150, 512, 10, False),  # 29.3 %: its interval reaches above
        (256, 512, 2, True),
        (300, 512, 2, False),  # 58.6 %
        (0, 512, 2, True),  # the classes changed places
        (5, 10, 2, False),  # too few images to tell
        (1, 512, 1000, True),
        (10, 512, 1000, False),  # 2 %
        (5, 512, 100, True),
        (15, 512, 100, False),  # 2.9 %
        (10, 120, 12, True),
    ],
)
def test_near_chance(right: int, count: int, classes: int, near: bool) -> None:
    share, z = right / count, 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count**2)) ** 0.5
    assert assumptions.is_near_chance((100 * (middle - half), 100 * (middle + half)), classes) == near


def test_the_sample_is_spread_over_classes() -> None:
    labels = np.array([0] * 900 + [1] * 50 + [NO_LABEL] * 40 + [2] * 10)
    data = ImageSet(np.zeros((1000, 2, 2, 1), np.uint8), labels, ("a", "b", "c"), "f")
    sample = assumptions.sample_of(data, 90)
    assert len(set(sample.tolist())) == 90
    assert np.bincount(labels[sample]).tolist() == [40, 40, 10]
    assert np.bincount(labels[sample[:30]]).tolist() == [10, 10, 10]


def test_outputs_of_known_names_are_put_in_the_order_of_the_data(workplace: Path) -> None:
    by_text = [TWELVE.index(name) for name in sorted(TWELVE)]
    write_teacher(Path("t.onnx"), by_text)
    model = with_classes(load_model(Path("t.onnx")), TWELVE)
    assert model.classes == tuple(map(str, range(12)))  # names that are not known stay
    from dataclasses import replace

    named = with_classes(replace(load_model(Path("t.onnx")), classes=tuple(sorted(TWELVE))), TWELVE)
    data = colours(TWELVE)
    assert named.classes == TWELVE
    assert models.predict_logits(named, data.images).argmax(1).tolist() == data.labels.tolist()


def save_colours(names: Sequence[str], count: int = 24) -> None:
    for split, seed in (("train", 0), ("test", 1)):
        data = colours(names, count, seed)
        for number, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
            place = Path("data") / split / names[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(image)).save(place / f"{number}.png")


def test_kd_test_shows_the_names_of_the_data(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_colours(TWELVE)
    write_teacher(Path("t.onnx"), range(12))
    result = command_line(monkeypatch, test_command)("t.onnx", "--data", "data")
    rows = [line.split() for line in result.output.splitlines()]
    assert [row[0] for row in rows if len(row) == 2 and row[1] == "100.00"] == list(TWELVE)
    assert "t.onnx names no classes" in result.output


def test_likely_inputs_are_tried_by_probe(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_colours([f"{number:02d}" for number in range(12)], 60)
    call = command_line(monkeypatch, validate)
    write_teacher(Path("t.onnx"), range(12), channels=(2, 1, 0), scale=1 / 255)
    words = ("--teacher", "t.onnx", "--data", "data")
    with pytest.raises(KdError, match="no preprocessing recorded") as caught:
        call(*words)
    assert caught.value.hint.endswith("kd validate --teacher t.onnx --probe")
    printed = call(*words, "--probe").output
    inputs = {"channel_order": "bgr", "scale": "1/255"}
    recorded = with_defaults(config(teacher=Path("t.onnx"), data="data"), needs_teacher=True)
    assert recorded.teacher_inputs.given == inputs
    set_now = with_defaults(
        config(teacher=Path("t.onnx"), data="data", teacher_scale="1"), needs_teacher=True
    )
    assert set_now.teacher_inputs.given == {"scale": "1"}
    assert "add --channel-order bgr --scale 1/255" in printed
    assert "next: kd train --method kd --data data --teacher t.onnx" in printed
    assert "--teacher-channel-order bgr --teacher-scale 1/255" in printed
    first, *others = json.loads(call(*words, "--probe", "--json").output)["inputs"]
    assert (first["accuracy"], first["options"]) == (100, inputs)
    assert all(each["accuracy"] < 100 for each in others)
    Path("t.onnx").with_name("r.onnx").write_bytes(Path("t.onnx").read_bytes())
    Path("r.onnx.toml").mkdir()  # cannot be written
    unwritten = call("--teacher", "r.onnx", "--data", "data", "--probe").output
    assert "cannot write r.onnx.toml" in unwritten and "--teacher-channel-order bgr" in unwritten
    write_teacher(Path("t.onnx"), [0] * 12, scale=1 / 255)
    with pytest.raises(KdError, match=r"t\.onnx\.toml was recorded for another content"):
        with_defaults(config(teacher=Path("t.onnx"), data="data"), needs_teacher=True)
    with pytest.raises(KdError, match="is near chance with each likely input"):
        call(*words, "--probe")


def test_next_command_of_an_external_network_with_other_inputs_names_the_network() -> None:
    """Its checkpoint records the inputs that it was made with."""
    model: Any = SimpleNamespace(
        provenance={"kind": "pretrained", "name": "own:make:w.pth"},
        arch_args={"width": 2},
        input_size=(32, 32, 3),
    )
    settings = make(ValidateConfig, {"teacher": Path("weights/make-1.pt"), "data": "photos"})
    command = validate._training(settings, "kd", {"channel_order": "bgr"}, model)
    assert shlex.split(command) == shlex.split(
        "kd train --method kd --data photos --teacher own:make:w.pth --teacher-args width=2 "
        "--teacher-channel-order bgr"
    )
    assert "--teacher weights/make-1.pt" in validate._training(settings, "kd", {}, model)
    model.input_size = (32, 32, 1)  # kd train gives it the data's colours, unless these are made grey
    assert "--grey" in validate._training(settings, "kd", {}, model)


BY_TEXT = [TWELVE.index(name) for name in sorted(TWELVE)]
INPUTS = {"scale": "1/255", "class_names": "classes.txt"}


def test_inputs_of_a_teacher_belong_to_the_run(workplace: Path) -> None:
    """They are repeated by `--resume` and `kd reproduce`, and class names count by their content."""
    write_teacher(Path("t.onnx"), BY_TEXT, scale=1 / 255)
    Path("classes.txt").write_text("\n".join(sorted(TWELVE)), encoding="utf-8")
    splits = Splits("toy", "toy", colours(TWELVE), colours(TWELVE, 36, seed=1))
    settings = config(
        method="kd", teacher=Path("t.onnx"), epochs=1, **{f"teacher_{name}": INPUTS[name] for name in INPUTS}
    )
    result = fit(settings, splits)
    assert result.evaluation.teacher_accuracy == 100
    repeated = result.run.read_config()
    assert repeated.teacher_inputs.given == INPUTS
    recorded = recorded_inputs(models.load(result.run.student).provenance)
    assert recorded == input_hashes(repeated, splits)
    Path("classes.txt").write_text("\n".join(TWELVE), encoding="utf-8")
    assert recorded["class names"] != input_hashes(repeated, splits)["class names"]


def test_inputs_of_a_teacher_belong_to_its_cached_logits(workplace: Path) -> None:
    write_teacher(Path("t.onnx"), BY_TEXT, scale=1 / 255)
    names, data = Path("classes.txt"), colours(TWELVE, 24)
    names.write_text("\n".join(sorted(TWELVE)), encoding="utf-8")

    def logits(computed: int, **inputs: str) -> Any:
        teacher = Teacher.open(Path("t.onnx"), Path("cache"), assumed=make(TeacherInputs, inputs))
        [found] = teacher.logits(data)
        assert teacher.views_computed == computed
        return np.asarray(found.logits())

    before = logits(1, **INPUTS)
    assert (before.argmax(1) == data.labels).all()
    logits(0, **INPUTS)
    for change in (
        {"scale": "1/127.5"},
        {"mean": "0.1"},
        {"std": "2"},
        {"channel_order": "bgr"},
        {"layout": "nchw"},
    ):
        logits(1, **(INPUTS | change))
    names.write_text("\n".join(TWELVE), encoding="utf-8")
    assert (logits(1, **INPUTS) == before[:, BY_TEXT]).all()
    assert (logits(1, scale="1/255") == before[:, BY_TEXT]).all()
    Path("labels.txt").write_text("\n".join(sorted(TWELVE)), encoding="utf-8")
    assert (logits(0, scale="1/255") == before).all()  # names of the same content
