"""What long work tells whoever called it. The engine never prints; it calls `on_event`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of `task` are finished; `values` are figures worth showing beside the bar.

    Events of one `group` continue one bar, whatever their task is called; by default the task is the group.
    """

    task: str
    done: int
    total: int
    unit: str = "images"
    values: Mapping[str, float] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Note:
    """One sentence the user should see once."""

    text: str


@dataclass(frozen=True)
class Epoch:
    """An epoch of a training is over.

    Attributes:
        epoch: its number, from 1, of `epochs`.
        loss: mean over its images.
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
