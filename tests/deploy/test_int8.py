"""`--int8-recipe auto`, recipes, and what a file may lose: how one is taken, and that nothing else is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from kdcli import models
from kdcli.base.config import ExportConfig, make
from kdcli.base.config.commands import INT8_DEFAULT, INT8_RECIPE
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Event
from kdcli.cli import bench
from kdcli.cli import export as export_command
from kdcli.data import Splits
from kdcli.data.split import split_validation
from kdcli.deploy import int8
from kdcli.deploy.export import ExportResult, export, job
from kdcli.deploy.export.job import choose_samples, disjoint_indices
from kdcli.deploy.int8 import Recipe, RecipeTrial
from kdcli.deploy.onnx_model import OnnxRunner
from kdcli.deploy.onnx_model.translate import to_onnx
from kdcli.models import Classifier
from tests.deploy.helpers import SPLITS, classifier, exported, random_splits
from tests.helpers import command_line, digits_student

NAMES = [
    "-".join([types, scope, ranges, *kept])
    for types, scope, ranges, kept in itertools.product(
        ("u8s8", "s8s8"),
        ("channel", "tensor"),
        ("minmax", "entropy", "percentile"),
        ((), ("first",), ("last",), ("first", "last")),
    )
]


def test_recipe_names_are_unique() -> None:
    recipes = [Recipe.parse(name) for name in NAMES]
    assert [str(recipe) for recipe in recipes] == NAMES
    assert len(set(recipes)) == len(NAMES) == 48
    assert all(INT8_RECIPE.fullmatch(name) for name in NAMES)
    assert str(Recipe()) == INT8_DEFAULT


@pytest.mark.parametrize(
    "name", ["", "u8u8-channel-minmax", "u8s8-channel-minmax-last-first", "int8", "static"]
)
def test_invalid_recipe_names(name: str) -> None:
    with pytest.raises(UsageError, match="--int8"):
        make(ExportConfig, {"int8_recipe": name})


def test_recipe_implies_int8() -> None:
    assert ExportConfig().recipe is None
    assert ExportConfig(int8=True).recipe == INT8_DEFAULT
    assert ExportConfig(int8_recipe="auto").recipe == "auto"
    recipe = "s8s8-tensor-entropy-last"
    assert ExportConfig(int8=True, int8_recipe=recipe).recipe == recipe


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: list[np.ndarray]) -> None:
        self.left = [{"input": batch} for batch in batches]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop(0) if self.left else None


@pytest.mark.parametrize(
    "name",
    [
        "u8s8-channel-minmax",
        "u8s8-channel-entropy",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("u8s8-tensor-minmax", "s8s8-channel-minmax", "u8s8-channel-percentile")
        ),
    ],
)
def test_quantiser_equals_quantize_static(name: str, tmp_path: Path) -> None:
    """All images at once there, batch by batch here: ranges are the same (of histograms, to a bin)."""
    model = to_onnx(classifier("lenet-caffe"), opset=18, with_preprocessing=False)
    random = np.random.default_rng(0)
    batches = [random.normal(size=(8, 3, 16, 16)).astype(np.float32) for _ in range(4)]
    mine = int8.Quantiser(model, lambda: iter(batches)).quantise(Recipe.parse(name))
    onnx.save_model(model, tmp_path / "a.onnx")
    quant_pre_process(str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx"), skip_symbolic_shape=True)
    quantize_static(
        str(tmp_path / "b.onnx"),
        str(tmp_path / "c.onnx"),
        Reader(batches),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(int8.OPERATORS),
        per_channel="channel" in name,
        reduce_range=int8.needs_reduced_range(),
        activation_type=QuantType.QInt8 if name.startswith("s8") else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(
            CalibrationMethod,
            {"minmax": "MinMax", "entropy": "Entropy"}.get(name.split("-")[2], "Percentile"),
        ),
        extra_options={
            "OpTypesToExcludeOutputQuantization": list(int8.FLOAT_OUTPUT),
            "CalibTensorRangeSymmetric": False,
        },
    )
    theirs = onnx.load_model(tmp_path / "c.onnx")
    assert [node.op_type for node in mine.graph.node] == [node.op_type for node in theirs.graph.node]
    tensors = {one.name: onnx.numpy_helper.to_array(one) for one in theirs.graph.initializer}
    assert {one.name for one in mine.graph.initializer} == set(tensors)
    for one in mine.graph.initializer:
        exact = "minmax" in name or not one.name.endswith(("_scale", "_zero_point", "_quantized"))
        tolerance = {} if exact else {"rtol": 0.1, "atol": 8}
        np.testing.assert_allclose(
            onnx.numpy_helper.to_array(one).astype(float), tensors[one.name].astype(float), **tolerance
        )


def test_recipe_keeps_first_and_last_layer_float() -> None:
    model = to_onnx(classifier("lenet-caffe"), opset=18, with_preprocessing=False)
    batch = np.random.default_rng(0).normal(size=(8, 3, 16, 16)).astype(np.float32)
    made_by = int8.Quantiser(model, lambda: iter([batch]))

    def floats(name: str) -> set[str]:
        made = made_by.quantise(Recipe.parse(name))
        return {
            one.name
            for one in made.graph.initializer
            if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) > 1
        }

    assert floats("u8s8-channel-minmax") == set()
    assert {name.split(".")[-2] for name in floats("u8s8-channel-minmax-first")} == {"conv1"}
    assert {name.split(".")[-2] for name in floats("u8s8-channel-minmax-last")} == {"ip2"}
    assert {name.split(".")[-2] for name in floats("u8s8-channel-minmax-first-last")} == {"conv1", "ip2"}


def trial(agreement: float | None, speedup: float, low: float) -> RecipeTrial:
    return RecipeTrial("r", agreement, speedup, (low, speedup + 1))


def test_choose_by_agreement_and_speed() -> None:
    """With 400 images at 98 % one standard error is 0.7 points."""
    assert int8.choose([trial(98, 2.0, 1.9), trial(97.5, 2.5, 2.4)], 400) == 1  # as good, faster
    assert int8.choose([trial(98, 2.0, 1.9), trial(97.2, 2.5, 2.4)], 400) == 0  # worse
    assert int8.choose([trial(98, 2.0, 1.9), trial(98, 2.05, 2.0)], 400) == 0  # as fast: the earlier
    assert int8.choose([trial(99, 1.1, 0.9), trial(80, 1.5, 1.2)], 400) == 1  # the first may be no faster
    assert int8.choose([trial(99, 1.1, 0.9), trial(99, 0.4, 0.3)], 400) is None
    assert int8.choose([RecipeTrial("r", problem="failed"), trial(100, 2, 1.5)], 400) == 1
    assert int8.choose([], 400) is None


def test_measure_seconds_shape(plain: tuple[Classifier, ExportResult]) -> None:
    model = plain[1].path.read_bytes()
    done: list[Event] = []
    seconds = int8.measure_seconds([model, model], np.zeros((1, 3, 16, 16), np.float32), done.append)
    assert seconds.shape == (len(done), 2)
    assert (seconds > 0).all()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    classifier("convnet-tiny").save(tmp_path / "model.pt")
    return tmp_path / "model.pt"


def run(checkpoint: Path, splits: Splits = SPLITS, **settings: Any) -> Any:
    given = {
        "output": checkpoint.with_name("out.onnx"),
        "parity_images": 20,
        "calibration_images": 20,
        **settings,
    }
    return export(models.load(checkpoint), ExportConfig.model_validate(given), splits)


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_auto_keeps_float32_where_int8_is_not_faster(
    factor: float, batch: int | None, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`factor`: how many times as fast int8 seems."""

    def measure_seconds(models: list[bytes], inputs: np.ndarray, on_event: Any) -> np.ndarray:
        for model in models:
            OnnxRunner(model).call(inputs)  # each of them runs
        return np.tile([1.0] + [1 / factor] * (len(models) - 1), (41, 1))

    monkeypatch.setattr(int8, "measure_seconds", measure_seconds)
    plain = run(checkpoint, batch=batch).path.read_bytes()
    result = run(checkpoint, int8_recipe="auto", batch=batch)
    assert len(result.trials) == 7
    assert len({one.recipe for one in result.trials}) == 7
    assert {one.speedup for one in result.trials} == {factor}
    if factor < 1:
        assert result.quantisation is None
        assert result.path.read_bytes() == plain
        assert not any(one.chosen for one in result.trials)
        monkeypatch.setattr(int8, "search", lambda *given: ((), None))
        named = export(models.load(checkpoint), ExportConfig(int8_recipe="auto", parity_images=20), SPLITS)
        assert named.path == Path("exports/model.onnx")  # no int8 in its name
    else:
        [taken] = [one for one in result.trials if one.chosen]
        assert result.quantisation.recipe == taken.recipe
        again = run(checkpoint, int8_recipe=taken.recipe, batch=batch)
        assert [t.raw_data for t in onnx.load(again.path).graph.initializer] == [
            t.raw_data for t in onnx.load(result.path).graph.initializer
        ]


