"""The processes of one run, and the device each of them works on."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import Tensor, nn

from kdcli.base.errors import KdError, UsageError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")
_PATIENCE_S = 20.0
_SIGNS_OF_LOSS = ("gloo", "nccl", "connection", "socket", "timed out")


def choose_device(accelerator: str) -> str:
    """Resolve `auto` to `cuda`, `mps` or `cpu`, the first of them that is here.

    Raises:
        UsageError: the one asked for is not here.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        return next(name for name, available in here.items() if available)
    if not here[accelerator]:
        raise UsageError(
            f"--accelerator {accelerator}: this machine, or this build of torch, has none",
            "Leave it out: auto takes what there is.",
        )
    return accelerator


@dataclass(frozen=True)
class World:
    """Who takes part in a run. With one process nothing here costs anything, and Fabric is not even imported.

    Attributes:
        device: of this process.
        rank: its number, from 0; 0 writes files and talks.
        size: how many processes there are.
        local_size: how many of them on this host.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_size: int = 1
    fabric: Fabric | None = None

    @classmethod
    def alone(cls, accelerator: str = "cpu") -> World:
        """One process."""
        return cls(torch.device(choose_device(accelerator)))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, samples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], float]:
        """This process's part of a batch, and the weight of its mean loss.

        The mean over processes of weight · mean loss is the mean over the whole batch. A batch that is smaller
        than the number of processes is done by all of them alike.
        """
        if self.size == 1 or len(samples) < self.size:
            return samples, 1.0
        mine = np.array_split(samples, self.size)[self.rank]
        return mine, len(mine) * self.size / len(samples)

    def gather(self, values: Tensor, count: int) -> Tensor:
        """A batch's values (B, …) of all processes, from this one's part of them; gradients flow back.

        Args:
            count: images in the whole batch, which was divided by `share`.
        """
        if self.size == 1 or count < self.size:
            return values
        gathered: Tensor = _Gather.apply(values, count, self.rank, self.size)
        return gathered

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.fabric is None:
            return values
        result = self.fabric.all_reduce(values, reduce_op="mean")
        assert isinstance(result, Tensor)
        return result

    def rows(self, values: Tensor) -> list[list[float]]:
        """The values (K,) of each process, a row for each."""
        if self.fabric is None:
            return [values.tolist()]
        import torch.distributed as dist

        table = values.new_zeros(self.size, len(values))
        table[self.rank] = values
        dist.all_reduce(table)
        return [[float(value) for value in row] for row in table.tolist()]

    def agree(self, *flags: int) -> tuple[int, ...]:
        """The largest of each flag over all processes: what one has noticed, all of them know."""
        if self.fabric is None:
            return flags
        import torch.distributed as dist

        shared = torch.tensor(flags, dtype=torch.int64, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return tuple(int(value) for value in shared.tolist())

    def of_first(self, value: T) -> T:
        """What the first process has, for all."""
        return value if self.fabric is None else self.fabric.broadcast(value)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.fabric is not None:
            self.fabric.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process does the block, then the others: they find what it has written."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def replicate(self, network: nn.Module) -> nn.Module:
        """The network so that gradients are averaged over processes in the backward pass."""
        return network if self.fabric is None else self.fabric.setup_module(network, move_to_device=False)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss."""
        if self.fabric is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self.fabric.backward(loss)

    @contextmanager
    def losses_told(self) -> Iterator[None]:
        """Say plainly that another process has gone, instead of what the transport makes of it."""
        try:
            yield
        except RuntimeError as error:
            lost = any(sign in str(error).lower() for sign in _SIGNS_OF_LOSS)
            if self.size == 1 or not lost:
                raise
            raise KdError(
                f"process {self.rank} of {self.size}: another process of this run has ended",
                "Look at what it said; then kd train --resume continues the run.",
            ) from error

    def close(self, *, failed: bool = False) -> None:
        """Wait for the processes that this one has started; end them if this one has failed."""
        if self.fabric is None:
            return
        launcher = getattr(self.fabric.strategy, "launcher", None)
        for process in getattr(launcher, "procs", []):
            if failed and process.poll() is None:
                process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_PATIENCE_S)
            if process.poll() is None:
                process.kill()


class _Gather(torch.autograd.Function):
    """All parts of a batch, in order; each part's gradient is the sum of what all processes have for it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, count: int, rank: int, size: int) -> Tensor:
        ends = np.cumsum([len(part) for part in np.array_split(np.arange(count), size)])
        ctx.part = slice(int(ends[rank]) - len(values), int(ends[rank]))
        whole = values.new_zeros(count, *values.shape[1:])
        whole[ctx.part] = values
        torch.distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        total = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(total)
        return total[ctx.part], None, None, None


def launch(accelerator: str, devices: int) -> World:
    """Start the other processes of a run, or join those that torchrun has started.

    The others run this very command line again; they come back from here with another rank.

    Raises:
        UsageError: the accelerator is not here, or has fewer devices.
    """
    kind = choose_device(accelerator)
    nodes = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    if kind != "cpu" and devices > (torch.cuda.device_count() if kind == "cuda" else 1):
        raise UsageError(f"--devices {devices}: there are not so many {kind} devices here", "Use fewer.")
    if devices * nodes == 1:
        return World(torch.device(kind))
    from lightning_fabric import Fabric  # more than a second, which a run on one device shall not pay

    for name in ("lightning_fabric", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    fabric = Fabric(accelerator=kind, devices=devices, num_nodes=nodes, strategy="ddp")
    fabric.launch()
    return World(fabric.device, fabric.global_rank, fabric.world_size, devices, fabric)


def describe(world: World) -> dict[str, Any]:
    """The device and the number of processes, for `environment.json`."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return {"accelerator": world.device.type, "accelerator_name": name, "processes": world.size}
