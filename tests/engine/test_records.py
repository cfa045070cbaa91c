"""Figures of a run: written, read again, and refused where they cannot be a run's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.base.errors import KdError
from kdcli.base.files import write_json
from kdcli.engine import identity, measure
from kdcli.engine.records import (
    Metrics,
    RunResult,
    append_metrics,
    cut_metrics,
    epoch_lines,
    read_metrics,
    read_result,
)
from kdcli.engine.run_dir import RunDir


@pytest.fixture
def result(tmp_path: Path) -> RunResult:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0], [1.0, 5.0, 0.0], [0.0, 0.0, 1.0]])
    (tmp_path / "run").mkdir()
    return RunResult(
        run=RunDir(tmp_path / "run"),
        method="kd",
        student="lenet",
        seed=3,
        epochs=2,
        parameters=100,
        val_accuracy=None,
        test=measure(logits, torch.tensor([0, 2, 1, 2]), logits.flip(0)),
        teacher_passes=1,
        seconds=2.5,
        images_per_s=40.0,
        resumed_with_differences=("torch was 2.0, is 2.1",),
    )


def line(kind: str, epoch: int, step: int, **changes: Any) -> Metrics:
    values: dict[str, Any] = {
        "loss": 0.5,
        "terms": {"ce": 0.5},
        "val_accuracy": None,
        "lr": 0.1,
        "images_per_s": 10.0,
        "seconds": 1.0,
    }
    return Metrics.model_validate({"kind": kind, "epoch": epoch, "step": step, **values, **changes})


def test_a_result_is_read_as_it_was_written(result: RunResult, tmp_path: Path) -> None:
    write_json(result.run.result_file, result.to_dict())
    assert read_result(result.run.result_file) == result
    result.run.path.rename(tmp_path / "moved")
    assert read_result(tmp_path / "moved/result.json").run == RunDir(tmp_path / "moved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: "\x00\xff", "Invalid JSON"),
        (lambda text: "[1]", "valid dictionary|Input should be an object"),
        (lambda text: "[" * 100_000, "recursion limit"),
        (lambda text: text.replace('"seconds": 2.5', '"seconds": NaN'), "seconds: Input should be"),
        (
            lambda text: text.replace('"seconds": 2.5', '"seconds": "2.5"'),
            "seconds: Input should be a valid number",
        ),
        (lambda text: text.replace('"accuracy": 75.0', '"accuracy": 1e999'), "test.accuracy: "),
        (lambda text: text.replace('"accuracy": 75.0', '"accuracy": 101'), "test.accuracy: "),
        (lambda text: text.replace('"count": 4', '"count": ' + "9" * 5000), "Invalid JSON"),
        (lambda text: text.replace('"test"', '"tset"'), "test: Field required"),
        (lambda text: text.replace('"schema_version": 2', '"schema_version": 1'), "schema_version: "),
        (lambda text: text.replace("[0, 0, 1]", "[0, 3, 1]"), "test: confusion must be of these classes"),
        (lambda text: text.replace("[0, 0, 1]", "[0, 0, 0]"), "test.confusion.0.2: "),
        (lambda text: text.replace("[0, 0, 1]", "[0, 1]"), "test.confusion.0.2: Field required"),
    ],
)
def test_a_wrong_result_is_one_line(result: RunResult, change: Callable[[str], str], message: str) -> None:
    result = result.model_copy(update={"test": result.evaluation.model_copy(update={"accuracy": 75.0})})
    write_json(result.run.result_file, result.to_dict())
    path = result.run.result_file
    path.write_text(change(path.read_text()), encoding="utf-8")
    with pytest.raises(KdError, match=message) as caught:
        read_result(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_figures_of_many_classes_are_small(result: RunResult) -> None:
    labels = torch.arange(600)
    logits = torch.eye(600, 6_000)
    logits[7, 5_999] = 2
    test = measure(logits, labels)
    assert test.per_class[6:9] == (100, 0, 100)
    assert test.per_class[599:601] == (100, None)
    cells = {(true, predicted): count for true, predicted, count in test.confusion}
    assert cells == {(label, label): 1 for label in range(600) if label != 7} | {(7, 5_999): 1}
    written = result.model_copy(update={"test": test})
    write_json(result.run.result_file, written.to_dict())
    assert result.run.result_file.stat().st_size < 300_000
    assert read_result(result.run.result_file) == written


def test_the_matrix_has_true_rows_and_predicted_columns(result: RunResult) -> None:
    # true 0, 2, 1, 2; predicted 0, 2, 1, 2
    assert result.evaluation.matrix().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 2]]
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    assert measure(logits, torch.tensor([2, 2])).matrix().tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 1]]


def test_a_missing_or_huge_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KdError, match=r"cannot read .*result\.json: No such file"):
        read_result(tmp_path / "result.json")
    monkeypatch.setattr("kdcli.engine.records.MOST_BYTES", 10)
    (tmp_path / "metrics.jsonl").write_text("x" * 11)
    with pytest.raises(KdError, match=r"metrics\.jsonl: it has 11 bytes, more than the 10"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_only_a_last_half_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [line("step", 1, 1), line("epoch", 1, 2, val_accuracy=50.0), line("epoch", 1, 2, loss=0.25)]
    for each in lines:
        append_metrics(path, each)
    with path.open("a") as handle:
        handle.write('{"kind": "epo')
    assert read_metrics(path) == lines
    assert epoch_lines(path) == lines[2:]
    with path.open("a") as handle:
        handle.write("\n" + json.dumps(lines[0].to_dict()) + "\n")
    with pytest.raises(KdError, match=r"metrics\.jsonl: line 4: Invalid JSON"):
        read_metrics(path)


def test_cut_metrics_drops_the_lines_after_the_saved_state(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 0, 0)
    assert read_metrics(path) == []
    lines = [line("step", 1, 1), line("epoch", 1, 2), line("step", 2, 3), line("epoch", 2, 4)]
    for each in lines:
        append_metrics(path, each)
    cut_metrics(path, 3, 1)
    assert read_metrics(path) == lines[:3]


def test_circumstances_are_read_from_any_document(tmp_path: Path) -> None:
    document = {
        "kd_version": "1",
        "threads": 2,
        "accelerator": "cpu",
        "accelerator_name": None,
        "packages": {"torch": "2.8", "onnx": "1", "timm": "1.0"},
        "cpu": {"model": "A"},
        "load_average_1min": 3.0,
    }
    expected = {
        "kd_version": "1",
        "threads": "2",
        "accelerator": "cpu",
        "torch": "2.8",
        "timm": "1.0",
        "cpu": "A",
    }
    assert identity.circumstances(document) == expected
    for wrong in (None, [], {"packages": 3, "cpu": []}):
        assert identity.circumstances(wrong) == {}
    assert identity.recorded_circumstances(tmp_path / "environment.json") == {}
    (tmp_path / "environment.json").write_text("[" * 100_000)
    assert identity.recorded_circumstances(tmp_path / "environment.json") == {}
    assert identity.differences({"a": 1, "b": 2}, {"b": 3}) == ["a was 1, is None", "b was 2, is 3"]
    assert identity.differences({"--no-longer-compared": 1}, {}) == []


def test_recorded_inputs_are_read_from_any_provenance() -> None:
    assert identity.recorded_inputs({"inputs": {"teacher": "1", "code of my:loss": 6}}) == {
        "teacher": "1",
        "code of my:loss": "6",
    }
    assert identity.recorded_inputs({"inputs": "x"}) == identity.recorded_inputs({}) == {}


def test_code_that_was_not_allowed_has_not_changed() -> None:
    with pytest.raises(KdError, match="needs my:make, which is code") as caught:
        identity.check_unchanged({"code of my:make": "1"}, {}, "runs/a")
    assert caught.value.hint.endswith("export KD_NETWORKS=my:make")
    with pytest.raises(KdError, match="the code of my:make of runs/a changed"):
        identity.check_unchanged({"code of my:make": "1"}, {"code of my:make": "2"}, "runs/a")
