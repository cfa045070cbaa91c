"""`kd download`, with files that are on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

from kdcli.base.errors import KdError, UsageError
from kdcli.cli import download, output
from kdcli.cli.app import add_command
from kdcli.data import download as downloads
from kdcli.data.catalog import RemoteFile

CONTENTS = {"one.bin": b"first", "two.bin": b"second", "set.tar": b"third"}


@pytest.fixture(autouse=True)
def catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(name: str, folder: str) -> RemoteFile:
        sha256 = hashlib.sha256(CONTENTS[name]).hexdigest()
        return RemoteFile(name, folder, ("http://127.0.0.1:9/" + name,), sha256=sha256)

    monkeypatch.setattr(
        download,
        "DOWNLOADS",
        {
            "nin": (entry("one.bin", "weights"), entry("two.bin", "weights")),
            "cifar10": (entry("set.tar", "data"),),
        },
    )
    for name in ("quiet", "json", "debug"):
        monkeypatch.setattr(output.settings, name, False)


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name, data in CONTENTS.items():
        (folder / name).write_bytes(data)
    return folder


def kd(*arguments: str) -> Any:
    app = typer.Typer()
    app.callback()(lambda: None)
    add_command(app, download)
    return CliRunner().invoke(app, ["download", *arguments])


def test_download_all_from_folder(workplace: Path, mirror: Path) -> None:
    result = kd("--from", str(mirror))
    assert result.exit_code == 0, result.output
    assert (workplace / "weights/two.bin").read_bytes() == b"second"
    assert (workplace / "data/set.tar").read_bytes() == b"third"
    assert "weights/one.bin" in result.stdout and "next: kd convert-caffe weights/" in result.stdout
    again = kd("all", "--data-dir", "data")
    assert again.exit_code == 0 and again.stdout.count("already there") == 3


def test_download_from_file_matches_by_hash(workplace: Path, mirror: Path) -> None:
    renamed = (mirror / "two.bin").rename(mirror / "download(1)")
    assert kd("nin", "--from", str(renamed), "--weights-dir", "w").exit_code == 0
    assert [p.name for p in (workplace / "w").glob("[!.]*")] == ["two.bin"]
    result = kd("nin", "--from", str(mirror / "set.tar"))
    assert isinstance(result.exception, KdError) and "none of the files" in result.exception.message


def test_download_continues_after_failure(workplace: Path, mirror: Path) -> None:
    (mirror / "one.bin").write_bytes(b"swapped")
    result = kd("--json", "--from", str(mirror))
    assert isinstance(result.exception, KdError) and result.exception.exit_code == 1
    report = json.loads(result.stdout)
    assert [Path(file["path"]).name for file in report["files"]] == ["two.bin", "set.tar"]
    assert [file["name"] for file in report["failed"]] == ["one.bin"]
    assert not (workplace / "weights/one.bin").exists()


def test_download_data_set_into_own_folder(
    workplace: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sets have files of the same names; where they come from they need no folder."""
    files = tuple(
        RemoteFile(f"mnist/{name}", "data", (), hashlib.sha256(CONTENTS[name]).hexdigest())
        for name in ("one.bin", "two.bin")
    )
    monkeypatch.setitem(download.DOWNLOADS, "mnist", files)
    result = kd("mnist", "--from", str(mirror))
    assert result.exit_code == 0, result.output
    assert (workplace / "data/mnist/two.bin").read_bytes() == b"second"
    assert "next: kd train --method ce --data mnist" in result.stdout
    every = json.loads(kd("--dry-run", "--json").stdout)["files"]  # `all` is not all there is
    assert [file["name"] for file in every] == ["one.bin", "two.bin", "set.tar"]
    (mirror / "mnist").mkdir()
    (mirror / "one.bin").rename(mirror / "mnist/one.bin")
    (workplace / "data/mnist/one.bin").unlink()
    assert kd("mnist", "--from", str(mirror)).exit_code == 0
    assert (workplace / "data/mnist/one.bin").read_bytes() == b"first"


def test_download_dry_run(workplace: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(httpx, "Client", lambda **_: pytest.fail("a server is asked"))
    (one, two), (three,) = download.DOWNLOADS["nin"], download.DOWNLOADS["cifar10"]
    large = dataclasses.replace(one, size_bytes=5_000_000)
    third = dataclasses.replace(two, name="three.bin", size_bytes=7_000_000)
    monkeypatch.setitem(download.DOWNLOADS, "nin", (large, two, third))
    assert kd("nin", "--dry-run").exit_code == 0
    assert list(workplace.iterdir()) == [mirror]
    (workplace / "weights").mkdir()
    (workplace / "weights/two.bin").write_bytes(b"second")
    (workplace / "weights/three.bin").write_bytes(b"mine")
    (workplace / "weights/.one.bin.partial").write_bytes(bytes(1_200_000))
    before = sorted(workplace.rglob("*"))
    result = kd("--dry-run")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [" ".join(row) for row in rows[1:]] == [
        "weights/one.bin 127.0.0.1 1.2 MB there 5.0 MB",
        "weights/two.bin 127.0.0.1 there unknown",
        "weights/three.bin 127.0.0.1 another file, to replace 7.0 MB",
        "data/set.tar 127.0.0.1 to fetch unknown",
        "to fetch: 10.8 MB and 1 file of unknown size",
    ]
    report = json.loads(kd("nin", "--dry-run", "--json", "--from", str(mirror) + "/").stdout)
    assert report["dry_run"] is True
    assert [file["name"] for file in report["files"]] == ["one.bin", "two.bin"]  # what is there
    assert report["files"][0] == {
        "name": "one.bin",
        "path": "weights/one.bin",
        "status": "partial",
        "size_bytes": 5_000_000,
        "kept_bytes": 1_200_000,
        "from": [str(mirror / "one.bin")],
    }
    report = json.loads(kd("--dry-run", "--json").stdout)
    assert (report["to_fetch_bytes"], report["unknown_sizes"]) == (10_800_000, 1)
    assert [file["status"] for file in report["files"]] == ["partial", "present", "other", "absent"]
    assert report["files"][3]["from"] == list(three.urls)
    assert sorted(workplace.rglob("*")) == before


def test_download_usage_errors(workplace: Path, mirror: Path) -> None:
    result = kd("cifar")
    assert isinstance(result.exception, UsageError) and "Did you mean cifar10?" in result.exception.hint
    result = kd("nin", "--from", str(workplace))
    assert isinstance(result.exception, KdError) and "holds none of one.bin" in result.exception.message
    result = kd("nin", "--from", "absent")
    assert isinstance(result.exception, KdError) and "no such file or folder" in result.exception.message


def test_download_from_url_prefix(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def fake(remote: RemoteFile, target: Path, *, source: str | None, on_event: object) -> str:
        asked.append(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"x")
        return "downloaded"

    monkeypatch.setattr(downloads, "fetch", fake)
    assert kd("nin", "--from", "https://example.org/a/").exit_code == 0
    assert asked == ["https://example.org/a/one.bin", "https://example.org/a/two.bin"]
    assert kd("nin").exit_code == 0 and asked[2:] == [None, None]
    file = RemoteFile("mnist/x.gz", "data", (), sha256="0" * 64)
    monkeypatch.setitem(download.DOWNLOADS, "mnist", (file,))
    assert kd("mnist", "--from", "https://example.org/a/").exit_code == 0
    assert asked[4:] == ["https://example.org/a/x.gz"]
