"""Counts are checked by hand; times only for being there and being compared as said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from kdcli import bench as benching
from kdcli.bench import BenchResult, bench, default_models
from kdcli.bench import contenders as measuring
from kdcli.bench.rows import in_words
from kdcli.config import BenchConfig
from kdcli.errors import KdError
from kdcli.models import build
from kdcli.models.layers import count_macs
from tests.test_export import SPLITS, classifier, exported, one_thread  # noqa: F401


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    folder = tmp_path_factory.mktemp("bench")
    teacher, student = folder / "teacher.pt", folder / "runs" / "tiny" / "student.pt"
    classifier("convnet-tiny", "gcn-zca").save(teacher)
    classifier("lenet-caffe").save(student)  # bigger than its "teacher"
    exported(student.parent, classifier("convnet-tiny"), output=folder / "tiny.onnx")
    exported(student.parent, classifier("convnet-tiny"), output=folder / "raw.onnx", with_preprocessing=True)
    stranger = onnx.load(folder / "tiny.onnx")
    del stranger.metadata_props[:]
    onnx.save(stranger, folder / "stranger.onnx")
    paths = [teacher, student, *(folder / f"{name}.onnx" for name in ("tiny", "raw", "stranger"))]
    return bench(paths, BenchConfig(rounds=3, batch=4, threads=1), SPLITS)


def test_a_row_for_each_model_and_engine(result: BenchResult) -> None:
    assert [(row.name, row.engine) for row in result.rows] == [
        ("teacher", "torch"),
        ("teacher", "onnxruntime"),
        ("tiny", "torch"),
        ("tiny", "onnxruntime"),
        ("tiny.onnx", "onnxruntime"),
        ("raw.onnx", "onnxruntime"),
        ("stranger.onnx", "onnxruntime"),
    ]
    assert result.threads == 1
    for row in result.rows:
        assert 0 < row.latency_ms <= row.latency_p90_ms <= row.latency_p95_ms
        assert row.latency_n == 15
        assert row.images_per_s > 0
        assert row.speedup is not None
    assert [row.speedup for row in result.rows if row.is_teacher] == [1.0, 1.0]


def test_size_is_the_networks_and_preprocessing_stands_beside(result: BenchResult) -> None:
    teacher, student = result.rows[0], result.rows[2]
    # convnet 4, 8: conv, 4 vectors and a counter (8 bytes) of each batch norm, linear
    assert teacher.network_bytes == 4 * (4 * 27 + 4 * 4 + 8 * 36 + 4 * 8 + 8 * 5 + 5) + 16
    assert teacher.preprocessing_bytes == 4 * (768 + 768 * 768)
    assert teacher.file_bytes > teacher.preprocessing_bytes
    assert teacher.parameters == 4 * 27 + 8 + 8 * 36 + 16 + 45
    assert student.parameters == 20 * 75 + 20 + 50 * 500 + 50 + 500 * 50 + 500 + 5 * 500 + 5
    assert student.worse
    assert "bigger" in student.verdict
    assert student.size_ratio == teacher.network_bytes / student.network_bytes


def test_macs_by_hand(result: BenchResult) -> None:
    tiny = 16 * 16 * 4 * 27 + 8 * 8 * 8 * 36 + 8 * 5
    lenet = 12 * 12 * 20 * 75 + 2 * 2 * 50 * 500 + 50 * 4 // 4 * 500 + 500 * 5
    macs = {row.name: row.macs for row in result.rows}
    assert macs == {
        "teacher": tiny,
        "tiny": lenet,
        "tiny.onnx": tiny,
        "raw.onnx": tiny,
        "stranger.onnx": tiny,
    }
    assert count_macs(build("nin", classes=10, input_size=(32, 32, 3)).eval(), torch.zeros(2, 3, 32, 32)) == (
        1024 * (192 * 75 + 160 * 192 + 96 * 160)
        + 256 * (192 * 96 * 25 + 192 * 192 * 2)
        + 64 * (192 * 192 * 9 + 192 * 192 + 192 * 10)
    )


def test_accuracy_and_agreement_are_the_models_own(result: BenchResult) -> None:
    images = torch.from_numpy(SPLITS.test.images)
    with torch.inference_mode():
        teacher = classifier("convnet-tiny", "gcn-zca")(images).argmax(dim=1).numpy()
        student = classifier("lenet-caffe")(images).argmax(dim=1).numpy()
    for row in result.rows[2:4]:
        assert row.accuracy == pytest.approx(100 * np.mean(student == SPLITS.test.labels))
        assert row.agreement == pytest.approx(100 * np.mean(student == teacher))
        assert row.accuracy_source == "measured"
    assert result.rows[0].agreement is None
    assert result.rows[4].accuracy == result.rows[5].accuracy
    stranger = result.rows[6]
    assert stranger.accuracy is None
    assert any("how pixels are prepared" in note for note in stranger.notes)
    assert any("with its preprocessing" in note for note in result.rows[5].notes)


def test_ratios_pair_times_of_the_same_round_and_engine() -> None:
    def contender(engine: str, is_teacher: bool, times: list[float]) -> measuring.Contender:
        row = measuring.Row("x", Path("x.pt"), engine, is_teacher, 1, 100, 0, 1, 1)
        return measuring.Contender(row, lambda: None, lambda: None, [[t] * 5 for t in times], times)

    # the machine is ten times slower in the third round: the ratio of medians would be 4, not 2
    contenders = [
        contender("torch", True, [2, 4, 40]),
        contender("onnxruntime", True, [9, 9, 9]),
        contender("torch", False, [1, 2, 20]),
        contender("onnxruntime", False, [18, 18, 18]),
    ]
    rows = [c.row for c in contenders]
    speedups = [measuring.compared(c.row, c, contenders, rows).speedup for c in contenders]
    assert speedups == [1, 1, 2, 0.5]
    slow = measuring.compared(rows[3], contenders[3], contenders, rows)
    assert (slow.verdict, slow.worse) == ("2.0× slower, same size", True)
    assert measuring.timing(contenders[2], 64)["latency_ms"] == 2000


def test_times_are_interleaved_in_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    row = measuring.Row("x", Path("x.pt"), "torch", False, 1, 1, 0, 1, 1)
    contenders = [
        measuring.Contender(row, lambda index=index: calls.append(index), lambda: None) for index in range(3)
    ]
    measuring.measure(contenders, 8, lambda event: None)
    rounds = np.array(calls[9:]).reshape(8, 3, 6)
    assert (rounds == rounds[:, :, :1]).all()
    orders = {tuple(order) for order in rounds[:, :, 0].tolist()}
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len(orders) > 1


def test_words() -> None:
    assert in_words(2.13, "faster", "slower", "as fast") == "2.1× faster"
    assert in_words(0.25, "faster", "slower", "as fast") == "4.0× slower"
    assert in_words(1.04, "faster", "slower", "as fast") == "as fast"
    assert in_words(1234.5, "smaller", "bigger", "same size") == "1,234× smaller"


def test_json_is_plain(result: BenchResult) -> None:
    document = json.loads(json.dumps(result.to_json()))
    assert document["schema_version"] == 1
    assert document["test_images"] == 20
    assert {"cpu", "packages", "threads"} <= set(document["environment"])


def test_models_that_do_not_fit_the_data_get_a_dash(tmp_path: Path) -> None:
    teacher, other = tmp_path / "teacher.pt", tmp_path / "other.pt"
    classifier("convnet-tiny").save(teacher)
    classifier("convnet-tiny", side=8).save(other)
    config = BenchConfig(rounds=3, batch=2, engine="torch", threads=1)
    before = torch.get_num_threads()
    _, row = bench([teacher, other], config, SPLITS).rows
    assert (row.accuracy, row.agreement) == (None, None)
    assert any("takes 8×8×3 images, the data has 16×16×3" in note for note in row.notes)
    recorded = bench([teacher], config).rows[0]
    assert (recorded.accuracy, recorded.accuracy_source) == (61.5, "recorded")
    assert torch.get_num_threads() == before


def test_default_models(tmp_path: Path) -> None:
    teacher, run, exports = (
        tmp_path / "runs/t/student.pt",
        tmp_path / "runs/a/student.pt",
        tmp_path / "exports",
    )
    config = BenchConfig(teacher=teacher)
    with pytest.raises(KdError, match="no teacher"):
        default_models(config, tmp_path / "runs", exports)
    for path in (teacher, run, exports / "a.onnx", exports / "notes.txt"):
        if path is run:
            with pytest.raises(KdError, match="nothing to compare"):
                default_models(config, tmp_path / "runs", exports)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert default_models(config, tmp_path / "runs", exports) == [teacher, run, exports / "a.onnx"]


def test_nothing_to_measure() -> None:
    with pytest.raises(KdError, match="no models"):
        benching.bench([], BenchConfig())


def test_a_batch_of_one_hidden_in_a_file_is_found_and_a_file_that_cannot_run_is_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher = classifier("convnet-tiny")
    teacher.save(tmp_path / "teacher.pt")

    def save(name: str, rows: int) -> Path:
        """Flattens to a fixed number of rows: usual in old exports, right for that batch only."""
        helper, kind = onnx.helper, onnx.TensorProto.FLOAT
        weights = np.ones((768 // rows, 5), np.float32)
        graph = helper.make_graph(
            [
                helper.make_node("Reshape", ["x", "shape"], ["flat"]),
                helper.make_node("MatMul", ["flat", "w"], ["y"]),
            ],
            "g",
            [helper.make_tensor_value_info("x", kind, ["n", 3, 16, 16])],
            [helper.make_tensor_value_info("y", kind, ["n", 5])],
            [
                onnx.numpy_helper.from_array(np.array([rows, 768 // rows]), "shape"),
                onnx.numpy_helper.from_array(weights, "w"),
            ],
        )
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
            tmp_path / name,
        )
        return tmp_path / name

    paths = [tmp_path / "teacher.pt", save("single.onnx", 1), save("broken.onnx", 3)]
    config = BenchConfig(rounds=3, batch=4, threads=1, engine="torch")
    result = bench(paths, config, SPLITS, skip=True)
    assert [row.name for row in result.rows] == ["teacher", "single.onnx"]
    assert any("run singly" in note for note in result.rows[1].notes)
    assert "broken.onnx" in result.notes[0]
    with pytest.raises(KdError, match=r"broken\.onnx"):
        bench(paths, config, SPLITS)
    assert capfd.readouterr().err == ""  # onnxruntime writes no log of its own


def test_a_bigger_model_is_flagged_even_without_a_speed_ratio(result: BenchResult) -> None:
    teacher, student = result.rows[0], replace(result.rows[3], speedup=None, verdict="")
    rows = [replace(teacher, network_bytes=10), replace(student, network_bytes=30)]
    own = [measuring.Contender(row, lambda: None, lambda: None, [[1.0]], [1.0]) for row in rows]
    judged = measuring.compared(rows[1], own[1], own, rows)
    assert judged.worse and judged.verdict == "3.0× bigger" and judged.speedup is None
