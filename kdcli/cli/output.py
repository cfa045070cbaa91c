"""All output: results to stdout; progress, notes and errors to stderr."""

import json as json_module
import math
import re
import signal
import socket
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from kdcli.base.config import option_flag
from kdcli.base.errors import Interrupted, KdError
from kdcli.base.events import Epoch, Event, Note
from kdcli.base.events import Progress as ProgressEvent
from kdcli.base.text import one_line, printable
from kdcli.base.units import size

FIRST_LINE_S, LINE_S = 1.0, 10.0  # of progress without a terminal
_STOP_S = 0.2  # a command that ends within it needs no word about the signal
_EPOCH_LINES = 10
_RANK_DELAY_S = 3.0
_MAX_LINE = 2_000
_WRAP: Any = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class OutputSettings:
    """Output options of the running command."""

    quiet = False
    follower = False  # a distributed process of rank > 0
    debug = False
    json = False
    answered = False  # the object of --json is printed


settings = OutputSettings()
_stderr = Console(stderr=True, highlight=False, emoji=False)


def _draws() -> bool:
    """Whether bars are drawn: on a terminal, and in a notebook that has widgets."""
    return _stderr.is_interactive or (_stderr.is_jupyter and find_spec("ipywidgets") is not None)


def _stdout(**options: Any) -> Console:
    activity.bars.stop()
    return Console(highlight=False, emoji=False, quiet=settings.json, **options)


def _print(console: Console, line: Text) -> None:
    """Print a line, on a terminal wrapped between words; a command at its end stays in one piece, to be copied."""
    ends = [0]
    if console.is_terminal and line.cell_len > console.width:
        prose = re.sub(r"(^|: )(KD_\w+=\S+ )?kd .*", r"\1", line.plain)
        for part in textwrap.wrap(prose, console.width, **_WRAP):
            ends.append(line.plain.index(part, ends[-1]) + len(part) + 1)
    for piece in line.divide(end for end in ends[1:] if end < len(line)):
        piece.rstrip()
        console.print(piece, soft_wrap=True)


def text(*lines: str) -> None:
    """Print lines of a result on stdout, unless --json is given."""
    console = _stdout()
    for line in lines or ("",):
        _print(console, Text(printable(line)))


def next_command(command: str) -> None:
    """Suggest the next command."""
    if not settings.quiet:
        _print(_stdout(), Text.assemble("next: ", (printable(command), "bold")))


def confirm(question: str) -> bool:
    """The answer to a question on a terminal; False where there is none to ask, or with --json."""
    activity.bars.stop()
    if settings.json or not sys.stdin.isatty():
        return False
    with suppress(typer.Abort):
        return typer.confirm(question)
    _stderr.print()  # the input ended in the line of the question
    return False


def note(message: str, style: str = "dim") -> None:
    """Print a note on stderr, unless --quiet is given."""
    if not settings.quiet and not settings.follower:
        _print(_stderr, Text(one_line(message, _MAX_LINE), style))


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
        activity.bars.stop()
        document = _finite({"schema_version": 1, **value})
        sys.stdout.write(json_module.dumps(document, default=str) + "\n")
        settings.answered = True


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value.as_posix() if isinstance(value, Path) else value


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, marked: int = -1) -> None:
    """Print a table on stdout, unless --json is given.

    Args:
        left: number of leading left-aligned text columns; the others are numbers, right-aligned.
        marked: index of a row printed bold.
    """
    drawn = Table(box=None, pad_edge=False)
    for index, name in enumerate(columns):
        drawn.add_column(
            Text(printable(name)),
            justify="left" if index < left else "right",
            overflow="fold" if index < left else "ellipsis",
            no_wrap=index >= left,
            header_style="bold",
        )
    for number, row in enumerate(rows):
        drawn.add_row(*map(Text, map(printable, row)), style="bold" if number == marked else None)
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
    if not settings.answered:
        json({"error": problem.message, "hint": problem.hint})
    if settings.debug:
        _stderr.print(Text(printable(traceback.format_exc())), soft_wrap=True)
    _print(_stderr, Text.assemble(("error:", "bold red"), " ", one_line(problem.message, _MAX_LINE)))
    if problem.hint:
        _print(_stderr, Text.assemble(("hint:", "bold"), " ", one_line(problem.hint, _MAX_LINE)))


