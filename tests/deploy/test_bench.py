"""Counts are checked by hand; times only for being there and being compared as said."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import scipy.stats
import torch

from kdcli import data
from kdcli.base.config import BenchConfig
from kdcli.base.errors import KdError
from kdcli.base.files import sha256_file
from kdcli.data import Splits
from kdcli.deploy.bench import BenchResult, Row, bench, benchmark, latency, to_csv, to_markdown
from kdcli.deploy.bench.benchmark import candidates_of
from kdcli.deploy.bench.footprint import measure_footprint
from kdcli.deploy.bench.latency import Candidate, Runner, Timings, compare, measure, size_text
from kdcli.deploy.bench.measurements import rows_within
from kdcli.deploy.export import ExportResult
from kdcli.deploy.onnx_model import OnnxClassifier, OnnxRunner
from kdcli.models import Classifier, build
from kdcli.models.layers import count_network
from tests.deploy.helpers import SPLITS, classifier, exported, random_splits, resizing_classifier


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
    return bench(paths, BenchConfig(rounds=3, batch="1,4", threads=1, no_memory=True), SPLITS)


def test_bench_gives_a_row_for_each_model_and_engine(result: BenchResult) -> None:
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
    assert result.sessions == result.rounds == 3


def test_footprint_is_measured_in_a_separate_process(tmp_path: Path) -> None:
    classifier("convnet-tiny").save(tmp_path / "model.pt")
    result = bench([tmp_path / "model.pt"], BenchConfig(rounds=3, batch="4", threads=1))
    of_torch, of_onnx = (row.footprint for row in result.rows)
    for found in (of_torch, of_onnx):
        assert found is not None
        assert None not in (found.load_ms, found.first_ms, found.import_ms)
        assert 0 < found.base_rss_bytes <= found.peak_rss_bytes <= found.peak_rss_batch_bytes
    # onnxruntime's process has not loaded torch, which alone has more than this
    assert of_onnx.peak_rss_bytes < of_torch.base_rss_bytes
    lines = list(csv.DictReader(io.StringIO(to_csv(result))))
    assert [int(line["peak_rss_bytes"]) for line in lines] == [
        of_torch.peak_rss_bytes,
        of_onnx.peak_rss_bytes,
    ]


def test_footprint_of_a_failing_process_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    with pytest.raises(RuntimeError) as caught:
        measure_footprint(tmp_path / "no.onnx", "onnxruntime", 1, (3, 8, 8), 1)
    assert str(caught.value) and "\n" not in str(caught.value)


def test_size_excludes_preprocessing(result: BenchResult) -> None:
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


def test_macs_equal_a_count_by_hand(result: BenchResult) -> None:
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
    assert count_network(
        build("nin", classes=10, input_size=(32, 32, 3)).eval(), torch.zeros(2, 3, 32, 32)
    ).macs == (
        1024 * (192 * 75 + 160 * 192 + 96 * 160)
        + 256 * (192 * 96 * 25 + 192 * 192 * 2)
        + 64 * (192 * 192 * 9 + 192 * 192 + 192 * 10)
    )


def test_accuracy_and_agreement_equal_a_direct_evaluation(result: BenchResult) -> None:
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
    assert any("no preprocessing recorded" in note for note in stranger.notes)
    assert any("with its preprocessing" in note for note in result.rows[5].notes)


def row(engine: str, is_teacher: bool, network_bytes: int = 100) -> Row:
    return Row("x", Path("x.pt"), engine, is_teacher, 1, network_bytes, 0, 1, 1)


def timings(*times: list[float]) -> Timings:
    """Calls of each model took these seconds, a round each, in two sessions."""
    seconds = np.array(times).T  # (rounds, models)
    calls = np.repeat(seconds[:, :, None], 5, axis=2)
    half = len(seconds) // 2
    return Timings([calls[:half], calls[half:]], {4: seconds})


def test_speedup_pairs_times_of_the_same_round_and_engine() -> None:
    # the machine is ten times slower in the second session: the ratio of medians would be another
    times = timings([2, 4, 40, 60], [9, 9, 9, 9], [1, 2, 20, 30], [18, 18, 18, 18])
    rows = [row("torch", True), row("onnxruntime", True), row("torch", False), row("onnxruntime", False)]
    judged = [compare(index, rows, times) for index in range(4)]
    assert [one.speedup for one in judged] == pytest.approx([1, 1, 2, 0.5])
    assert judged[2].speedup_interval == pytest.approx((2, 2))
    assert [one.speed for one in judged] == [None, None, "faster", "slower"]
    assert (judged[3].verdict, judged[3].worse) == ("2× slower, same size", True)
    assert times.figures(2)["latency_ms"] == 11000
    assert times.figures(2)["throughput"] == pytest.approx({1: 1 / 11, 4: 4 / 11})


def test_verdict_text_without_a_difference() -> None:
    rows = [row("torch", True), row("torch", False)]
    judged = compare(1, rows, timings([2, 4, 3, 5], [2.02, 4, 2.98, 5]))
    assert (judged.speed, judged.verdict, judged.worse) == (
        "no difference",
        "no difference in speed, same size",
        False,
    )


def test_verdict_needs_an_interval_without_1_and_a_ratio_of_2_per_cent() -> None:
    for (low, ratio, high), expected in {
        (1.01, 1.05, 1.1): "faster",
        (0.99, 1.5, 2.3): "no difference",  # may be chance
        (1.005, 1.01, 1.015): "no difference",  # too little to matter
        (0.90, 0.95, 0.99): "slower",
        (0.985, 0.99, 0.995): "no difference",
        (1, 1, 1): "no difference",
    }.items():
        assert latency.speed_verdict(low, ratio, high) == expected


def test_ratio_interval_equals_scipys_bootstrap() -> None:
    """SciPy's own bootstrap of the sessions' medians, at the level that few of them ask for."""
    random = np.random.default_rng(3)
    sessions = [np.exp(random.normal(0.2, 0.1, 30)) for _ in range(12)]
    low, middle, high = latency.ratio_interval(sessions)
    medians = np.array([np.median(np.log(one)) for one in sessions])
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
    assert latency.ratio_interval([np.array([2.0])])[1] == pytest.approx(2)


def test_ratio_interval_has_its_coverage() -> None:
    """Sessions differ by 1 %, rounds by 10 %: of 200 intervals about 190 hold the ratio."""
    random = np.random.default_rng(4)
    held = 0
    for _ in range(200):
        sessions = [
            np.exp(np.log(1.3) + random.normal(0, 0.01) + random.normal(0, 0.1, 60)) for _ in range(8)
        ]
        low, _, high = latency.ratio_interval(sessions)
        held += low <= 1.3 <= high
    assert 180 <= held <= 197


def test_p99_needs_ten_calls_beyond_it() -> None:
    def figures(count: int) -> dict[str, float]:
        return Timings([np.arange(1.0, count + 1).reshape(count, 1, 1) / 1e3]).figures(0)

    assert figures(1000)["latency_p99_ms"] == pytest.approx(990.01)
    assert figures(999)["latency_p99_ms"] is None
    assert figures(11)["latency_p90_ms"] == pytest.approx(10)


def test_measure_reloads_models_and_shuffles_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "warm_up", lambda call, **settings: call())
    calls: list[tuple[int, int]] = []
    made: list[int] = []

    def load(index: int) -> Runner:
        made.append(index)
        calls.append((-1, index))
        return lambda count: calls.append((count, index))

    models = [
        Candidate(row("torch", index == 0), lambda index=index: load(index), measure_footprint)
        for index in range(3)
    ]
    config = BenchConfig(rounds=32, batch="1,4", max_seconds=600)
    times = measure(models, config, lambda event: None)
    sessions = len(times.single)
    assert made == [0, 1, 2] * sessions
    assert all(session.shape == (2, 3, 5) for session in times.single)
    assert times.rounds == 2 * sessions
    assert times.batches[4].shape == (15, 3)
    last = [index for count, index in calls if count == 1][-2 * 3 * 6 :]  # of the last session
    turns = np.array(last).reshape(2, 3, 6)
    assert (turns == turns[:, :, :1]).all()
    assert all(sorted(order) == [0, 1, 2] for order in turns[:, :, 0].tolist())


def test_onnx_files_are_timed_without_overhead_of_kd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 µs of Python a call made the same network seem a fifth slower as a file than as a checkpoint."""
    path = exported(tmp_path, classifier("convnet-tiny")).path
    [found], _ = candidates_of(
        path, "x", OnnxClassifier.load(path), BenchConfig(batch="2"), 1, is_teacher=True
    )
    runner = found.load()
    for kind in (OnnxClassifier, OnnxRunner):
        monkeypatch.delattr(kind, "run")
    assert runner(2).shape == (2, 5)


