"""CPU cores, devices, distributed processes, precision and signals."""

from kdcli.base.runtime.machine import available_cores, cpu_info, environment, set_threads
from kdcli.base.runtime.precision import choose_precision
from kdcli.base.runtime.processes import World, choose_device, describe, launch
from kdcli.base.runtime.signals import StopFlag, stop_on_signals
from kdcli.base.runtime.start_up import keep_freed_memory, plain_step, spare_the_compiler

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
    "plain_step",
    "set_threads",
    "spare_the_compiler",
    "stop_on_signals",
]
