"""Which precision a training step is faster in, here."""

import copy
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LARGEST_BATCH = 16  # on a CPU: enough to tell the two apart, and a fraction of a second
_HOPELESS_MS = 700.0  # for a first step: it would cost too much to measure more of them
_LOST = 1.5  # times the other's best: no more steps will turn that into the 0.8 that bf16 needs


def choose_precision(
    wanted: str, network: nn.Module, example: Tensor, classes: int, budget_s: float = 1.0
) -> tuple[str, dict[str, float]]:
    """Resolve `auto` to `32` or `bf16` by timing training steps of a copy of the network.

    Args:
        wanted: `auto`, `32` or `bf16`.
        example: a prepared batch (B, C, H, W), on the network's device.
        classes: number of logits.
        budget_s: the measurement ends after about this many seconds.

    Returns:
        The precision, and the measured step times in ms (empty if nothing was measured).
    """
    if wanted != "auto":
        return wanted, {}
    device = example.device.type
    if device == "cpu":
        example = example[:_LARGEST_BATCH]
    labels = torch.zeros(len(example), dtype=torch.long, device=example.device) % classes
    best: dict[str, float] = {}
    with torch.random.fork_rng(enabled=device == "cpu", devices=[]):
        trial = copy.deepcopy(network).train()

        def step_ms(precision: str) -> float:
            begin = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                logits = trial(example)
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            loss.item()  # waits for the device
            return (time.perf_counter() - begin) * 1e3

        started = time.perf_counter()
        step_ms("32")  # the first step makes what is made once
        best = {"32": step_ms("32"), "bf16": step_ms("bf16")}
        if best["bf16"] < _HOPELESS_MS:
            best["bf16"] = step_ms("bf16")
            for _ in range(6):
                if time.perf_counter() - started > budget_s or best["bf16"] > _LOST * best["32"]:
                    break
                for precision in best:  # interleaved
                    best[precision] = min(best[precision], step_ms(precision))
    # bf16 costs digits, so it has to earn them
    return ("bf16" if best["bf16"] < 0.8 * best["32"] else "32"), best
