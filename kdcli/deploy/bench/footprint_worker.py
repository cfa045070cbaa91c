"""Script that loads and runs one model, and prints its times and memory as JSON.

It is run as a file, not as a module of kdcli: an ONNX file is measured with onnxruntime and NumPy alone, as it will
be deployed. Its argument is a JSON object with `path`, `engine`, `threads`, `input` (shape of one image's input),
`dtype`, `batch`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def memory() -> tuple[int | None, int | None]:
    """Current and peak memory in bytes. Not from rusage, which in a child includes the parent's peak."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None, None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return tuple(1024 * int(fields[key].split()[0]) for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Load the model, run one image, then a batch; times in ms, memory in bytes."""
    begin = time.perf_counter()
    import numpy as np

    shape = settings["input"]
    runner: Callable[[int], Any]
    if settings["engine"] == "onnxruntime":
        import onnxruntime as ort

        imported, before = time.perf_counter(), memory()[0]
        options = ort.SessionOptions()
        options.intra_op_num_threads = settings["threads"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        session = ort.InferenceSession(settings["path"], options, providers=["CPUExecutionProvider"])
        [model_input] = session.get_inputs()
        fixed = model_input.shape[0] if isinstance(model_input.shape[0], int) else None

        def runner(count: int) -> Any:
            return session.run(
                None, {model_input.name: np.zeros((fixed or count, *shape), settings["dtype"])}
            )
    else:
        import torch

        from kdcli import models

        imported, before = time.perf_counter(), memory()[0]
        torch.set_num_threads(settings["threads"])
        network: Any = (
            models.load(Path(settings["path"])).network.eval().to(memory_format=torch.channels_last)
        )
        if settings["engine"] == "compiled":
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
    peak = memory()[1]
    runner(settings["batch"])
    return {
        "import_ms": 1e3 * (imported - begin),
        "load_ms": 1e3 * (loaded - imported),
        "first_ms": 1e3 * (answered - loaded),
        "base_rss_bytes": before,
        "peak_rss_bytes": peak,
        "peak_rss_batch_bytes": memory()[1],
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))))
