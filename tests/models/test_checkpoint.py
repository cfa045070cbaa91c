"""Checkpoints: whole or not there, and never executed."""

from __future__ import annotations

import os
import pickle
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from kdcli import models
from kdcli.base.errors import KdError
from kdcli.data import preprocess
from kdcli.models import checkpoint
from tests.helpers import image_set


def classifier() -> models.Classifier:
    torch.manual_seed(0)
    data = image_set(20)
    return models.Classifier(
        models.build("convnet-tiny", classes=3, input_size=(8, 8, 1)),
        preprocess.fit("mean-std", data.images),
        arch="convnet-tiny",
        arch_args={},
        classes=data.classes,
        input_size=(8, 8, 1),
        provenance={"method": "ce", "nested": {"seed": 1}},
    ).eval()


def saved(folder: Path) -> Path:
    classifier().save(folder / "m.pt")
    return folder / "m.pt"


def test_round_trip(tmp_path: Path) -> None:
    model = classifier()
    model.save(tmp_path / "m.pt")
    again = models.load(tmp_path / "m.pt")
    images = torch.from_numpy(image_set(7).images)
    with torch.inference_mode():
        torch.testing.assert_close(again(images), model(images), rtol=1e-6, atol=1e-6)
    assert (again.classes, again.input_size, again.provenance) == (
        model.classes,
        model.input_size,
        model.provenance,
    )
    assert not again.training


def test_checkpoint_bytes_are_reproducible(tmp_path: Path) -> None:
    """What is kept of a teacher goes by its file's hash: a teacher that is made again finds it."""
    classifier().save(tmp_path / "a.pt")
    classifier().save(tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_load_keeps_the_random_state(tmp_path: Path) -> None:
    classifier().save(tmp_path / "m.pt")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models.load(tmp_path / "m.pt")
    assert torch.equal(torch.rand(3), expected)


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("forced", [None, "1"])
def test_a_malicious_checkpoint_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: str | None, checked: bool
) -> None:
    """Not even where the environment asks torch to trust everything, nor if only torch looked at it."""
    if not checked:
        monkeypatch.setattr(checkpoint, "check_archive", lambda *_: None)
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    canary = tmp_path / "canary"
    torch.save({"format_version": 1, "state_dict": _Canary(canary)}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Canary(canary)))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(KdError):
            checkpoint.load(tmp_path / name)
    assert not canary.exists()
    if forced:
        assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == forced


