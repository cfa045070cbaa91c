"""kd bench, as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kdcli.base.config import BenchConfig, make
from kdcli.base.errors import KdError, UsageError
from kdcli.cli import bench, export
from tests.helpers import command_line, digits_student


@pytest.fixture
def kd(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return command_line(monkeypatch, export, bench)


def test_bench_table_fits_80_columns(kd: Any, workplace: Path) -> None:
    digits_student(Path("weights/teacher.pt"), test_accuracy=97.5)
    digits_student(Path("runs/noisy-convnet-small-12/student.pt"), "convnet-small", test_accuracy=93.25)
    words = "bench --rounds 3 --no-memory --batch 4 --engine torch --threads 1 --plot b.svg"
    done = kd(*words.split())
    assert done.exit_code == 0
    table = [line for line in done.stdout.splitlines() if " torch " in line or "faster  " in line]
    assert max(map(len, table)) <= 80
    assert "97.50*" in done.stdout
    assert "93.25*" in done.stdout
    assert "recorded in the file" in done.stdout
    assert "warning: noisy-convnet-small-12: " in done.stdout
    assert "× bigger" in done.stdout
    assert Path("b.svg").is_file()
    assert "wrote b.svg" in done.stdout


def test_bench_is_one_table_and_a_sentence_for_each_student(kd: Any, workplace: Path) -> None:
    digits_student(Path("weights/teacher.pt"), test_accuracy=97.5)
    digits_student(Path("runs/a/student.pt"), "convnet-small", test_accuracy=93.25)
    Path("runs/teacher").mkdir()
    shutil.copyfile("weights/teacher.pt", "runs/teacher/student.pt")
    words = ["bench", "--rounds", "3", "--no-memory", "--batch", "4", "--threads", "1"]
    done = kd(*words)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[:2] for line in lines[2:4]] == [["teacher", "ort"], ["a", "ort"]]
    [verdict] = [line for line in lines if line.startswith("warning: a: ")]
    assert verdict.endswith("× bigger, accuracy 4.25 points lower")
    assert not any("torch" in line or "p95" in line for line in lines)
    assert "runs/teacher/student.pt has the same content as weights/teacher.pt" in done.stderr
    details = kd(*words, "--details").stdout
    assert details.count(" torch ") == 2 * 3  # models, tables
    assert "p95" in details


def test_bench_json_with_accuracy_on_test_images(kd: Any, workplace: Path) -> None:
    first, second = digits_student(Path("a.pt")), digits_student(Path("b.pt"), "convnet-small")
    words = "--rounds 3 --no-memory --batch 4 --engine torch --threads 1 --data digits --json"
    done = kd("bench", str(first), str(second), *words.split())
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert document["teacher"] == "a"  # the first named: there is no weights/teacher.pt
    assert document["test_images"] == 360
    assert [row["accuracy_source"] for row in document["rows"]] == ["measured", "measured"]
    assert 0 <= document["rows"][1]["agreement"] <= 100


def test_bench_lists_teacher_first(kd: Any, workplace: Path) -> None:
    digits_student(Path("weights/teacher.pt"))
    digits_student(Path("s.pt"), test_accuracy=90.0)
    words = ("--rounds", "3", "--no-memory", "--batch", "1", "--engine", "torch", "--threads", "1", "--json")
    done = kd("bench", "s.pt", "weights/teacher.pt", *words)
    assert [row["name"] for row in json.loads(done.stdout)["rows"]] == ["teacher", "s"]
    done = kd("bench", "weights/teacher.pt", "--teacher", "s.pt", *words)
    assert [row["name"] for row in json.loads(done.stdout)["rows"]] == ["s", "teacher"]


def test_bench_skips_unreadable_default_models(kd: Any, workplace: Path) -> None:
    digits_student(Path("weights/teacher.pt"))
    digits_student(Path("runs/a/student.pt"), test_accuracy=90.0)
    Path("exports").mkdir()
    Path("exports/broken.onnx").write_bytes(b"no")
    words = ("--rounds", "3", "--no-memory", "--batch", "1", "--engine", "torch", "--threads", "1")
    done = kd("bench", *words, "--json")
    document = json.loads(done.stdout)
    assert [row["name"] for row in document["rows"]] == ["teacher", "a"]
    assert any(note.startswith("left out: exports/broken.onnx") for note in document["notes"])
    with pytest.raises(KdError, match=r"broken\.onnx is not an ONNX model"):
        kd("bench", "exports/broken.onnx", *words)


def test_bench_without_models(kd: Any, workplace: Path) -> None:
    with pytest.raises(KdError, match="no teacher in weights/ or runs/") as caught:
        kd("bench")
    assert caught.value.hint == "Start with: kd demo"
    digits_student(Path("weights/teacher.pt"))
    with pytest.raises(KdError, match="nothing to compare"):
        kd("bench")
    with pytest.raises(KdError, match="no such file: x"):
        kd("bench", "x.onnx")
    with pytest.raises(UsageError, match=r"--plot b\.gif: must be a \.png or \.svg file"):
        kd("bench", "weights/teacher.pt", "--plot", "b.gif")


def test_bench_budget_exit_code(kd: Any, workplace: Path) -> None:
    digits_student(Path("a.pt"), test_accuracy=97.5)
    digits_student(Path("b.pt"), test_accuracy=97.0)
    words = ("bench", "a.pt", "b.pt", "--rounds", "3", "--batch", "1", "--engine", "torch", "--no-memory")
    words += ("--threads", "1")
    done = kd(*words, "--max-drop", "0.6", "--budget-ms", "10000")
    assert (
        "fastest model within --budget-ms 10000 and within 0.6 points of the teacher (--max-drop): b (torch)"
        in done.stdout
    )
    with pytest.raises(
        KdError, match=r"no model is within --budget-ms 1e-05 and within 0\.4 points"
    ) as caught:
        kd(*words, "--budget-ms", "0.00001", "--max-drop", "0.4")
    assert caught.value.exit_code == 1
    for wrong in (("--batch", "0"), ("--batch", "1,x"), ("--batch", ""), ("--budget-ms", "0")):
        with pytest.raises(UsageError):
            kd("bench", "a.pt", "b.pt", *wrong)


def test_memory_csv_and_markdown(kd: Any, workplace: Path) -> None:
    digits_student(Path("a.pt"))
    words = ("bench", "a.pt", "--rounds", "3", "--batch", "1,2", "--engine", "onnxruntime", "--threads", "1")
    words += ("--details",)
    done = kd(*words, "--csv", "out/a.csv", "--markdown", "a.md")
    assert "peak of a process for this model alone" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 98  # notes may be longer than tables
    assert Path("out/a.csv").read_text().startswith("name,path,engine")
    assert Path("a.md").read_text().startswith("| model | engine |")
    Path("folder").mkdir()
    with pytest.raises(UsageError, match="--csv folder: must be a file, not a folder"):
        kd(*words, "--csv", "folder")


def test_default_models(workplace: Path) -> None:
    teacher, run, export = Path("runs/t/student.pt"), Path("runs/a/student.pt"), Path("exports/a.onnx")
    config = make(BenchConfig, {"teacher": teacher})
    with pytest.raises(KdError, match="no such file: runs/t/student"):
        bench.default_models(config)
    for path in (teacher, run, export, Path("exports/notes.txt")):
        if path is run:
            with pytest.raises(KdError, match="nothing to compare"):
                bench.default_models(config)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert bench.default_models(config) == [teacher, run, export]
