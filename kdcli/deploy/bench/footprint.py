"""Memory and start-up time of a model in a separate process.

The process runs this file as a script, not as a module of kdcli: an ONNX file is measured with onnxruntime and NumPy
alone, as it will be deployed.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LIMIT_S = 600


@dataclass(frozen=True)
class Footprint:
    """Memory and start-up of one process; memory is None where the system does not report it."""

    import_ms: float  # import of the libraries
    load_ms: float  # from the file to a callable model
    first_ms: float  # its first output for one image
    base_rss_bytes: int | None  # memory with the libraries alone
    peak_rss_bytes: int | None  # peak memory, running one image at a time
    peak_rss_batch_bytes: int | None  # peak memory, after the largest batch too


def measure_footprint(
    model: Path | bytes, engine: str, threads: int, shape: tuple[int, ...], batch: int, dtype: str = "float32"
) -> Footprint:
    """Load and run a `.pt` file, or an ONNX file's content, in a fresh process; a RuntimeError if that fails.

    `shape` is that of one image as the network takes it, `batch` the largest batch, `dtype` of the input.
    """
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
        path = Path(folder) / "model.onnx"
        if isinstance(model, bytes):
            path.write_bytes(model)
        else:
            path = model.resolve()
        settings = [str(path), engine, threads, shape, batch, dtype]  # arguments of `_load_and_run`
        # -P: modules in this folder cannot shadow others
        command = [sys.executable, "-P", __file__, json.dumps(settings)]
        try:
            done = subprocess.run(  # noqa: S603  our own file; its argument is data
                command, capture_output=True, text=True, timeout=_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"it took more than {_LIMIT_S} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("hint: ")]
        raise RuntimeError([f"exit code {done.returncode}", *lines][-1][:200])
    return Footprint(**json.loads(done.stdout))


def _memory() -> tuple[int | None, int | None]:
    """Current and peak memory in bytes. Not from rusage, which in a child includes the parent's peak."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None, None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return tuple(1024 * int(fields[key].split()[0]) for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def _load_and_run(
    path: str, engine: str, threads: int, shape: list[int], batch: int, dtype: str
) -> dict[str, Any]:
    """Load the model, run one image, then a batch; times in ms, memory in bytes."""
    begin = time.perf_counter()
    import numpy as np

    runner: Callable[[int], Any]
    if engine == "onnxruntime":
        import onnxruntime as ort

        imported, before = time.perf_counter(), _memory()[0]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        [model_input] = session.get_inputs()
        fixed = model_input.shape[0] if isinstance(model_input.shape[0], int) else None

        def runner(count: int) -> Any:
            return session.run(None, {model_input.name: np.zeros((fixed or count, *shape), dtype)})
    else:
        import torch

        from kdcli import models

        imported, before = time.perf_counter(), _memory()[0]
        torch.set_num_threads(threads)
        network: Any = models.load(Path(path)).network.to(memory_format=torch.channels_last)
        if engine == "compiled":
            network = torch.compile(network, dynamic=False)

        def runner(count: int) -> Any:
            with torch.inference_mode():
                prepared = torch.zeros(count, *shape).contiguous(memory_format=torch.channels_last)
                return network(prepared)

    loaded = time.perf_counter()
    runner(1)
    answered = time.perf_counter()
    for _ in range(3):
        runner(1)
    peak = _memory()[1]
    runner(batch)
    return {
        "import_ms": 1e3 * (imported - begin),
        "load_ms": 1e3 * (loaded - imported),
        "first_ms": 1e3 * (answered - loaded),
        "base_rss_bytes": before,
        "peak_rss_bytes": peak,
        "peak_rss_batch_bytes": _memory()[1],
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_load_and_run(*json.loads(sys.argv[1]))))
