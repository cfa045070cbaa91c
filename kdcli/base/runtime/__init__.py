"""CPU cores, devices, distributed processes, precision and signals."""

from kdcli.base.runtime.machine import available_cores, cpu_info, environment, keep_freed_memory, set_threads
from kdcli.base.runtime.precision import choose_precision
from kdcli.base.runtime.processes import World, choose_device, describe, launch, sum_over_processes
from kdcli.base.runtime.signals import StopFlag, stop_on_signals

__all__ = [
    "StopFlag",
    "World",
    "available_cores",
    "choose_device",
    "choose_precision",
    "cpu_info",
    "describe",
    "environment",
    "keep_freed_memory",
    "launch",
    "set_threads",
    "stop_on_signals",
    "sum_over_processes",
]
