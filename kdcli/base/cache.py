"""Folders of the cache, named by all that their content depends on."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """128 bits of the SHA-256 over the recipe as JSON with sorted keys, hexadecimal."""
    text = json.dumps(recipe, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def cache_folder(cache_dir: Path, kind: str, recipe: Mapping[str, Any]) -> Path:
    """`<cache_dir>/<kind>/<fingerprint of the recipe>`; not created."""
    return cache_dir / kind / fingerprint(recipe)
