"""kd executes nothing from an input file, and malformed input ends in one error within 20 s and 3 GiB.

Every file of `tests/hostile` is read by a process of its own, under an audit hook and a limit of address space.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT
from tests.hostile import archives, images, models, pickles

Outcome = dict[str, Any]


class Watched:
    """One warm process that forks for each file."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip

    def read(self, reader: str, path: Path) -> Outcome:
        assert self.process.stdin and self.process.stdout
        print(f"{reader}\t{path}", file=self.process.stdin, flush=True)
        return dict(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    process = Watched()
    yield process
    assert process.process.stdin
    process.process.stdin.close()
    process.process.wait(30)


def check(watched: Watched, reader: str, files: dict[str, Path], wanted: set[str], canary: Path) -> None:
    """Read all files; complain of every one that did not end as it should."""
    odd = []
    for name, path in files.items():
        found = watched.read(reader, path)
        if not (set(found["outcomes"]) <= wanted) or found["events"] or found["printed"] or canary.exists():
            dead = "and the canary is dead" if canary.exists() else ""
            odd.append(f"{name}: {str(found)[:1000]} {dead}")
            canary.unlink(missing_ok=True)
    assert files and not odd, "\n".join(odd)


def written(folder: Path, files: dict[str, bytes], suffix: str = "") -> dict[str, Path]:
    """Files by name, each on disk."""
    folder.mkdir()
    paths = {}
    for number, (name, data) in enumerate(files.items()):
        paths[name] = folder / (f"{number}{suffix}" if suffix else name)
        paths[name].write_bytes(data)
    return paths


@pytest.fixture(params=[10, pytest.param(1, marks=pytest.mark.slow)], ids=["every tenth", "all"])
def part(request: pytest.FixtureRequest) -> slice:
    """The part of each kind of file that a test reads."""
    return slice(None, None, request.param)


def chosen(files: dict[str, bytes], part: slice) -> dict[str, bytes]:
    return dict(list(files.items())[part])


REFUSED, EITHER, READ = {"KdError"}, {"KdError", "read"}, {"read"}


def test_watch_detects_execution_slowness_and_memory(watched: Watched, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    files = written(tmp_path / "x", pickles.bombs(canary))
    for name, event in (
        ("os.system, protocol 2", "os.system"),
        ("eval, protocol 4", "compile"),
        ("INST", "os.system"),
    ):
        found = watched.read("python's own pickle", files[name])
        assert any(event in seen for seen in found["events"]), found
        assert canary.exists()
        canary.unlink()
    assert "import" in str(watched.read("python's own pickle", files["import, protocol 0"])["events"])
    assert "MemoryError" in watched.read("greedy", tmp_path)["message"]


def test_pickles(watched: Watched, tmp_path: Path, part: slice) -> None:
    canary = tmp_path / "canary"
    check(
        watched,
        "pickle",
        written(tmp_path / "x", chosen(pickles.bombs(canary), part), ".pkl"),
        REFUSED,
        canary,
    )


def test_npy(watched: Watched, tmp_path: Path, part: slice) -> None:
    canary = tmp_path / "canary"
    files = written(tmp_path / "x", chosen(pickles.npy_bombs(canary), part), ".npy")
    os.mkfifo(tmp_path / "fifo.npy")
    check(watched, "npy", {**files, "fifo": tmp_path / "fifo.npy", "folder": tmp_path}, REFUSED, canary)


def test_archives(watched: Watched, tmp_path: Path, part: slice) -> None:
    canary = tmp_path / "canary"
    places = ["y"]
    if part.step == 1:  # they take long to make
        check(watched, "data", written(tmp_path / "x", archives.bombs(canary)), REFUSED, canary)
        places = ["x", "y"]
    check(watched, "data", written(tmp_path / "y", chosen(archives.acceptable(), part)), EITHER, canary)
    assert sorted(path.name for path in tmp_path.iterdir()) == places  # nothing was unpacked beside them


def test_cifar(watched: Watched, tmp_path: Path, part: slice) -> None:
    canary, files = tmp_path / "canary", {}
    for name, data in chosen(archives.cifar_bombs(canary), part).items():
        files[name] = tmp_path / name / "cifar-10-python.tar.gz"
        files[name].parent.mkdir()
        files[name].write_bytes(data)
    check(watched, "data", files, REFUSED, canary)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archives.cifar())
    check(watched, "data", {"good": tmp_path / "cifar-10-python.tar.gz"}, READ, canary)


def test_folders(watched: Watched, tmp_path: Path, part: slice) -> None:
    try:
        for name, (path, readable) in list(archives.folders(tmp_path).items())[part]:
            check(watched, "data", {name: path}, READ if readable else REFUSED, tmp_path / "canary")
    finally:  # shutil's and so pytest's own way recurses
        subprocess.run(["rm", "-rf", tmp_path / "deep"])
    os.mkfifo(tmp_path / "fifo.tar")
    check(watched, "data", {"fifo": tmp_path / "fifo.tar"}, REFUSED, tmp_path / "canary")


def test_images(watched: Watched, tmp_path: Path, part: slice) -> None:
    canary = tmp_path / "canary"
    small = images.Image.new("RGB", (8, 8), (9, 8, 7))
    kinds = {"a PPM": images.saved(small, "PPM"), "half a PNG": images.saved(small, "PNG")[:40]}
    check(watched, "image", written(tmp_path / "small", kinds, ".png"), REFUSED, canary)
    if part.step == 1:  # they take long to make
        check(watched, "image", written(tmp_path / "x", images.bombs(), ".png"), REFUSED, canary)
        check(watched, "image", written(tmp_path / "y", images.odd(), ".png"), EITHER, canary)


def test_checkpoints(watched: Watched, tmp_path: Path, part: slice) -> None:
    """TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 is set for the reading process."""
    canary = tmp_path / "canary"
    files = written(tmp_path / "x", chosen(models.checkpoints(canary), part), ".pt")
    os.mkfifo(tmp_path / "fifo.pt")
    check(
        watched,
        "pt",
        {**files, "fifo": tmp_path / "fifo.pt", "/dev/zero": Path("/dev/zero")},
        REFUSED,
        canary,
    )
    whole = models.checkpoint()
    written(tmp_path / "many cut", models.truncated(whole, 64 * part.step))
    written(tmp_path / "many flipped", models.flipped(whole, 100 // part.step))
    check(watched, "pt", {"cut": tmp_path / "many cut"}, REFUSED, canary)
    check(watched, "pt", {"flipped": tmp_path / "many flipped"}, EITHER, canary)
    check(watched, "pt", written(tmp_path / "good", {"good.pt": whole}), READ, canary)


def test_onnx_files(watched: Watched, tmp_path: Path, part: slice) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "weights.bin").write_bytes(bytes(384))
    files = written(tmp_path / "x", chosen(models.onnx_files(), part), ".onnx")
    check(watched, "onnx", files, REFUSED, canary)
    whole = models.network().SerializeToString()
    written(tmp_path / "many cut", models.truncated(whole, 16 * part.step))
    written(tmp_path / "many flipped", models.flipped(whole, 200 // part.step))
    check(watched, "onnx", {"cut": tmp_path / "many cut"}, REFUSED, canary)
    check(watched, "onnx", {"flipped": tmp_path / "many flipped"}, EITHER, canary)
    check(watched, "onnx", written(tmp_path / "good", {"good.onnx": whole}), READ, canary)


def test_caffe_files(watched: Watched, tmp_path: Path, part: slice) -> None:
    canary = tmp_path / "canary"
    check(
        watched,
        "caffemodel",
        written(tmp_path / "x", chosen(models.caffemodels(), part), ".caffemodel"),
        REFUSED,
        canary,
    )
    check(
        watched,
        "prototxt",
        written(tmp_path / "y", chosen(models.prototxts(), part), ".prototxt"),
        REFUSED,
        canary,
    )
    whole = models.caffemodel()
    written(tmp_path / "many cut", models.truncated(whole))
    written(tmp_path / "many flipped", models.flipped(whole, 600 // part.step))
    check(watched, "caffemodel", {"cut": tmp_path / "many cut"}, REFUSED, canary)
    check(watched, "caffemodel", {"flipped": tmp_path / "many flipped"}, EITHER, canary)
    check(watched, "mean", {"flipped": tmp_path / "many flipped"}, EITHER, canary)


@pytest.mark.slow
def test_the_real_caffemodel_cut_at_each_kilobyte(
    watched: Watched, tmp_path: Path, shared_data: Path
) -> None:
    whole = shared_data / "cifar10_nin.caffemodel"
    check(watched, "caffemodel, cut", {"cut": whole}, REFUSED, tmp_path / "canary")
