"""CPU cores, devices, distributed processes, precision and signals."""

from kdcli.base.runtime.machine import (
    choose_precision,
    cpu_info,
    environment,
    keep_freed_memory,
    set_threads,
)
from kdcli.base.runtime.processes import World, choose_device, describe, launch, sum_over_processes
from kdcli.base.runtime.signals import StopFlag, stop_on_signals