def test_every_truncation_and_damaged_head_is_one_error(tmp_path: Path) -> None:
    classifier().save(tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    broken = tmp_path / "broken.pt"
    for size in [*range(0, len(whole), max(1, len(whole) // 25)), len(whole) - 1]:
        broken.write_bytes(whole[:size])
        with pytest.raises(KdError, match=r"broken\.pt"):
            checkpoint.load(broken)


@pytest.mark.parametrize(
    "document",
    [
        {},
        [1, 2],
        {"format_version": "1"},
        {"format_version": 1},
        {"format_version": 1, "arch": "lenet", "arch_args": {}, "state_dict": {"a": 3}, "classes": []},
    ],
)
def test_other_torch_files_are_refused(tmp_path: Path, document: Any) -> None:
    torch.save(document, tmp_path / "x.pt")
    with pytest.raises(KdError):
        checkpoint.load(tmp_path / "x.pt")


def test_newer_format_hints_at_an_upgrade(tmp_path: Path) -> None:
    torch.save({"format_version": 99}, tmp_path / "x.pt")
    with pytest.raises(KdError, match="not a kd checkpoint") as caught:
        checkpoint.load(tmp_path / "x.pt")
    assert "upgrade" in caught.value.hint


def test_error_of_mismatched_weights_names_the_network(tmp_path: Path) -> None:
    model = classifier()
    model.arch = "convnet-small"
    model.save(tmp_path / "m.pt")
    with pytest.raises(KdError, match="weights or preprocessing do not fit network convnet-small"):
        models.load(tmp_path / "m.pt")
    model.arch = "os.system"
    model.save(tmp_path / "m.pt")
    with pytest.raises(KdError, match="unknown network"):
        models.load(tmp_path / "m.pt")


def preprocessing(name: str, **state: torch.Tensor) -> dict[str, Any]:
    return {"preprocess": {"name": name, "args": {}, "state": state}}


def graph(op: str, **args: Any) -> dict[str, Any]:
    nodes = [
        {"name": "odd", "op": op, "inputs": ["input"], "args": args},
        {"name": "flat", "op": "flatten", "inputs": ["odd"]},
        {"name": "ten", "op": "slice", "inputs": ["flat"], "args": {"part": 0, "of": 2, "points": [10]}},
    ]
    return {
        "arch": "graph",
        "arch_args": {"input": [1, 8, 8], "nodes": nodes, "output": "ten"},
        "state_dict": {},
    }


@pytest.mark.parametrize(
    "odd",
    [
        preprocessing("mean-std", mean=torch.zeros(7), std=torch.ones(7)),
        preprocessing("mean-image", mean=torch.zeros(1, 9, 9)),
        preprocessing("mean-image", mean=torch.zeros(2, 1, 1, 8, 8)),
        preprocessing("gcn-zca", mean=torch.zeros(64), whiten=torch.zeros(64, 3)),
        preprocessing("scale-shift", mean=torch.zeros(64, 1, 1)),
        graph("elu", alpha=[1]),
        graph("relu", negative_slope="x"),
        graph("power", power="x"),
        graph("no such operation"),
        {"arch_args": {"no such": 2}},
        {"arch_args": {"width": None}},
        {"input_size": (8, 8, 0)},
        {"input_size": (-8, 8, 1)},
        {"classes": ()},
    ],
)
def test_parts_that_do_not_fit_are_one_error_about_the_file(tmp_path: Path, odd: dict[str, Any]) -> None:
    stored = checkpoint.load(saved(tmp_path))
    checkpoint.save(tmp_path / "m.pt", replace(stored, **odd))
    with pytest.raises(KdError, match=r"m\.pt: ") as caught:
        models.load(tmp_path / "m.pt")
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 1


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.pt"
    classifier().save(target)
    before = target.read_bytes()

    def full(document: Any, handle: IO[bytes]) -> None:
        handle.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(KdError, match="cannot write"):
        classifier().save(target)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_file_that_does_not_read_back_is_not_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.save

    def cut(document: Any, handle: IO[bytes]) -> None:
        real(document, handle)
        handle.truncate(handle.tell() // 2)

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(KdError, match="cannot write"):
        classifier().save(tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_an_ordinary_readable_file(tmp_path: Path) -> None:
    classifier().save(tmp_path / "m.pt")
    assert zipfile.is_zipfile(tmp_path / "m.pt")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "m.pt").stat().st_mode & 0o777 == 0o666 & ~umask


def test_mismatched_arguments_are_refused_before_allocation(tmp_path: Path) -> None:
    stored = checkpoint.load(saved(tmp_path))
    widest = replace(stored, arch_args={"width": 64.0})
    with pytest.raises(KdError, match=r"do not fit network convnet-tiny.*: size mismatch"):
        models.from_checkpoint(widest)
    for odd in (
        {"arch_args": {"widths": [1]}},
        {"arch_args": {"classes": 3}},
        {"arch_args": {"widths": "ab"}},
        {"preprocess": {"name": "mean-std", "args": {}, "state": "x"}},
        {"preprocess": {"name": "mean-std", "args": {"channel_order": "rgb"}, "state": {}}},
    ):
        with pytest.raises(KdError):
            models.from_checkpoint(replace(stored, **odd))


def test_other_zip_archives_have_their_own_error(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("train/a/1.png", b"")
    with pytest.raises(KdError, match="is a zip archive"):
        checkpoint.load(tmp_path / "images.zip")


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    with pytest.raises(KdError, match="not an archive of weights"):
        checkpoint.load(path)


def _terabytes() -> object:
    return torch.zeros(1).expand(1 << 40)  # four bytes in the file


def _endless() -> object:
    loop: list[object] = []
    loop.append(loop)
    return loop


def _laughs() -> object:
    part: list[object] = ["ha"]
    for _ in range(60):
        part = [part, part]
    return part


def _deep() -> object:
    part: list[object] = []
    for _ in range(2000):
        part = [part]
    return part


@pytest.mark.parametrize("make", [_terabytes, _endless, _laughs, _deep])
@pytest.mark.parametrize("where", ["state_dict", "provenance"])
def test_small_file_with_huge_content_is_refused(
    tmp_path: Path, make: Callable[[], object], where: str
) -> None:
    """Also where it says what its SHA-256 is, so that all of it would be looked at."""
    path = tmp_path / "x.pt"
    document = {
        "format_version": 1,
        "arch": "lenet",
        "arch_args": {},
        "state_dict": {},
        "preprocess": {"name": "none", "args": {}, "state": {}},
        "classes": ["a", "b"],
        "input_size": [32, 32, 3],
        "provenance": {},
        "sha256": "0" * 64,
    }
    document[where] = {"w": make()}
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)  # to write it; who reads it has the ordinary one
    try:
        torch.save(document, path)
    finally:
        sys.setrecursionlimit(limit)
    started = time.monotonic()
    with pytest.raises(KdError):
        checkpoint.load(path)
    assert checkpoint.load_plain(path) is None
    assert time.monotonic() - started < 30  # not a measure of speed: without the bound it would never end


def changed(path: Path, change: Callable[[str, bytes], bytes | None], **more: bytes) -> Path:
    """The file's records, changed and written again by zipfile."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in [*entries, *((f"m/{name}", content) for name, content in more.items())]:
            if (now := change(name, content)) is not None:
                archive.writestr(name, now)
    return path


def same(name: str, content: bytes) -> bytes:
    return content


def test_a_file_that_another_zip_writer_packed_is_read(tmp_path: Path) -> None:
    assert checkpoint.load(changed(saved(tmp_path), same)).arch == "convnet-tiny"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x01t", b"J\x00\x00\x00\x10t", "more than its record holds"),
        (b"storage", b"storagf", "something other than a storage"),
        (b"FloatStorage", b"FloatStoragf", "refuses torch"),
        (b"_rebuild_tensor_v2", b"_rebuild_tensor_v3", "refuses torch._utils"),
        (b"ctorch\nFloatStorage\n", b"N", "something other than a storage"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00z", "more than its record holds"),
    ],
)
def test_the_pickle_is_checked_before_torch_reads_it(
    old: bytes, new: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"format_version": 1, "state_dict": {"w": torch.zeros(1)}}, tmp_path / "m.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch has read it"))

    def change(name: str, content: bytes) -> bytes:
        if name.endswith("data.pkl"):
            assert old in content
            content = content.replace(old, new, 1)
        return content

    with pytest.raises(KdError, match=message) as caught:
        checkpoint.load(changed(tmp_path / "m.pt", change))
    assert "m.pt" in caught.value.message


def test_ambiguous_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(tmp_path).read_bytes()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch has read it"))
    path, end = tmp_path / "x.pt", len(whole)
    for content in (
        whole[:-2] + b"\x01\x00x",
        whole[: end - 98] + b"QQ" + whole[end - 96 :],
        whole[: end - 34] + b"\x01" + whole[end - 33 :],
        whole[: end - 50] + b"\x01" + whole[end - 49 :],
        whole[: end - 58] + b"\x01" + whole[end - 57 :],
        b"x" + whole,
    ):
        path.write_bytes(content)
        with pytest.raises(
            KdError, match=r"not an archive of weights|cannot be read safely|not a kd checkpoint"
        ):
            checkpoint.load(path)
    for more in ({"constants.pkl": b"N."}, {"data.pkl": b"N."}):
        path.write_bytes(whole)
        with pytest.raises(KdError, match=r"not an archive of weights|TorchScript"):
            checkpoint.load(changed(path, same, **more))
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(KdError, match="is not a file"):
        checkpoint.load(tmp_path / "fifo.pt")


def test_parameters_and_bytes_are_read(tmp_path: Path) -> None:
    document = {
        "format_version": 1,
        "p": torch.nn.Parameter(torch.ones(2)),
        "b": b"\xff\x00",
        "o": {"step": 3},
    }
    checkpoint.save_plain(tmp_path / "x.pt", document)
    found = checkpoint.load_plain(tmp_path / "x.pt")
    assert found is not None and found["b"] == b"\xff\x00" and found["p"].tolist() == [1, 1]


def test_one_long_text_used_often_is_refused(tmp_path: Path) -> None:
    torch.save({"format_version": 1, "x": ["x" * 100_000] * 1000, "sha256": "0"}, tmp_path / "x.pt")
    with pytest.raises(KdError, match="claims to hold more"):
        checkpoint.load(tmp_path / "x.pt")
