"""What a student's file says of its teachers: as any file's words, it may say anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def teachers_of(provenance: Mapping[str, Any]) -> list[tuple[Path, str]]:
    """Path and SHA-256 of each teacher that a student learned from; none where there was none, or it is not told."""
    recorded = provenance.get("teacher")
    if not isinstance(recorded, Mapping):
        return []
    several = recorded.get("teachers")
    entries = several if isinstance(several, list) else [recorded]
    return [
        (Path(entry["path"]), str(entry.get("sha256")))
        for entry in entries
        if isinstance(entry, Mapping) and isinstance(entry.get("path"), str) and "\0" not in entry["path"]
    ]
