"""Counts are checked by hand; times only for being there and being compared as said."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import scipy.stats
import torch

from kdcli.base.config import BenchConfig
from kdcli.base.errors import KdError
from kdcli.deploy import bench as benching
from kdcli.deploy.bench import BenchResult, bench, default_models, isolated, stats, tables
from kdcli.deploy.bench import contenders as measuring
from kdcli.deploy.bench.rows import in_words, keeping
from kdcli.deploy.onnx_model import OnnxClassifier
from kdcli.models import build
from kdcli.models.layer_summary import count_macs
from tests.deploy.test_export import SPLITS, classifier, exported, one_thread  # noqa: F401


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
    return bench(paths, BenchConfig(rounds=9, batch="1,4", threads=1), SPLITS)


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
        assert row.latency_p99_ms is None  # fewer than ten calls would lie beyond it
        assert row.latency_n == result.rounds * 5
        assert sorted(row.throughput) == [1, 4]
        assert row.throughput[1] == pytest.approx(1e3 / row.latency_ms)
        assert row.images_per_s == row.throughput[4] > 0
        assert row.speedup is not None and row.speedup_interval is not None
        low, high = row.speedup_interval
        assert low <= row.speedup <= high
        assert row.precision == "fp32"
    assert [row.speedup for row in result.rows if row.is_teacher] == [1.0, 1.0]
    assert 8 <= result.sittings <= result.rounds <= 9


def test_each_is_measured_in_a_process_of_its_own(result: BenchResult) -> None:
    for row in result.rows:
        alone = row.alone
        assert alone is not None and alone.problem is None
        assert None not in (alone.load_ms, alone.first_ms, alone.import_ms)
        assert 0 < alone.base_rss_bytes <= alone.peak_rss_bytes <= alone.peak_rss_batch_bytes
    of_torch = result.rows[0].alone
    of_onnx = result.rows[1].alone
    assert of_torch is not None and of_onnx is not None
    # onnxruntime's process has not loaded torch, which alone has more than this
    assert of_onnx.peak_rss_bytes < of_torch.base_rss_bytes


def test_a_process_that_fails_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    found = isolated.alone(tmp_path / "no.onnx", "onnxruntime", 1, (3, 8, 8), "float32", 1)
    assert found.peak_rss_bytes is None
    assert found.problem and "\n" not in found.problem


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


def contender(engine: str, is_teacher: bool, times: list[float]) -> measuring.Contender:
    """Its calls took these seconds, a round each, in two sittings."""
    row = measuring.Row("x", Path("x.pt"), engine, is_teacher, 1, 100, 0, 1, 1)
    half = len(times) // 2
    singles = [[[t] * 5 for t in part] for part in (times[:half], times[half:])]
    return measuring.Contender(row, lambda: lambda count: None, singles=singles, batches={4: times})


def test_ratios_pair_times_of_the_same_round_and_engine() -> None:
    # the machine is ten times slower in the second sitting: the ratio of medians would be another
    contenders = [
        contender("torch", True, [2, 4, 40, 60]),
        contender("onnxruntime", True, [9, 9, 9, 9]),
        contender("torch", False, [1, 2, 20, 30]),
        contender("onnxruntime", False, [18, 18, 18, 18]),
    ]
    rows = [c.row for c in contenders]
    judged = [measuring.compared(c.row, c, contenders, rows) for c in contenders]
    assert [row.speedup for row in judged] == pytest.approx([1, 1, 2, 0.5])
    assert judged[2].speedup_interval == pytest.approx((2, 2))
    assert [row.speed for row in judged] == [None, None, "faster", "slower"]
    assert (judged[3].verdict, judged[3].worse) == ("2× slower, same size", True)
    assert measuring.timing(contenders[2])["latency_ms"] == 11000
    assert measuring.timing(contenders[2])["throughput"] == pytest.approx({1: 1 / 11, 4: 4 / 11})


def test_no_difference_is_said_so() -> None:
    same = [contender("torch", True, [2, 4, 3, 5]), contender("torch", False, [2.02, 4, 2.98, 5])]
    rows = [c.row for c in same]
    judged = measuring.compared(rows[1], same[1], same, rows)
    assert (judged.speed, judged.verdict, judged.worse) == (
        "no difference",
        "no difference in speed, same size",
        False,
    )


def test_verdicts() -> None:
    for (low, ratio, high), expected in {
        (1.01, 1.05, 1.1): "faster",
        (0.99, 1.5, 2.3): "no difference",  # may be chance
        (1.005, 1.01, 1.015): "no difference",  # too little to matter
        (0.90, 0.95, 0.99): "slower",
        (0.985, 0.99, 0.995): "no difference",
        (1, 1, 1): "no difference",
    }.items():
        assert stats.verdict(low, ratio, high) == expected


def test_the_interval_is_the_bootstraps() -> None:
    """SciPy's own bootstrap of the sittings' medians, at the level that few of them ask for."""
    random = np.random.default_rng(3)
    sittings = [np.exp(random.normal(0.2, 0.1, 30)) for _ in range(12)]
    low, middle, high = stats.ratio_interval(sittings)
    medians = np.array([np.median(np.log(one)) for one in sittings])
    assert np.log(middle) == pytest.approx(medians.mean())
    tail = scipy.stats.norm.sf((12 / 11) ** 0.5 * 2.2009852)  # t of 11 degrees of freedom, from a table
    theirs = scipy.stats.bootstrap(
        (medians,),
        np.mean,
        method="percentile",
        n_resamples=20_000,
        confidence_level=1 - 2 * tail,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert np.log([low, high]) == pytest.approx(list(theirs), abs=0.003)
    assert stats.ratio_interval([np.array([2.0])])[1] == pytest.approx(2)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Sittings differ by 1 %, rounds by 10 %: of 200 intervals about 190 hold the ratio."""
    random = np.random.default_rng(4)
    held = 0
    for _ in range(200):
        sittings = [
            np.exp(np.log(1.3) + random.normal(0, 0.01) + random.normal(0, 0.1, 60)) for _ in range(8)
        ]
        low, _, high = stats.ratio_interval(sittings)
        held += low <= 1.3 <= high
    assert 180 <= held <= 197


