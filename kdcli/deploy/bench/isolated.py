"""A model in a process of its own: memory and start-up, which a process that holds the others cannot tell."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
_LIMIT_S = 600


@dataclass(frozen=True)
class Alone:
    """What one process took; None where it could not be measured.

    Attributes:
        import_ms: the libraries that run it.
        load_ms: from the file to a model that can be called.
        first_ms: its first answer to one image.
        base_rss_bytes: of the libraries.
        peak_rss_bytes: the most, running one image at a time.
        peak_rss_batch_bytes: the most, with the largest batch too.
        problem: why there are no figures.
    """

    import_ms: float | None = None
    load_ms: float | None = None
    first_ms: float | None = None
    base_rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    peak_rss_batch_bytes: int | None = None
    problem: str | None = None


def alone(path: Path, engine: str, threads: int, shape: tuple[int, ...], dtype: str, batch: int) -> Alone:
    """Load and run a model in a fresh process.

    Args:
        path: `.pt` for torch, an ONNX file for onnxruntime.
        shape: of one image as the network takes it.
        dtype: NumPy's name of its type.
    """
    asked = {
        "path": str(path.resolve()),
        "engine": engine,
        "threads": threads,
        "input": list(shape),
        "dtype": dtype,
        "batch": batch,
    }
    # -P: the worker's folder is not searched, so that no module there can take another's place
    command = [sys.executable, "-P", str(WORKER), json.dumps(asked)]
    try:
        done = subprocess.run(  # noqa: S603  our own file; what it is given is data
            command, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
        if done.returncode == 0:
            return Alone(**json.loads(done.stdout))
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Alone(problem=lines[-1][:200])
    except subprocess.TimeoutExpired:
        return Alone(problem=f"it took more than {_LIMIT_S} s")
    except (OSError, ValueError) as error:
        return Alone(problem=str(error)[:200])
