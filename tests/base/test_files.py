"""Files that survive a power cut, and untrusted documents."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kdcli.base import files, units
from kdcli.base.errors import KdError
from tests.helpers import disk_calls


def test_a_file_is_synced_before_its_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = disk_calls(monkeypatch)
    files.write_text(tmp_path / "x.json", "{}")
    (first, temporary), *rest = calls
    assert first == "sync" and temporary.startswith(".x.json.")
    assert rest == [("rename", "x.json"), ("sync", tmp_path.name)]


def test_a_folder_is_synced_before_its_rename_and_its_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = files.scratch_folder(tmp_path)
    for name in ("a", "b"):
        (scratch / name).write_text(name)
    calls = disk_calls(monkeypatch)
    files.publish(scratch, tmp_path / "made")
    assert sorted(calls[:2]) == [("sync", "a"), ("sync", "b")]
    assert calls[2:] == [("sync", scratch.name), ("rename", "made"), ("sync", tmp_path.name)]
    assert (tmp_path / "made/b").read_text() == "b"


def test_written_json_is_read_as_it_was(tmp_path: Path) -> None:
    """Lists of plain values are put in one line; brackets in texts are no ends of lists."""
    value = {"names": ["a ]", " x [ ] y", "{ b }"], "empty": [], "rows": [[1, 2.5], ["c"]]}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_document(tmp_path / "x.json") == value
    files.write_json(tmp_path / "x.json", {"numbers": [1, 2]})
    assert '"numbers": [1, 2]' in (tmp_path / "x.json").read_text()


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999.4, "999"), (999.6, "1 k"), (999_499, "999 k"), (999_500, "1 M"), (3.5e9, "3.5 G")],
)
def test_counts_have_three_digits(number: float, text: str) -> None:
    assert units.count(number) == text


DEEP = {
    "values.toml": "a=" + 300 * "[" + 300 * "]",
    "stack.toml": "a=" + 9000 * "[" + 9000 * "]",
    "keys.toml": 3000 * "a." + "a=1",
    "table.toml": f"[{70 * 'a.'}a]",
    "values.json": 300 * '{"a":' + "1" + 300 * "}",
    "stack.json": 90_000 * "[" + 90_000 * "]",
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_documents_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(DEEP[name])
    with pytest.raises(KdError, match="nested more than 64 deep"):
        files.read_document(tmp_path / name)


def test_documents_at_the_limit_are_read(tmp_path: Path) -> None:
    nested: dict[str, Any] = {"a": 1}
    for _ in range(62):
        nested = {"a": nested}
    for name, text in {"a.json": json.dumps(nested), "a.toml": f"{63 * 'a.'}".rstrip(".") + " = 1"}.items():
        (tmp_path / name).write_text(text)
        assert files.read_document(tmp_path / name) == nested


@pytest.mark.parametrize("name", ["a.json", "a.toml"])
def test_documents_of_other_kinds_are_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(KdError, match=f"cannot read .*{name}: No such file"):
        files.read_document(path)
    os.mkfifo(path)
    with pytest.raises(KdError, match=f"cannot read .*{name}: not a regular file"):
        files.read_document(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(KdError, match="not a regular file"):
        files.read_document(path)
    path.unlink()
    for content in (b"\xff\xfe", b"{", b"a = [", b"1", b"\0"):
        path.write_bytes(content)
        with pytest.raises(KdError, match=f"cannot read .*{name}") as caught:
            files.read_document(path)
        assert "\n" not in caught.value.message
    os.truncate(path, 1 << 40)
    with pytest.raises(KdError, match="1,099,511,627,776 bytes, more than"):
        files.read_document(path)


def test_only_a_regular_file_of_the_recorded_hash_is_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    path.write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert files.is_unchanged(path, sha256)
    assert not files.is_unchanged(path, sha256[::-1])
    os.mkfifo(tmp_path / "pipe")
    os.truncate(path, 1 << 40)
    for other in (path, tmp_path / "pipe", tmp_path, Path("/dev/zero"), Path("x" * 5000)):
        assert not files.is_unchanged(other, sha256)
