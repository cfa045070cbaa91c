"""Events of long operations. Only the command line prints; everything else calls `on_event`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Progress of a task.

    Attributes:
        done: finished units out of `total`.
        values: metrics to show beside the progress bar.
        group: events of one group share a progress bar; by default the task's name.
        left_s: seconds after which it ends in any case.
    """

    task: str
    done: int
    total: int
    unit: str = "images"
    values: Mapping[str, float] = field(default_factory=dict)
    group: str = ""
    left_s: float = math.inf


@dataclass(frozen=True)
class Note:
    text: str


@dataclass(frozen=True)
class Epoch:
    """A finished training epoch.

    Attributes:
        epoch: its number, from 1 to `epochs`.
        loss: mean over the epoch's images.
        val_accuracy: per cent on the validation split; None without one.
    """

    epoch: int
    epochs: int
    loss: float
    val_accuracy: float | None


Event = Progress | Note | Epoch
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An `OnEvent` that drops everything."""
