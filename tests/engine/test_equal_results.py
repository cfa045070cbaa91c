"""Trainings and an export give the recorded bits: digests of the weights for one version of torch.

Recorded with AVX2 kernels, one thread and float32; `python -m tests.engine.test_equal_results` records them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import pytest
import torch

from tests.helpers import ROOT

RECORDED = Path(__file__).with_name("digests.json")
KERNELS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}
TEACHER = "--teacher runs/t/student.pt --epochs 3 --noisy-sigma 0.9 --dkd-beta 8"
COMMON = "--data digits --image-size 32 --batch-size 64 --seed 3 --threads 1 --precision 32 -q"
METHODS = ("ce", "logits", "noisy", "kd", "dkd", "kd+at", "crd")
COMMANDS = [
    f"train --method ce --student convnet-small --epochs 6 --name t {COMMON}",
    *(
        f"train --method {method} --student convnet-tiny --name {method} {TEACHER} {COMMON}"
        for method in METHODS
    ),
    "export runs/kd/student.pt -o exports/kd.onnx -q",
]
RUN = """
import sys
from kdcli.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["kd", *line.split()]
    try:
        main()
    except SystemExit as leave:
        assert not leave.code, line
"""


def results(folder: Path) -> dict[str, object]:
    """Digests of all trainings and of the exported graph, computed in `folder`."""
    environment = {**os.environ, **KERNELS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", RUN],
        input="\n".join(COMMANDS),
        text=True,
        cwd=folder,
        env=environment,
        check=True,
    )
    graph = onnx.load(folder / "exports/kd.onnx")
    del graph.metadata_props[:]
    return {
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "students": {name: digest(folder / f"runs/{name}/student.pt") for name in ("t", *METHODS)},
        "onnx graph": hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest(),
    }


def digest(path: Path) -> str:
    """SHA-256 over names and bytes of the weights, in order of their names."""
    state = torch.load(path, weights_only=True)["state_dict"]
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode())
        total.update(state[name].contiguous().numpy().tobytes())
    return total.hexdigest()


@pytest.mark.slow
def test_trainings_and_export_give_the_recorded_bits(tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    if torch.__version__ != recorded["torch"] or onnx.__version__ != recorded["onnx"]:
        pytest.skip(f"recorded with torch {recorded['torch']} and onnx {recorded['onnx']}")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this CPU has no AVX2")
    assert results(tmp_path) == recorded


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        RECORDED.write_text(json.dumps(results(Path(made)), indent=2) + "\n", encoding="utf-8")