def test_rows_within_limits(result: BenchResult) -> None:
    teacher, other = result.rows[0], result.rows[2]
    rows = [
        replace(teacher, accuracy=91.4, latency_ms=0.1),
        replace(other, name="near", accuracy=90.9, latency_ms=3.0),
        replace(other, name="equal", accuracy=91.3, latency_ms=9.0),  # in floats 91.4 − 91.3 is above 0.1
        replace(other, name="far", accuracy=80.0, latency_ms=1.0),
        replace(other, name="unknown", accuracy=None, latency_ms=2.0),
    ]

    def met(budget_ms: float | None, max_drop: float | None) -> list[str]:
        return [row.name for row in rows_within(rows, budget_ms, max_drop)]

    assert met(2.5, None) == ["far", "unknown"]
    assert met(None, 1.0) == ["near", "equal"]
    assert met(None, 0.1) == ["equal"]
    assert met(2.5, 1.0) == []
    assert met(5, 50) == ["far", "near"]


def test_csv_and_markdown_escape_text(result: BenchResult) -> None:
    hostile = replace(result.rows[2], name="=1+1|x\n`y`\x9b2J\u202e", notes=("\x1b@evil",))
    shown = replace(result, rows=(*result.rows[:2], hostile))
    lines = list(csv.DictReader(io.StringIO(to_csv(shown))))
    assert len(lines) == 3
    assert lines[2]["name"] == "'=1+1|x\n`y` 2J "
    assert lines[2]["notes"] == "' @evil"
    assert float(lines[0]["latency_ms"]) == result.rows[0].latency_ms
    assert float(lines[1]["images_per_s_batch_4"]) == result.rows[1].throughput[4]
    text = to_markdown(shown)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {10}
    assert r"=1+1\|x \`y\` 2J" in text


