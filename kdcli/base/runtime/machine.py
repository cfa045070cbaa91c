"""Cores, threads, memory and precision of this machine; the environment record of measurements."""

import copy
import ctypes
import os
import platform
import sys
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from joblib import cpu_count  # that of the container
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli import __version__
from kdcli.base.timing import interleaved, seconds_of

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_LARGEST_BATCH = 16  # on a CPU: enough to tell the two apart, and a fraction of a second
_ROUNDS, _BUDGET_S = 6, 0.5
_HOPELESS_S = 0.7  # for a first step of bf16: it would cost too much to measure more of them


def set_threads(threads: int = 0, processes: int = 1) -> int:
    """Set and return torch's CPU threads; 0: all available cores, divided among `processes`."""
    count = threads or max(1, cpu_count() // processes)
    torch.set_num_threads(count)
    return count


def keep_freed_memory() -> None:
    """Let glibc keep the memory that this process frees, instead of mapping and zeroing pages anew in each step.

    That is a sixth of a LeNet's step. Results do not change.
    """
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 30)
        ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def choose_precision(wanted: str, network: nn.Module, example: Tensor) -> tuple[str, dict[str, float]]:
    """Resolve `auto` to `32` or `bf16` by timing training steps of a copy of the network; with the step times in ms.

    `example` is a prepared batch (B, C, H, W), on the network's device. No times if nothing was measured.
    """
    if wanted != "auto":
        return wanted, {}
    device = example.device.type
    if device == "cpu":
        example = example[:_LARGEST_BATCH]
    labels = torch.zeros(len(example), dtype=torch.long, device=example.device)
    with torch.random.fork_rng(enabled=device == "cpu", devices=[]):
        trial = copy.deepcopy(network).train()

        def step(precision: str) -> None:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                logits = trial(example)
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            loss.item()  # waits for the device

        calls = [partial(step, "32"), partial(step, "bf16")]
        calls[0]()  # one-time initialisation
        seconds = [seconds_of(call) for call in calls]
        if seconds[1] < _HOPELESS_S:
            measured = interleaved(calls, rounds=_ROUNDS, settle=False, budget_s=_BUDGET_S)
            seconds = measured.min(axis=(0, 2)).tolist()
    # bf16 loses digits: only for a clear gain
    best = {"32": seconds[0] * 1e3, "bf16": seconds[1] * 1e3}
    return ("bf16" if best["bf16"] < 0.8 * best["32"] else "32"), best


def cpu_info() -> dict[str, Any]:
    """CPU model, cores, and the instruction-set flags relevant to speed."""
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
    return {"model": model, "flags": flags, "cores": cpu_count()}


def environment() -> dict[str, Any]:
    """Environment of a measurement or training: versions, CPU, threads, load."""
    packages = ("torch", "torchvision", "onnx", "onnxruntime", "numpy", "scikit-learn")
    versions = {name: metadata.version(name) for name in packages}
    with suppress(metadata.PackageNotFoundError):  # an extra
        versions["timm"] = metadata.version("timm")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "kd_version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "cpu": {**cpu_info(), "governor": governor.read_text().strip() if governor.exists() else None},
        "threads": torch.get_num_threads(),
        "load_average_1min": load,
    }