@pytest.fixture(autouse=True)
def own_folder(workplace: Path) -> None:
    """`exports/` is made where one stands."""


def test_calibrator_gets_train_images_that_parity_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[np.ndarray] = []
    calibrated: list[np.ndarray] = []
    real = job.check_parity

    def check_parity(*arguments: Any) -> Any:
        compared.extend(arguments[3])
        return real(*arguments)

    class Stop(Exception):
        pass

    def quantiser(model: onnx.ModelProto, batches: int8.Batches) -> None:
        for batch in batches():
            calibrated.extend(batch)
        raise Stop

    monkeypatch.setattr(job, "check_parity", check_parity)
    monkeypatch.setattr(job, "Quantiser", quantiser)
    with pytest.raises(Stop):
        exported(
            tmp_path, classifier("convnet-tiny"), int8=True, with_preprocessing=True, calibration_images=20
        )
    train = {image.tobytes() for image in SPLITS.train.images}
    parity, calibration = ({image.tobytes() for image in images} for images in (compared, calibrated))
    assert (len(train), len(parity), len(calibration)) == (60, 30, 20)
    assert calibration <= train - parity


def test_samples_are_disjoint() -> None:
    splits = random_splits(count=900)
    parts = disjoint_indices(900, 100, 300, 400)
    assert [len(part) for part in parts] == [100, 300, 400]
    assert len(np.unique(np.concatenate(parts))) == 800
    parts = disjoint_indices(90, 100, 300, 400)
    assert sum(map(len, parts)) == 90
    assert min(map(len, parts)) >= 7
    recorded = {"data": {"val_fraction": 0.2, "fingerprint_train": splits.train.fingerprint}}
    validation = set(split_validation(splits.train.labels, 0.2)[1].tolist())
    for provenance, held_out in ((recorded, validation), ({}, None), ({"data": {"val_fraction": 0.2}}, None)):
        config = ExportConfig(int8_recipe="auto", max_drop=1)
        chosen = choose_samples(provenance, splits.train, config)
        used = np.concatenate([chosen.parity, chosen.calibration, chosen.selection])
        assert not set(used.tolist()) & set(chosen.held_out.tolist())
        assert len(np.unique(used)) == len(used)
        if held_out is not None:
            assert set(chosen.held_out.tolist()) == held_out
            assert chosen.held_out_name == "validation split"
        else:
            assert len(chosen.held_out) == 225


