"""CPU cores, devices, distributed processes, precision and signals."""

from kdcli.base.runtime.machine import (
    choose_precision,
    cpu_info,
    environment,
    keep_freed_memory,
    set_threads,
)
from kdcli.base.runtime.processes import (
    StopFlag,
    World,
    choose_device,
    describe,
    launch,
    stop_on_signals,
    sum_over_processes,
)
