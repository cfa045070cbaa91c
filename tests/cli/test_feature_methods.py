"""Methods that read features, as whole processes: each imports what a user's command imports."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.helpers import ENVIRONMENT
from tests.helpers import image_folder

QUICK = "--data images --student convnet-tiny --epochs 1 --batch-size 32 --threads 1 --precision 32 -q"


def kd(words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kdcli", *shlex.split(words)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_methods_of_features_run_as_whole_processes(workplace: Path) -> None:
    image_folder(Path("images"))
    kd(f"train --method ce {QUICK} --name teacher")
    teacher = "--teacher runs/teacher/student.pt"
    kd(f"compare --methods ce,fitnet --seeds 0,1 {QUICK} {teacher} --name c")
    compared = json.loads(Path("comparisons/c/comparison.json").read_text())
    assert [row["method"] for row in compared["standings"]] == ["ce", "fitnet"]
    assert [row["failed"] for row in compared["standings"]] == [0, 0]
    kd(f"train --method at --generations 2 {QUICK} {teacher} --name at")
    for name in ("at-generation-1", "at"):
        assert json.loads(Path(f"runs/{name}/result.json").read_text())["method"] == "at"
