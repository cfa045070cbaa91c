"""The machine: cores, threads, precision, signals, and a record of all this."""

from __future__ import annotations

import copy
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli import __version__


def available_cores() -> int:
    """Cores this process may use: CPU affinity and the cgroup's quota, at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity call
        cores = os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(cores, int(quota)) if quota else cores)


def _cgroup_quota(root: Path) -> float | None:
    """Cores' worth of CPU time the cgroup grants (v2, then v1); None if unlimited or unknown."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return None if limit == "max" else max(1.0, int(limit) / int(period))
    except (OSError, ValueError):
        pass
    try:
        micros = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period_micros = int((root / "cpu/cpu.cfs_period_us").read_text())
        return max(1.0, micros / period_micros) if micros > 0 else None
    except (OSError, ValueError):
        return None


def set_threads(threads: int = 0) -> int:
    """Let torch use `threads` CPU threads (0: all available cores); returns the number."""
    count = threads or available_cores()
    torch.set_num_threads(count)
    return count


def choose_precision(
    wanted: str, network: nn.Module, example: Tensor, classes: int, budget_s: float = 1.5
) -> tuple[str, dict[str, float]]:
    """Resolve `auto` to `32` or `bf16` by timing training steps of a copy of the network.

    Args:
        wanted: `auto`, `32` or `bf16`.
        example: a prepared batch (B, C, H, W).
        classes: number of logits.
        budget_s: the measurement ends after about this many seconds.

    Returns:
        The precision, and the measured step times in ms (empty if nothing was measured).
    """
    if wanted != "auto":
        return wanted, {}
    best: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        trial = copy.deepcopy(network).train()
        labels = torch.zeros(len(example), dtype=torch.long) % classes
        started = time.perf_counter()
        rounds = 0
        while rounds < 2 or (time.perf_counter() - started < budget_s and rounds < 6):
            for precision in ("32", "bf16"):  # interleaved, the first round warms up
                begin = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    logits = trial(example)
                F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
                elapsed_ms = (time.perf_counter() - begin) * 1e3
                if rounds:
                    best[precision] = min(best.get(precision, elapsed_ms), elapsed_ms)
            rounds += 1
    # bf16 costs digits, so it has to earn them
    return ("bf16" if best["bf16"] < 0.8 * best["32"] else "32"), best


class StopFlag:
    """Set by the first SIGINT or SIGTERM; long loops look at it between steps."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + signal number: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one ends the process at once."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # handlers can only be set in the main thread
        return

    def note(number: int, frame: FrameType | None) -> None:
        if flag.signal is not None:
            os._exit(128 + number)
        flag.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cpu_info() -> dict[str, Any]:
    """CPU model name and the instruction-set flags that decide speed."""
    model, flags = platform.processor() or platform.machine(), []
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                wanted = ("avx", "amx", "vnni", "bf16", "asimd", "sve", "i8mm")
                flags = [flag for flag in value.split() if any(part in flag for part in wanted)]
                break
    except OSError:
        pass
    return {"model": model, "flags": flags, "cores": available_cores()}


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code's input: versions, CPU, threads, load."""
    packages = ("torch", "torchvision", "onnx", "onnxruntime", "numpy", "scikit-learn")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "kd_version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in packages},
        "cpu": cpu_info(),
        "threads": torch.get_num_threads(),
        "load_average_1min": load,
    }