def test_percentiles_are_told_where_there_is_something_beyond_them() -> None:
    values = np.arange(1.0, 1001.0)
    assert stats.percentile(values, 99) == pytest.approx(990.01)
    assert stats.percentile(values[:999], 99) is None
    assert stats.percentile(values[:11], 90) == 10


def test_models_are_loaded_anew_and_take_turns_in_random_order() -> None:
    calls: list[tuple[int, int]] = []
    made: list[int] = []
    row = measuring.Row("x", Path("x.pt"), "torch", False, 1, 1, 0, 1, 1)

    def make(index: int) -> measuring.Runner:
        made.append(index)
        calls.append((-1, index))
        return lambda count: calls.append((count, index))

    contenders = [
        measuring.Contender(row if index else replace(row, is_teacher=True), lambda index=index: make(index))
        for index in range(3)
    ]
    config = BenchConfig(rounds=32, batch="1,4", max_seconds=600)
    rounds = measuring.measure(contenders, config, lambda event: None)
    sittings = len(contenders[0].singles)
    assert made == [0, 1, 2] * sittings
    assert all([len(one) for one in c.singles] == [2] * sittings for c in contenders)
    assert rounds == 2 * sittings
    assert all(len(times) == 5 for c in contenders for sitting in c.singles for times in sitting)
    assert all(len(c.batches[4]) == 15 for c in contenders)
    last = [index for count, index in calls if count == 1][-2 * 3 * 6 :]  # of the last sitting
    turns = np.array(last).reshape(2, 3, 6)
    assert (turns == turns[:, :, :1]).all()
    assert all(sorted(order) == [0, 1, 2] for order in turns[:, :, 0].tolist())


