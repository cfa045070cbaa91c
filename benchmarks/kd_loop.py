"""kd's sides: its training loop, and the bare step inside it; with the arithmetic and the machine's peak."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from pair import BATCH, LAMDA, LEARNING_RATE, SEED, TAU, Pair, kd_loss
from rounds import Timing
from torch import Tensor, nn

from kdcli.base.config import make
from kdcli.data import Splits
from kdcli.engine import fit
from kdcli.methods import TrainConfig
from kdcli.models.layers import count_network

_MATMUL_SIZES = (512, 1024, 2048)
_MATMUL_SECONDS = 0.15  # at least, for each size


def config_of(pair: Pair, scratch: Path, *, threads: int, precision: str) -> TrainConfig:
    """`kd train --method kd --augment flip` for one epoch, on the CPU as the other sides are."""
    return make(
        TrainConfig,
        {
            "data": pair.splits.spec,
            "cache_dir": scratch / "cache",
            "student": pair.network,
            "teacher": pair.teacher_path,
            "tau": TAU,
            "lamda": LAMDA,
            "augment": "flip",
            "val_fraction": pair.val_fraction,
            "epochs": 1,
            "batch_size": BATCH,
            "lr": LEARNING_RATE,
            "seed": SEED,
            "precision": precision,
            "threads": threads,
            "accelerator": "cpu",
            "runs_dir": scratch / "runs",
        },
    )


class KdLoop:
    """A run through `kdcli.engine.fit`, the teacher's logits in the cache.

    `seconds` are those behind `RunResult.images_per_s`, the run's own count; `wall_s` is the whole call: start-up,
    validation, checkpoints and the test besides.
    """

    key = "a"
    label = "kd, its own loop"
    note = "teacher outputs cached"
    keeps_memory = True

    def __init__(self, config: TrainConfig, splits: Splits) -> None:
        self.config, self.splits = config, splits

    def warm_up(self) -> None:
        """Fill the teacher cache, and settle the precision for all rounds."""
        result = fit(self.config, self.splits)
        self.config = self.config.model_copy(update={"precision": result.config.precision})
        shutil.rmtree(result.run.path)

    def round(self) -> Timing:
        started = time.perf_counter()
        result = fit(self.config, self.splits)
        wall = time.perf_counter() - started
        shutil.rmtree(result.run.path)
        if result.teacher_passes:
            raise RuntimeError("the teacher cache should have been warm")
        return Timing(round(result.images_per_s * result.seconds), result.seconds, wall)


class BareStep:
    """The student's step alone, on tensors made beforehand: the speed (a) could have if all else were free.

    Channels-last, the precision of (a), fused Adam. The targets are random numbers of a teacher's size.
    """

    note = "tensors made beforehand"
    keeps_memory = True

    def __init__(self, pair: Pair, *, precision: str, compiled: bool = False) -> None:
        self.key = "e" if compiled else "b"
        self.label = "bare student step, compiled" if compiled else "bare student step"
        rows = pair.rows[0]
        train = pair.splits.train
        self.steps = max(1, len(rows) // BATCH)
        self.precision = precision
        self.network = pair.student().to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.network.parameters(), LEARNING_RATE, fused=True)
        self.forward = torch.compile(self.network) if compiled else self.network
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
            logits = self.forward(pixels)
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

    Forward 2 a multiply-accumulate, backward twice that, less the gradient for the first layer's input, which is not
    computed. Convolutions and linear layers only.
    """
    network = pair.student()
    height, width, channels = pair.splits.train.input_size
    prepared = torch.zeros(1, channels, height, width)
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    whole, stem = (count_network(each, prepared).macs for each in (network, first))
    assert whole is not None and stem is not None
    return 2 * (3 * whole - stem)


def matmul_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest of several square matrix products in torch."""
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
