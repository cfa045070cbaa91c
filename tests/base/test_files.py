"""Files that survive a power cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcli.base import files
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
