"""Commands in processes of their own: what is imported lazily must be there when it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

WORDS = "--data digits --student convnet-tiny --epochs 1 --batch-size 256 --precision 32 --threads 1"
RUN = WORDS.split()


def kd(folder: Path, *words: str) -> dict[str, object]:
    """Run `kd … --json` in a new process; it must succeed."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from kdcli.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--json"], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


@pytest.mark.slow
def test_a_chain_with_a_feature_method_and_a_comparison(tmp_path: Path) -> None:
    kd(tmp_path, "train", *RUN, "--method", "ce", "--name", "teacher")
    teacher = ["--teacher", "runs/teacher/student.pt"]
    trained = kd(tmp_path, "train", *RUN, *teacher, "--method", "at", "--generations", "2")
    assert len(trained["chain"]) == 1  # type: ignore[arg-type]
    kd(tmp_path, "compare", *RUN, *teacher, "--methods", "ce,kd", "--seeds", "2")  # a failed run: exit code 1