def test_a_file_is_timed_without_what_kd_does_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 µs of Python a call made the same network seem a fifth slower as a file than as a checkpoint."""
    path = exported(tmp_path, classifier("convnet-tiny")).path
    [found], _ = measuring.contenders_of(
        path, "x", OnnxClassifier.load(path), BenchConfig(batch="2"), 1, is_teacher=True
    )
    runner = found.make()
    monkeypatch.delattr(OnnxClassifier, "run")
    assert np.asarray(runner(2)).shape == (1, 2, 5)


def test_a_budget_is_kept_by_what_is_known_to(result: BenchResult) -> None:
    teacher, other = result.rows[0], result.rows[2]
    rows = [
        replace(teacher, accuracy=90.0, latency_ms=0.1),
        replace(other, name="near", accuracy=89.5, latency_ms=3.0),
        replace(other, name="far", accuracy=80.0, latency_ms=1.0),
        replace(other, name="unknown", accuracy=None, latency_ms=2.0),
    ]

    def met(budget_ms: float | None, max_drop: float | None) -> list[str]:
        return [name for name, _ in keeping(rows, budget_ms, max_drop).met]

    assert met(2.5, None) == ["far", "unknown"]
    assert met(None, 1.0) == ["near"]
    assert met(2.5, 1.0) == []
    assert met(5, 50) == ["far", "near"]


def test_tables_for_programs_and_for_a_readme(result: BenchResult) -> None:
    hostile = replace(result.rows[2], name="=1+1|x\n`y`", notes=("@evil",))
    shown = replace(result, rows=(*result.rows[:2], hostile))
    lines = list(csv.DictReader(io.StringIO(tables.to_csv(shown))))
    assert len(lines) == 3
    assert lines[2]["name"] == "'=1+1|x\n`y`"
    assert lines[2]["notes"] == "'@evil"
    assert float(lines[0]["latency_ms"]) == result.rows[0].latency_ms
    assert float(lines[1]["images_per_s_batch_4"]) == result.rows[1].throughput[4]
    text = tables.to_markdown(shown)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {10}
    assert r"=1+1\|x \`y\`" in text


def test_kl_and_calibration_are_the_models_own(result: BenchResult) -> None:
    images = torch.from_numpy(SPLITS.test.images)
    with torch.inference_mode():
        teacher = classifier("convnet-tiny", "gcn-zca")(images).double().numpy()
        student = classifier("lenet-caffe")(images).double().numpy()

    def softmax(logits: np.ndarray) -> np.ndarray:
        raised = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(raised / raised.sum(1, keepdims=True))

    t, s = softmax(teacher), softmax(student)
    assert result.rows[2].kl == pytest.approx((t * np.log(t / s)).sum(1).mean(), rel=1e-4)
    right, sure = s.argmax(1) == SPLITS.test.labels, s.max(1)
    gaps = [
        abs((right[chosen].astype(float) - sure[chosen]).sum())
        for bin_ in range(15)
        if (chosen := (sure > bin_ / 15) & (sure <= (bin_ + 1) / 15)).any()
    ]
    assert result.rows[2].ece == pytest.approx(100 * sum(gaps) / len(sure), rel=1e-4)
    assert result.rows[0].kl is None


def test_a_quantised_file_is_called_so_and_a_compiled_network_is_one(tmp_path: Path) -> None:
    exported(tmp_path, classifier("convnet-tiny"), int8=True, calibration_images=20)
    config = BenchConfig(rounds=3, batch="2", threads=1, engine="compiled", no_memory=True)
    result = bench([tmp_path / "model.pt", tmp_path / "model.onnx"], config)
    assert result.rows[-1].precision == "int8"
    assert result.rows[-1].alone is None
    compiled = [row for row in result.rows if row.engine == "compiled"]
    assert len(compiled) == 1 or "is not compiled here" in result.notes[0]


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
    config = BenchConfig(rounds=3, batch=2, engine="torch", threads=1, no_memory=True)
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
    config = BenchConfig(rounds=3, batch=4, threads=1, engine="torch", no_memory=True)
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
    own = [
        measuring.Contender(row, lambda: lambda count: None, singles=[[[1.0]]], batches={}) for row in rows
    ]
    judged = measuring.compared(rows[1], own[1], own, rows)
    assert judged.worse and judged.verdict == "3.0× bigger" and judged.speedup is None