def test_max_drop_prevents_writing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier("convnet-tiny")
    with torch.inference_mode():
        seen = model(torch.from_numpy(SPLITS.train.images)).argmax(1).numpy()
    labels = np.where(np.arange(len(seen)) % 4 == 0, SPLITS.train.labels, seen)  # right of most
    train = replace(SPLITS.train, labels=labels)
    splits = replace(SPLITS, train=train)
    recorded = {"val_fraction": 0.5, "fingerprint_train": train.fingerprint}
    model.provenance = {**model.provenance, "data": recorded}
    model.save(checkpoint)
    held_out = split_validation(labels, 0.5)[1]
    right = seen[held_out] == labels[held_out]
    result = run(checkpoint, splits, max_drop=0)
    assert result.drop.images == len(held_out)
    assert result.drop.float_accuracy == pytest.approx(100 * right.mean())
    assert result.drop.points == 0
    result.path.unlink()
    wrong = int(np.bincount(train.labels[held_out], minlength=5).argmin())
    real = int8.Quantiser.quantise

    def worse(self: Any, recipe: Recipe) -> onnx.ModelProto:
        """The last bias says the same wrong class of everything."""
        made = real(self, recipe)
        bias = next(one for one in made.graph.initializer if one.name.endswith("fc.bias_quantized"))
        values = onnx.numpy_helper.to_array(bias).copy()
        values[wrong] = 2**30
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        return made

    monkeypatch.setattr(int8.Quantiser, "quantise", worse)
    lost = 100 * (right.mean() - np.mean(train.labels[held_out] == wrong))
    assert lost > 1
    with pytest.raises(KdError, match=f"loses {lost:.2f} points .* n = {len(held_out)}") as caught:
        run(checkpoint, splits, int8=True, max_drop=1)
    assert caught.value.exit_code == 1
    assert not checkpoint.with_name("out.onnx").exists()
    kept = run(checkpoint, splits, int8=True, max_drop=100)
    assert kept.drop.points == pytest.approx(lost)


def test_auto_prints_the_table_of_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    digits_student(Path("student.pt"))
    kd = command_line(monkeypatch, export_command, bench)
    lines = kd("export", "student.pt", "--int8-recipe", "auto", "--max-drop", "100").stdout.splitlines()
    recipes = [line.split()[0] for line in lines if line.startswith(("u8s8", "s8s8"))]
    assert recipes[:3] == [f"u8s8-channel-{ranges}" for ranges in ("minmax", "entropy", "percentile")]
    assert len(recipes) == 7
    assert max(map(len, lines)) <= 80
    assert any("100 allowed" in line for line in lines)
    assert any("int8 is not faster" in line or "without trials" in line for line in lines)


def test_batch_is_fixed_in_the_file(checkpoint: Path) -> None:
    result = run(checkpoint, batch=3)
    model = onnx.load(result.path)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_value == 3
    assert result.parity.batches == (3,)
    assert result.parity.images == 20
    named = export(models.load(checkpoint), ExportConfig(batch=3, parity_images=20), SPLITS)
    assert named.path == Path("exports/model-batch3.onnx")
    assert replace(result, path=named.path).batch == 3
