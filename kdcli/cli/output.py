"""All output: results to stdout; progress, notes and errors to stderr."""

import json as json_module
import math
import sys
import time
import traceback
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from kdcli.base.config import option_flag
from kdcli.base.errors import Interrupted, KdError
from kdcli.base.events import Event, Note, OnEvent, ignore
from kdcli.base.events import Progress as ProgressEvent
from kdcli.base.text import printable
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


def _stdout(**options: Any) -> Console:
    return Console(highlight=False, emoji=False, quiet=settings.json or settings.quiet, **options)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def text(*lines: str) -> None:
    """Print lines of a result on stdout, unless --json or --quiet is given."""
    _stdout(soft_wrap=True).print(*map(_markup, lines), sep="\n")


def next_command(command: str) -> None:
    """Suggest the next command."""
    _stdout(soft_wrap=True).print(f"next: [bold]{_markup(command)}[/bold]")


def note(message: str, console: Console | None = None) -> None:
    """Print a note on stderr, unless --quiet is given."""
    if not settings.quiet and not settings.follower:
        (console or _stderr()).print(f"[dim]{_markup(_one_line(message))}[/dim]")


def note_ignored(given: Container[str], names: Iterable[str], reason: str) -> None:
    """Print a note for each option of `names` that is given but has no effect."""
    for name in names:
        if name in given:
            note(f"{option_flag(name)} has no effect {reason}")


def json(value: dict[str, Any]) -> None:
    """Print a result as the JSON object of --json, if that is given; NaN and infinity become null, paths text.

    All that is not ASCII is escaped: no text steers a terminal, and none is lost in its encoding.
    """
    if settings.json:
        document = _finite({"schema_version": 1, **value})
        sys.stdout.write(json_module.dumps(document, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value.as_posix() if isinstance(value, Path) else value


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", left: int = 1, marked: int = -1
) -> None:
    """Print a table on stdout, unless --json or --quiet is given.

    Args:
        left: number of leading left-aligned text columns; the others are numbers, right-aligned.
        marked: index of a row printed bold.
    """
    drawn = Table(title=_markup(title) if title else None, title_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(columns):
        drawn.add_column(
            _markup(name),
            justify="left" if index < left else "right",
            overflow="fold" if index < left else "ellipsis",
            no_wrap=index >= left,
            header_style="bold",
        )
    for number, row in enumerate(rows):
        drawn.add_row(*map(_markup, row), style="bold" if number == marked else None)
    console = _stdout()
    if not console.is_terminal:  # a file has no width limit
        console = _stdout(width=max(80, console.measure(drawn).maximum))
    console.print(drawn)


def error(problem: KdError) -> None:
    """Print `error:` and `hint:`, one line each, after the traceback if --debug is given.

    Other ranks wait, because rank 0 ends them on its own error.
    """
    if settings.follower:
        if isinstance(problem, Interrupted):
            return
        time.sleep(_RANK_DELAY_S)
    if settings.debug:
        _stderr().print(_markup(traceback.format_exc()))
    _stderr().print(f"[bold red]error:[/bold red] {_markup(_one_line(problem.message))}")
    if problem.hint:
        _stderr().print(f"[bold]hint:[/bold] {_markup(_one_line(problem.hint))}")


def _one_line(message: str) -> str:
    """One line of limited length."""
    line = " ".join(part.strip() for part in message[: 2 * _MAX_LINE].splitlines())
    return line if len(line) <= _MAX_LINE else line[: _MAX_LINE - 1] + "…"


def _markup(text: str) -> str:
    """Text, which may come from a file, as it is in Rich's markup."""
    return escape(printable(text))


@contextmanager
def progress() -> Iterator[OnEvent]:
    """An `OnEvent` that shows progress: a bar on a terminal, otherwise a line every 10 seconds."""
    console = Console(stderr=True, highlight=False)
    if settings.quiet or settings.follower:
        yield ignore
    elif not console.is_terminal:
        yield _Display()
    else:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[metrics]}", markup=False),
        )
        with Progress(*columns, console=console, transient=True, refresh_per_second=8) as bars:
            yield _Display(bars)


class _Display:
    """Progress of one task at a time, as a bar if there are `bars`, else as lines."""

    def __init__(self, bars: Progress | None = None) -> None:
        self.bars = bars
        self.group = ""
        self.printed = self.started = time.monotonic()
        self.first = 0  # units done at the task's first event

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            note(event.text, self.bars.console if self.bars else None)  # prints above the bar
        if not isinstance(event, ProgressEvent):
            return
        now = time.monotonic()
        group = event.group or event.task
        if group != self.group:
            self.group, self.started, self.first = group, now, event.done
            if self.bars:
                for task in self.bars.task_ids:
                    self.bars.remove_task(task)
                self.bars.add_task("", metrics="")
        metrics = self._metrics(event, now - self.started)
        if self.bars:
            self.bars.update(
                self.bars.task_ids[0],
                description=printable(event.task),
                completed=event.done,
                total=event.total,
                metrics=printable(metrics),
            )
        elif now - self.printed >= PLAIN_INTERVAL_S:
            self.printed = now
            share = f"{100 * event.done / event.total:.0f} %" if event.total else _quantity(event.done, event)
            note(f"{event.task}  {share}  {metrics}")

    def _metrics(self, event: ProgressEvent, seconds: float) -> str:
        """The event's values, the rate and the remaining time."""
        forms = {"images_per_s": "{:,.0f} img/s", "val_accuracy": "val {:.1f} %"}
        parts = [
            forms.get(name, name.replace("_", " ") + " {:.4g}").format(value)
            for name, value in event.values.items()
        ]
        rate = (event.done - self.first) / seconds if seconds else 0.0
        if rate > 0:
            if "images_per_s" not in event.values:
                parts.append(f"{_quantity(rate, event)}/s")
            if event.total:
                parts.append(f"ETA {clock((event.total - event.done) / rate)}")
        return "  ".join(parts)


def _quantity(value: float, event: ProgressEvent) -> str:
    """A number with the event's unit: `3.9 MB`, `412 images`."""
    return size(value) if event.unit == "bytes" else f"{value:,.0f} {event.unit}"


def clock(seconds: float) -> str:
    """`0:07`, `3:25`, `1:02:03`."""
    hours, rest = divmod(max(0, round(seconds)), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """A formatted number with its unit; a dash if it is unknown."""
    return "—" if value is None or math.isnan(value) else f"{value:{form}}{unit}"


def interval(bounds: tuple[float, float] | None) -> str:
    """`1.02–1.31`; a dash if it is unknown."""
    return "—" if bounds is None else "{:.2f}–{:.2f}".format(*bounds)
