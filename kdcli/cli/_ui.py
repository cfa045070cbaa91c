"""All output: results to stdout; progress, notes and errors to stderr."""

from __future__ import annotations

import json as json_module
import sys
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from kdcli.base.errors import Interrupted, KdError
from kdcli.base.events import Epoch, Event, Note, OnEvent
from kdcli.base.events import Progress as ProgressEvent
from kdcli.base.units import size

PLAIN_INTERVAL_S = 10.0
_RANK_DELAY_S = 3.0
_MAX_LINE = 2_000


class OutputSettings:
    """Output options of the running command."""

    quiet = False
    follower = False  # a distributed process of rank > 0
    debug = False
    json = False


settings = OutputSettings()


def _console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def say(text: str = "") -> None:
    """Print a result on stdout, unless --json or --quiet is given."""
    if not settings.json and not settings.quiet:
        _console().print(escape(_printable(text)))


def note(text: str) -> None:
    """Print a note on stderr, unless --quiet is given."""
    if not settings.quiet and not settings.follower:
        _console(stderr=True).print(f"[dim]{escape(_line(text))}[/dim]")


def note_ignored(given: Container[str], names: Iterable[str], why: str) -> None:
    """Print a note for each option of `names` that is given but has no effect."""
    for name in names:
        if name in given:
            note(f"--{name.replace('_', '-')} has no effect {why}")


def next_command(text: str) -> None:
    """Suggest the next command."""
    if not settings.json and not settings.quiet:
        _console().print(f"next: [bold]{escape(text)}[/bold]")


def json(value: dict[str, Any]) -> None:
    """Print the JSON object of --json on stdout; NaN and infinity become null."""
    sys.stdout.write(json_module.dumps(_finite({"schema_version": 1, **value}), ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None  # noqa: PLR0124 — NaN test
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", left: int = 1, marked: int = -1
) -> None:
    """Print a table on stdout. (CSV and Markdown: `base.tables`.)

    Args:
        left: number of leading left-aligned text columns; the others are numbers, right-aligned.
        marked: index of a row printed bold.
    """
    if settings.json or settings.quiet:
        return
    drawn = Table(title=escape(title) if title else None, title_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(columns):
        drawn.add_column(
            escape(name),
            justify="left" if index < left else "right",
            overflow="fold" if index < left else "ellipsis",
            no_wrap=index >= left,
            header_style="bold",
        )
    for number, row in enumerate(rows):
        drawn.add_row(*(escape(_printable(cell)) for cell in row), style="bold" if number == marked else None)
    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no width limit
        console = Console(highlight=False, width=max(80, console.measure(drawn).maximum))
    console.print(drawn)


def error(problem: KdError) -> None:
    """Print `error:` and `hint:`, one line each. Other ranks wait, because rank 0 ends them on its own error."""
    if settings.follower:
        if isinstance(problem, Interrupted):
            return
        time.sleep(_RANK_DELAY_S)
    console = _console(stderr=True)
    console.print(f"[bold red]error:[/bold red] {escape(_line(problem.message))}")
    if problem.hint:
        console.print(f"[bold]hint:[/bold] {escape(_line(problem.hint))}")


def _line(text: str) -> str:
    """One line of limited length without control characters."""
    line = _printable(" ".join(part.strip() for part in text[: 2 * _MAX_LINE].splitlines()))
    return line if len(line) <= _MAX_LINE else line[: _MAX_LINE - 1] + "…"


def _printable(text: str) -> str:
    """Text without terminal control characters; class names and provenance come from files."""
    return "".join(mark if mark.isprintable() or mark == "\n" else " " for mark in text)


@contextmanager
def progress() -> Iterator[OnEvent]:
    """An `OnEvent` that shows progress: a bar on a terminal, otherwise a line every 10 seconds."""
    if settings.quiet or settings.follower:
        yield lambda event: None
        return
    console = _console(stderr=True)
    if not console.is_terminal:
        yield _Plain()
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True, highlight=False),
        transient=True,
        refresh_per_second=8,
    ) as bars:
        yield _Bars(bars)


class _Rate:
    """Rate and remaining time of a task, counted from its first event."""

    def __init__(self, first: ProgressEvent) -> None:
        self.started = time.monotonic()
        self.first = first.done

    def figures(self, event: ProgressEvent) -> str:
        elapsed = time.monotonic() - self.started
        done = event.done - self.first
        parts = [_value(name, value) for name, value in event.values.items()]
        if done > 0 and elapsed > 0:
            rate = done / elapsed
            if "images_per_s" not in event.values:
                parts.append(f"{quantity(rate, event.unit)}/s")
            parts.append(f"ETA {clock((event.total - event.done) / rate)}" if event.total else "")
        return "  ".join(part for part in parts if part)


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, tuple[TaskID, _Rate]] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.bars.console.print(f"[dim]{escape(_line(event.text))}[/dim]")
            return
        if isinstance(event, Epoch):  # its values are shown by the bar
            return
        group = event.group or event.task
        if group not in self.tasks:
            for name in list(self.tasks):  # one bar at a time
                self.bars.remove_task(self.tasks.pop(name)[0])
            self.tasks[group] = (
                self.bars.add_task(escape(event.task), total=event.total, figures=""),
                _Rate(event),
            )
        task, rate = self.tasks[group]
        self.bars.update(
            task,
            description=escape(event.task),
            completed=event.done,
            total=event.total,
            figures=escape(rate.figures(event)),
        )


class _Plain:
    def __init__(self) -> None:
        self.group = ""
        self.rate: _Rate | None = None
        self.printed = time.monotonic()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            note(event.text)
            return
        if isinstance(event, Epoch):
            return
        group = event.group or event.task
        now = time.monotonic()
        if group != self.group or self.rate is None:
            self.group, self.rate = group, _Rate(event)
        if now - self.printed >= PLAIN_INTERVAL_S:
            self.printed = now
            share = (
                f"{100 * event.done / event.total:.0f} %" if event.total else quantity(event.done, event.unit)
            )
            note(f"{event.task}  {share}  {self.rate.figures(event)}")


def _value(name: str, value: float) -> str:
    if name == "images_per_s":
        return f"{value:,.0f} img/s"
    if name == "val_accuracy":
        return f"val {value:.1f} %"
    return f"{name.replace('_', ' ')} {value:.4g}"


def quantity(value: float, unit: str) -> str:
    """A number with its unit: `3.9 MB`, `412 images`."""
    return size(value) if unit == "bytes" else f"{value:,.0f} {unit}"


def clock(seconds: float) -> str:
    """`0:07`, `3:25`, `1:02:03`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def percent(value: float | None, digits: int = 2) -> str:
    """A percentage without its sign; a dash if unknown."""
    return "—" if value is None or value != value else f"{value:.{digits}f}"  # noqa: PLR0124 — NaN test
