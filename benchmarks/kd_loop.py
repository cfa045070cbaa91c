"""kd's own side: its training loop, the bare step inside it, and what the machine could do at best."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from pair import BATCH, LAMDA, LEARNING_RATE, SEED, STUDENT, TAU, Pair, Timing, kd_loss
from torch import Tensor, nn

from kdcli.base import runtime
from kdcli.base.events import OnEvent, ignore
from kdcli.engine import RunResult, fit
from kdcli.methods import TrainConfig
from kdcli.models.layers import count_macs

_MATMUL_SIZES = (512, 1024, 2048)
_MATMUL_SECONDS = 0.15  # at least, for each size


class KdLoop:
    """One epoch through `kdcli.engine.fit`, the teacher's logits in the cache.

    `seconds` are those behind `RunResult.images_per_s`, the run's own count; `wall_s` is the whole call: start-up,
    validation, checkpoints and the test besides.
    """

    key = "a"
    label = "kd, its own loop"
    note = "teacher outputs cached"

    def __init__(self, pair: Pair, scratch: Path, *, threads: int, precision: str) -> None:
        self.pair = pair
        self.scratch = scratch
        self.threads = threads
        self.precision = precision

    def train(self, cache_dir: Path, *, epochs: int, on_event: OnEvent = ignore) -> RunResult:
        """One run of `kd train --method kd --augment flip`."""
        config = TrainConfig.model_validate(  # on the CPU, whatever else there is: so are the other sides
            {
                "data": self.pair.splits.spec,
                "cache_dir": cache_dir,
                "method": "kd",
                "student": STUDENT,
                "teacher": self.pair.teacher_path,
                "tau": TAU,
                "lamda": LAMDA,
                "augment": "flip",
                "val_fraction": self.pair.val_fraction,
                "epochs": epochs,
                "batch_size": BATCH,
                "lr": LEARNING_RATE,
                "seed": SEED,
                "precision": self.precision,
                "threads": self.threads,
                "accelerator": "cpu",
                "runs_dir": self.scratch / "runs",
            }
        )
        return fit(config, self.pair.splits, on_event=on_event)

    def warm_up(self) -> None:
        """Fill the teacher cache, and settle the precision for all rounds."""
        result = self.train(self.scratch / "cache", epochs=1)
        self.precision = result.config.precision
        shutil.rmtree(result.run.path)

    def round(self) -> Timing:
        started = time.perf_counter()
        result = self.train(self.scratch / "cache", epochs=1)
        wall = time.perf_counter() - started
        shutil.rmtree(result.run.path)
        if result.teacher_passes:
            raise RuntimeError("the teacher cache should have been warm")
        images = len(self.pair.rows[0])
        return Timing(images, images / result.images_per_s, wall)


class BareStep:
    """The student's step alone, on tensors made beforehand: the speed (a) could have if all else were free.

    Channels-last, the precision of (a), fused Adam. The targets are random numbers of a teacher's size.
    """

    key = "b"
    label = "bare student step"
    note = "tensors made beforehand"

    def __init__(self, pair: Pair, *, precision: str) -> None:
        rows = pair.rows[0]
        train = pair.splits.train
        self.steps = max(1, len(rows) // BATCH)
        self.precision = precision
        self.network = pair.student().to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.network.parameters(), LEARNING_RATE, fused=True)
        random = torch.Generator().manual_seed(SEED)
        mean, std = (part[:, None, None] for part in pair.mean_std)
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, min(8, self.steps) * BATCH, BATCH):
            chosen = rows[start : start + BATCH]
            pixels = torch.from_numpy(train.images[chosen]).permute(0, 3, 1, 2).float() / 255
            targets = 19 + 9 * torch.randn(len(chosen), len(train.classes), generator=random)
            self.batches.append(((pixels - mean) / std, targets, torch.from_numpy(train.labels[chosen])))

    def step(self, number: int) -> int:
        """One step; returns its number of images."""
        pixels, targets, labels = self.batches[number % len(self.batches)]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.network(pixels)
        kd_loss(logits.float(), targets, labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return len(labels)

    def warm_up(self) -> None:
        for number in range(2):
            self.step(number)

    def round(self) -> Timing:
        started = time.perf_counter()
        images = sum(self.step(number) for number in range(self.steps))
        return Timing(images, time.perf_counter() - started)

    def profile(self, steps: int = 5, lines: int = 15) -> str:
        """torch.profiler's table of the operators with the most CPU time of their own."""
        self.warm_up()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            for number in range(steps):
                self.step(number)
        table: str = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=lines)
        return table


def training_flops(pair: Pair) -> int:
    """Floating point operations to train the student on one image.

    Forward 2 a multiply-accumulate, backward twice that, less the first layer's gradient for its input, which nobody
    asks for. Convolutions and linear layers only.
    """
    network = pair.student()
    height, width, channels = pair.splits.train.input_size
    prepared = torch.zeros(1, channels, height, width)
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    return 2 * (3 * count_macs(network, prepared) - count_macs(first, prepared))


def matmul_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest of several square matrix products: what torch gets out of this machine."""
    best = 0.0
    for size in _MATMUL_SIZES:
        left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
        out = torch.mm(left, right)
        until = time.perf_counter() + _MATMUL_SECONDS
        repeats = 0
        while repeats < 2 or time.perf_counter() < until:
            started = time.perf_counter()
            torch.mm(left, right, out=out)
            best = max(best, 2 * size**3 / (time.perf_counter() - started) / 1e9)
            repeats += 1
    return best


def set_threads(threads: int) -> int:
    """The same number of threads for every side, whatever the one before has left; returns it."""
    runtime.set_threads(threads)
    return torch.get_num_threads()
