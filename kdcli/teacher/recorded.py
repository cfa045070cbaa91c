"""Teachers in a student's provenance, which may be of any origin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def teachers_of(provenance: Mapping[str, Any]) -> list[tuple[Path, str]]:
    """Path and SHA-256 of each recorded teacher; empty without one, or where the entry is malformed."""
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
