"""Whether `--compile` pays: the bare step of several students, compiled and not, in interleaved rounds.

python benchmarks/compile_step.py [--students lenet,nin,convnet-large] [--rounds 7]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from kdcli import models
from kdcli.base import runtime

BATCH = 256


def make_step(network: torch.nn.Module, *, compiled: bool) -> Callable[[], None]:
    """Forward, cross-entropy, backward and fused Adam on images made beforehand."""
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))
    optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=True)
    run = torch.compile(network) if compiled else network

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(run(images), labels).backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main() -> None:
    """Print a row for each student."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--students", default="lenet,nin,convnet-large")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    runtime.set_threads(0)
    runtime.keep_freed_memory()
    print("| student | step, ms | compiled, ms | eager / compiled, median (min – max) | first step, s | n |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in arguments.students.split(","):
        torch.manual_seed(0)
        network = models.build(name, classes=10, input_size=(32, 32, 3)).to(memory_format=torch.channels_last)
        eager, compiled = (make_step(copy.deepcopy(network), compiled=wanted) for wanted in (False, True))
        first = seconds(compiled)
        for step in (eager, compiled):
            step()
        pairs = [(seconds(eager), seconds(compiled)) for _ in range(arguments.rounds)]
        ratios = sorted(one / two for one, two in pairs)
        medians = [1e3 * statistics.median(pair[side] for pair in pairs) for side in (0, 1)]
        print(
            f"| {name} | {medians[0]:.0f} | {medians[1]:.0f} | {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} – {ratios[-1]:.2f}) | {first:.0f} | {len(pairs)} |"
        )


if __name__ == "__main__":
    main()
