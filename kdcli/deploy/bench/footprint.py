"""Memory and start-up time of a model in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

WORKER = Path(__file__).with_name("footprint_worker.py")
_LIMIT_S = 600


@dataclass(frozen=True)
class Footprint:
    """Memory and start-up of one process; None where it could not be measured."""

    import_ms: float | None = None  # import of the libraries
    load_ms: float | None = None  # from the file to a callable model
    first_ms: float | None = None  # its first output for one image
    base_rss_bytes: int | None = None  # memory with the libraries alone
    peak_rss_bytes: int | None = None  # peak memory, running one image at a time
    peak_rss_batch_bytes: int | None = None  # peak memory, after the largest batch too
    problem: str | None = None  # why there are no figures


def measure_footprint(
    model: Path | bytes, engine: str, threads: int, shape: tuple[int, ...], batch: int, dtype: str = "float32"
) -> Footprint:
    """Load and run a model in a fresh process.

    Args:
        model: a `.pt` file for torch, an ONNX file's content for onnxruntime.
        shape: of one image as the network takes it.
        batch: the largest batch.
        dtype: NumPy's name of the input's type.
    """
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
        path = Path(folder) / "model.onnx"
        if isinstance(model, bytes):
            path.write_bytes(model)
        else:
            path = model.resolve()
        settings = {
            "path": str(path),
            "engine": engine,
            "threads": threads,
            "input": list(shape),
            "dtype": dtype,
            "batch": batch,
        }
        # -P: modules in the worker's folder cannot shadow others
        command = [sys.executable, "-P", str(WORKER), json.dumps(settings)]
        try:
            done = subprocess.run(  # noqa: S603  our own file; its argument is data
                command, capture_output=True, text=True, timeout=_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return Footprint(problem=f"it took more than {_LIMIT_S} s")
    if done.returncode == 0:
        return Footprint(**json.loads(done.stdout))
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return Footprint(problem=lines[-1][:200])