def test_kl_and_calibration_equal_a_direct_evaluation(result: BenchResult) -> None:
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


def test_precision_of_a_quantised_file(whitened: tuple[Classifier, ExportResult]) -> None:
    model = OnnxClassifier.load(whitened[1].path)
    [found], _ = candidates_of(whitened[1].path, "x", model, BenchConfig(), 1, is_teacher=False)
    assert found.row.precision == "int8"
    assert found.footprint().peak_rss_bytes


@pytest.mark.slow
def test_compiled_engine(tmp_path: Path) -> None:
    classifier("convnet-tiny").save(tmp_path / "model.pt")
    config = BenchConfig(rounds=3, batch="2", threads=1, engine="all", no_memory=True)
    result = bench([tmp_path / "model.pt"], config)
    compiled = [row for row in result.rows if row.engine == "compiled"]
    assert len(compiled) == 1 or "is not run as compiled" in result.notes[0]
    assert all(row.footprint is None for row in result.rows)


def test_teacher_that_no_engine_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(benchmark, "_torch_loader", refuse)
    exported(tmp_path, classifier("convnet-tiny"))
    with pytest.raises(KdError, match="model could not be run") as caught:
        bench([tmp_path / "model.pt", tmp_path / "model.onnx"], BenchConfig(engine="compiled"))
    assert "no C++ compiler" in caught.value.hint


def test_network_that_onnx_cannot_express_is_timed_in_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise KdError("no ONNX operator")

    monkeypatch.setattr(benchmark, "to_onnx", refuse)
    classifier("convnet-tiny").save(tmp_path / "model.pt")
    result = bench([tmp_path / "model.pt"], BenchConfig(rounds=3, batch=2, threads=1, no_memory=True))
    assert [row.engine for row in result.rows] == ["torch"]
    assert result.notes[0] == "model is not run as onnxruntime: no ONNX operator"


def test_teacher_with_open_sides_takes_those_of_the_students(tmp_path: Path) -> None:
    exported(tmp_path, classifier("convnet-tiny"))
    opened = onnx.load(tmp_path / "model.onnx")
    for axis in (2, 3):
        opened.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side{axis}"
    del opened.metadata_props[:]
    onnx.save(opened, tmp_path / "open.onnx")
    config = BenchConfig(rounds=3, batch=2, engine="onnxruntime", threads=1, no_memory=True)
    result = bench([tmp_path / "open.onnx", tmp_path / "model.pt"], config)
    assert [row.name for row in result.rows] == ["open.onnx", "model"]