class Activity:
    """Progress of the running command on stderr: spinner and bar on a terminal, else periodic lines."""

    def __init__(self) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
        )
        self.bars = Progress(*columns, console=_stderr, transient=True, refresh_per_second=8, disable=True)
        self.bars.add_task("")
        [self.task] = self.bars.tasks
        self.group = ""  # of the last event
        self.started, self.first = 0.0, 0  # time and units done at the group's first event

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show it from now on, also while the main thread imports libraries; acknowledge signals."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        self.group = ""
        self._set("loading libraries")
        self.bars.disable = not _draws() or settings.quiet or settings.follower
        self.bars.live.ipy_widget = None  # of a notebook: that of the last call is closed
        inbox, outbox = socket.socketpair()
        outbox.setblocking(False)
        before = signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
        watch = threading.Thread(target=self._watch, args=(inbox,), daemon=True)
        watch.start()
        self.bars.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            outbox.close()
            watch.join()
            inbox.close()
            self.bars.stop()

    def _watch(self, inbox: socket.socket) -> None:
        """Print lines of progress where there is no bar, and one after a signal that stops the command later."""
        inbox.settimeout(FIRST_LINE_S)
        stopped = False
        while True:
            try:
                signals = inbox.recv(1)
            except TimeoutError:
                if stopped:
                    self.bars.disable = True  # before it stops: the main thread may start it
                    self.bars.live.stop()
                    note("stopping after this step; another Ctrl-C ends it at once", "bold")
                    inbox.settimeout(None)
                elif not _draws():
                    note(self.line())
                    inbox.settimeout(LINE_S)
                continue
            if not signals:
                return
            if signals[0] in _SIGNALS and not stopped:
                stopped = True
                inbox.settimeout(_STOP_S)

    def line(self) -> str:
        """The step as text."""
        share = f"{self.task.percentage:.0f} %" if self.task.total else ""
        return "  ".join(filter(None, (self.task.description, share, self.task.fields["metrics"])))

    def _set(self, step: str, done: int = 0, total: int | None = None, metrics: str = "") -> None:
        self.task.description, self.task.fields["metrics"] = printable(step), printable(metrics)
        self.task.completed, self.task.total = done, total

    def show(self, event: Event) -> None:
        """Show an event of an operation."""
        if isinstance(event, Note):
            note(event.text)
        elif isinstance(event, Epoch):
            if event.epoch % -(-event.epochs // _EPOCH_LINES) == 0 or event.epoch == event.epochs:
                known = "" if event.val_accuracy is None else f"  val {event.val_accuracy:.1f} %"
                number = f"{event.epoch:>{len(str(event.epochs))}}/{event.epochs}"
                note(f"epoch {number}  loss {event.loss:.4f}{known}", "none")
        else:
            now = time.monotonic()
            group = event.group or event.task
            if group != self.group:
                self.group, self.started, self.first = group, now, event.done
            # after the last unit, work of unknown size
            total = event.total if event.done < event.total else None
            self._set(event.task, event.done, total, self._metrics(event, now - self.started))
            if not settings.follower:
                self.bars.start()

    def _metrics(self, event: ProgressEvent, seconds: float) -> str:
        """The event's values, the rate and the remaining time."""
        forms = {"images_per_s": "{:,.0f} img/s", "val_accuracy": "val {:.1f} %"}
        parts = [
            forms.get(name, name.replace("_", " ") + " {:.4g}").format(value)
            for name, value in event.values.items()
        ]
        if event.done and not event.total:
            parts.append(_quantity(event.done, event))
        rate = (event.done - self.first) / seconds if seconds else 0.0
        if rate > 0:
            if "images_per_s" not in event.values:
                parts.append(_rate(rate, event))
            if event.total:
                parts.append(f"ETA {clock(min((event.total - event.done) / rate, event.left_s))}")
        return "  ".join(parts)


activity = Activity()
on_event = activity.show


def _rate(rate: float, event: ProgressEvent) -> str:
    """`412 images/s`, `3.9 MB/s`; below one a second, `2.3 s/model`."""
    if rate < 1 and event.unit != "bytes":
        return f"{1 / rate:.2g} s/{event.unit.removesuffix('s')}"
    return f"{_quantity(rate, event)}/s"


def _quantity(value: float, event: ProgressEvent) -> str:
    """A number with the event's unit: `3.9 MB`, `412 images`."""
    return size(int(value)) if event.unit == "bytes" else f"{value:,.0f} {event.unit}"


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
