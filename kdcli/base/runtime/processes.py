"""Processes of a run: devices, distributed context, and the signals that stop it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from joblib import cpu_count
from torch import Tensor, nn

from kdcli.base.errors import KdError, UsageError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")
_CLOSE_TIMEOUT_S = 20.0
_TRANSPORT_ERRORS = ("gloo", "nccl", "connection", "socket", "timed out")


def choose_device(accelerator: str) -> str:
    """Resolve `auto` to the first available of `cuda`, `mps` and `cpu`; UsageError where the wanted one is not."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        return next(name for name, available in present.items() if available)
    if not present[accelerator]:
        raise UsageError(
            f"--accelerator {accelerator}: not available on this machine or in this build of torch",
            "Omit it: auto takes the best available.",
        )
    return accelerator


@dataclass(frozen=True)
class World:
    """Distributed context of this process: device, global rank, number of processes in all and on this host.

    Rank 0 writes files and reports. A no-op with one process.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_size: int = 1
    fabric: Fabric | None = None

    @classmethod
    def alone(cls, accelerator: str = "cpu") -> World:
        return cls(torch.device(choose_device(accelerator)))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, samples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], float]:
        """This process's part of a batch, and the weight of its mean loss.

        The mean over processes of weight · mean loss is the mean over the whole batch. A batch smaller than the
        number of processes is not split: each process computes all of it.
        """
        if self.size == 1 or len(samples) < self.size:
            return samples, 1.0
        mine = np.array_split(samples, self.size)[self.rank]
        return mine, len(mine) * self.size / len(samples)

    def gather(self, values: Tensor, count: int) -> Tensor:
        """The whole batch (`count`, …) from the parts (B, …) that `share` made in each process; differentiable."""
        if self.size == 1 or count < self.size:
            return values
        end = sum(len(part) for part in np.array_split(np.arange(count), self.size)[: self.rank + 1])
        whole = values.new_zeros(count, *values.shape[1:])
        whole[end - len(values) : end] = values
        return sum_over_processes(whole)

    def mean(self, values: Tensor) -> Tensor:
        if self.fabric is None:
            return values
        result = self.fabric.all_reduce(values, reduce_op="mean")
        assert isinstance(result, Tensor)
        return result

    def rows(self, values: Tensor) -> list[list[float]]:
        """The values (K,) of all processes, one row for each."""
        if self.fabric is None:
            return [values.tolist()]
        table = values.new_zeros(self.size, len(values))
        table[self.rank] = values
        torch.distributed.all_reduce(table)
        return table.tolist()

    def all_max(self, *flags: int) -> tuple[int, ...]:
        """The maximum of each flag over all processes."""
        if self.fabric is None:
            return flags
        shared = torch.tensor(flags, dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        return tuple(shared.tolist())

    def from_first(self, make: Callable[[], T]) -> T:
        """The result of a call that rank 0 makes alone, in all processes."""
        return self.broadcast(cast("T", make() if self.first else None))

    def broadcast(self, value: T) -> T:
        """The value of rank 0."""
        return value if self.fabric is None else self.fabric.broadcast(value)

    def barrier(self) -> None:
        if self.fabric is not None:
            self.fabric.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Run the block on rank 0, then on the other ranks, which can read the files it wrote."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()

    def replicate(self, network: nn.Module) -> nn.Module:
        """The network, with gradients averaged over processes in the backward pass."""
        return network if self.fabric is None else self.fabric.setup_module(network, move_to_device=False)

    def backward(self, loss: Tensor) -> None:
        if self.fabric is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self.fabric.backward(loss)

    @contextmanager
    def report_lost_process(self) -> Iterator[None]:
        """Turn a transport error caused by the end of another process into a KdError."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not any(mark in str(error).lower() for mark in _TRANSPORT_ERRORS):
                raise
            raise KdError(
                f"process {self.rank} of {self.size}: another process of this run has ended",
                "See its error message, then continue the run: kd train --resume",
            ) from error

    def close(self, *, failed: bool = False) -> None:
        """Wait for the processes started by this one; terminate them first if this one has failed."""
        if self.fabric is None:
            return
        launcher = getattr(self.fabric.strategy, "launcher", None)
        for process in getattr(launcher, "procs", []):
            if failed:
                process.terminate()
            try:
                process.wait(timeout=_CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


class _Sum(torch.autograd.Function):
    """Sum over all processes; the gradient is the sum of all gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of a tensor over all processes; differentiable."""
    return _Sum.apply(values)


def launch(accelerator: str, devices: int) -> World:
    """Start the other processes of a run, or join those of torchrun; each returns from here with its own rank.

    UsageError where the accelerator is not available or has fewer devices, or, on a CPU, there are fewer cores.
    """
    kind = choose_device(accelerator)
    nodes = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    elif kind == "cpu" and devices > (cores := cpu_count()):
        raise UsageError(
            f"--devices {devices}: one process per core on a CPU, available cores: {cores}",
            f"Use --devices {cores} at most.",
        )
    if kind != "cpu" and devices > (count := torch.cuda.device_count() if kind == "cuda" else 1):
        raise UsageError(f"--devices {devices}: {kind} devices: {count}", f"Use --devices {count} at most.")
    if devices * nodes == 1:
        return World(torch.device(kind))
    from lightning_fabric import Fabric  # import time: more than a second

    for name in ("lightning_fabric", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    fabric = Fabric(accelerator=kind, devices=devices, num_nodes=nodes, strategy="ddp")
    fabric.launch()
    return World(fabric.device, fabric.global_rank, fabric.world_size, devices, fabric)


def describe(world: World) -> dict[str, Any]:
    """Device and number of processes, for `environment.json`."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return {"accelerator": world.device.type, "accelerator_name": name, "processes": world.size}


class StopFlag:
    """True after the first SIGINT or SIGTERM; long loops check it between steps."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + signal number: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)


_active: list[StopFlag] = []  # of the main thread; at most one


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a flag, shared by nested calls; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield StopFlag()  # handlers can only be set in the main thread
        return
    if _active:
        yield _active[0]
        return
    flag = StopFlag()

    def note(number: int, frame: FrameType | None) -> None:
        if flag.signal is not None:
            os._exit(128 + number)
        flag.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    _active.append(flag)
    try:
        yield flag
    finally:
        _active.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