def test_size_text() -> None:
    assert size_text(2.13) == "2.1× smaller"
    assert size_text(0.25) == "4.0× bigger"
    assert size_text(1.04) == "same size"
    assert size_text(1234.5) == "1,234× smaller"


def test_result_as_json(result: BenchResult) -> None:
    document = json.loads(json.dumps(asdict(result), default=Path.as_posix))
    assert document["test_images"] == 20
    assert {"cpu", "packages", "threads"} <= set(document["environment"])


def test_accuracy_is_unknown_where_the_data_does_not_fit(tmp_path: Path) -> None:
    teacher, other = tmp_path / "teacher.pt", tmp_path / "other.pt"
    classifier("convnet-tiny").save(teacher)
    classifier("convnet-tiny", side=8).save(other)
    config = BenchConfig(rounds=3, batch=2, engine="torch", threads=1, no_memory=True)
    _, row = bench([teacher, other], config, SPLITS).rows
    assert (row.accuracy, row.agreement) == (None, None)
    assert any("takes 8×8×3 images, the data has 16×16×3" in note for note in row.notes)
    recorded = bench([teacher], config).rows[0]
    assert (recorded.accuracy, recorded.accuracy_source) == (61.5, "recorded")


QUICK = {"rounds": 3, "batch": "1", "engine": "torch", "threads": 1, "no_memory": True}


def test_images_have_the_size_of_the_models_that_do_not_resize(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{name}.pt" for name in ("teacher", "small", "smaller")]
    for path, model in zip(
        paths,
        (resizing_classifier(), *(classifier("convnet-tiny", side=side) for side in (12, 8))),
        strict=True,
    ):
        model.save(path)
    asked = []

    def load(**given: Any) -> Splits:
        asked.append(given["fit_to"])
        return random_splits(asked[-1][0])

    monkeypatch.setattr(data, "load", load)
    rows = bench(paths, BenchConfig(**QUICK, data="x")).rows
    assert [row.accuracy is not None for row in rows] == [True, True, False]
    assert rows[1].agreement is not None and "takes 8×8×3 images" in rows[2].notes[0]
    bench(paths[:1], BenchConfig(**QUICK, data="x"))
    assert asked == [(12, 12, 3), (30, 30, 3)]


def test_class_map_of_a_students_teacher(tmp_path: Path) -> None:
    teacher, student = classifier("convnet-tiny"), classifier("convnet-tiny")
    teacher.classes = tuple("abcde")
    teacher.save(tmp_path / "teacher.pt")
    (tmp_path / "map.csv").write_text("".join(map("{},{}\n".format, teacher.classes, student.classes)))
    inputs = {"class_map": str(tmp_path / "map.csv")}
    entry = {"path": "teacher.pt", "sha256": sha256_file(tmp_path / "teacher.pt"), "inputs": inputs}
    student.provenance["teacher"] = entry
    student.save(tmp_path / "student.pt")
    del entry["inputs"]
    student.save(tmp_path / "without-a-map.pt")
    paths = [tmp_path / name for name in ("teacher.pt", "student.pt", "without-a-map.pt")]
    first, second, _ = bench(paths, BenchConfig(**QUICK), SPLITS).rows
    assert first.accuracy is not None and second.agreement == 100  # the same weights
    (tmp_path / "map.csv").unlink()
    first, second, _ = bench(paths, BenchConfig(**QUICK), SPLITS).rows
    assert "accuracy not measured: " in first.notes[0] and second.accuracy is not None


def test_bench_without_models_is_an_error() -> None:
    with pytest.raises(KdError, match="no models"):
        bench([], BenchConfig())


def test_undeclared_batch_of_one_is_detected_and_broken_files_are_skipped(
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


def test_bigger_model_is_flagged_without_a_speed_ratio() -> None:
    rows = [row("torch", True, 10), row("onnxruntime", False, 30)]
    judged = compare(1, rows, timings([1, 1], [1, 1]))
    assert judged.worse and judged.verdict == "3.0× bigger" and judged.speedup is None
