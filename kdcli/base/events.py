"""Events of long operations. Only the command line prints; everything else calls `on_event`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self


@dataclass(frozen=True)
class Progress:
    """Progress of a task."""

    task: str
    done: int  # finished units out of `total`
    total: int
    unit: str = "images"
    values: Mapping[str, float] = field(default_factory=dict)  # metrics to show beside the progress bar
    group: str = ""  # events of one group share a progress bar; by default the task's name
    left_s: float = math.inf  # seconds after which it ends in any case

    def under(self, title: str) -> Self:
        """The same progress with a title before its task and group."""
        return replace(self, task=f"{title}: {self.task}", group=f"{title}: {self.group or self.task}")


@dataclass(frozen=True)
class Note:
    text: str


@dataclass(frozen=True)
class Epoch:
    """A finished training epoch."""

    epoch: int  # its number, from 1 to `epochs`
    epochs: int
    loss: float  # mean over the epoch's images
    val_accuracy: float | None  # per cent on the validation split; None without one


Event = Progress | Note | Epoch
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An `OnEvent` that drops everything."""


def titled(title: str, on_event: OnEvent) -> OnEvent:
    """Forward events, progress under a title."""
    return lambda event: on_event(event.under(title) if isinstance(event, Progress) else event)


def notes_once(on_event: OnEvent) -> OnEvent:
    """Forward events, each note only once."""
    noted: set[str] = set()

    def forward(event: Event) -> None:
        if not isinstance(event, Note) or event.text not in noted:
            on_event(event)
        if isinstance(event, Note):
            noted.add(event.text)

    return forward
