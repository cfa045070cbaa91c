"""The command line: parse → settings → one engine call → render. No maths here."""

from __future__ import annotations

import ast
import difflib
import importlib
import io
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from kdcli.base.errors import Interrupted, KdError, UsageError
from kdcli.base.text import reason

app = typer.Typer(
    name="kd",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # the reference writes --noisy_ratio
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
    epilog="Start with [bold]kd demo[/bold]: the whole chain on small data, offline, in under two minutes.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from kdcli import __version__

        sys.stdout.write(f"kd {__version__}\n")
        raise typer.Exit


@app.callback()
def kd(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Compress image classifiers by knowledge distillation.

    From a big teacher to a small student that is proved smaller, faster and nearly as good.
    """


# in the order of --help; each is a module here with a function of its name and `register`
COMMANDS = (
    "demo",
    "download",
    "convert-caffe",
    "validate",
    "train",
    "compare",
    "reproduce",
    "tune",
    "test",
    "export",
    "info",
    "predict",
    "bench",
    "report",
)


def _register(arguments: list[str]) -> None:
    """Import the one command that is asked for; the others only lend their name and first help line.

    This keeps `kd --help` fast: settings classes and what they import are made for one command at most.
    """
    asked = next((word.replace("_", "-") for word in arguments if not word.startswith("-")), "")
    completing = "_KD_COMPLETE" in os.environ  # the shell asks for the options of any command
    for name in COMMANDS:
        module = name.replace("-", "_")
        if name == asked or completing:
            importlib.import_module(f"kdcli.cli.{module}").register(app)
        else:
            app.command(name, help=_summary(module))(_placeholder)


def _placeholder() -> None:
    """Stands for a command that was not asked for."""


def _summary(module: str) -> str:
    """A command's docstring, read without running its module."""
    text = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == module:
            return ast.get_docstring(node) or ""
    return ""


def _check_repeated(arguments: list[str]) -> None:
    """Two methods at once cannot be asked for: click would silently take the last."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    methods = [word for word in before if word == "--method" or word.startswith("--method=")]
    if len(methods) > 1:
        raise UsageError("--method is given twice", "A run has one method; make a run for each.")


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT: not to be caught by `except Exception`."""


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


_AGAIN = "Type the same command again: what was finished is kept."


def main() -> None:
    """Run the command line and leave with its exit code."""
    arguments = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks × or → gets a ?, not a crash
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _register(arguments)
        _check_repeated(arguments)
        code = app(args=arguments, prog_name="kd", standalone_mode=False)
    except BrokenPipeError:  # `kd … | head`
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        _leave(Interrupted("stopped", _AGAIN, exit_code=130), 130)
    except Terminated:
        _leave(Interrupted("stopped", _AGAIN, exit_code=143), 143)
    except KdError as problem:
        _leave(problem, problem.exit_code)
    except Exception as problem:
        if hasattr(problem, "format_message") and not str(problem.format_message()).strip():
            sys.exit(2)  # nothing was asked, and the help has been shown
        _leave(_as_kd_error(problem, arguments), 2 if hasattr(problem, "format_message") else 1)
    sys.exit(code if isinstance(code, int) else 0)


def _leave(problem: KdError, code: int) -> NoReturn:
    """Say what is wrong and exit; with --debug the traceback goes first."""
    from kdcli.cli import _ui

    if _ui.settings.debug:
        traceback.print_exc()
    if not problem.hint:
        asked = next((word for word in sys.argv[1:] if word in COMMANDS), "")
        problem.hint = f"{' '.join(filter(None, ('kd', asked)))} --help shows what it takes."
    _ui.error(problem)
    sys.exit(code)


def _as_kd_error(problem: Exception, arguments: list[str]) -> KdError:
    """Typer's own complaints have `format_message`; anything else is a fault of kd."""
    if not hasattr(problem, "format_message"):
        if isinstance(problem, OSError):
            where = f"{problem.filename}: " if problem.filename else ""
            return KdError(f"{where}{reason(problem)}", "Check the path, its permissions and free space.")
        words = str(problem) if isinstance(problem, RuntimeError) else ""  # torch's own, of CPU and GPU
        if isinstance(problem, MemoryError) or "DefaultCPUAllocator" in words or "out of memory" in words:
            return KdError("out of memory", "Use smaller images, fewer of them, or a smaller batch.")
        return KdError(
            f"unexpected {type(problem).__name__}: {problem}",
            "This is a fault of kd: please report it with the output of the same command and --debug.",
        )
    message = str(problem.format_message()).rstrip(".")
    commands = [info.name or "" for info in app.registered_commands]
    if message.startswith("No such command"):
        word = message.split("'")[1] if "'" in message else ""
        close = difflib.get_close_matches(word, commands, 1)
        hint = f"Did you mean kd {close[0]}?" if close else f"Commands are {', '.join(commands)}."
        return UsageError(message[0].lower() + message[1:], hint)
    command = next((word for word in arguments if word in commands), "")
    return UsageError(message[0].lower() + message[1:], f"{' '.join(['kd', command]).strip()} --help")
