"""Fixtures for tests of data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kdcli.data import load
from kdcli.data.images import Splits


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Splits]:
    """`load` of a path, with a cache folder of the test's own."""
    return lambda path, **options: load(str(path), **{"cache_dir": tmp_path / "cache", **options})
