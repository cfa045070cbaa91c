"""The Typer application: registration of commands, exit codes, one line for each error."""

import ast
import importlib
import inspect
import io
import os
import signal
import sys
from pathlib import Path
from types import FrameType, ModuleType
from typing import Annotated, NoReturn

import typer

from kdcli.base.errors import Interrupted, KdError, UsageError, is_out_of_memory
from kdcli.base.names import nearest
from kdcli.base.text import reason

app = typer.Typer(
    name="kd",
    no_args_is_help=True,
    suggest_commands=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),  # --noisy_ratio: the paper's code
    },
    epilog="Start with [bold]kd demo[/bold]: the whole workflow on small data, offline, in under two minutes.",
)

# in the order of --help; each is a module here with a function of its name and an EPILOG
COMMANDS = (
    "demo", "download", "data", "convert-caffe", "validate", "teacher-logits", "train", "compare", "reproduce",
    "tune", "test", "export", "info", "predict", "bench", "report", "runs", "clean",
)  # fmt: skip


# continued from their finished parts by the same command
CONTINUED = ("download", "teacher-logits", "compare", "reproduce", "tune")


class Stopped(BaseException):
    """SIGINT or SIGTERM; not an Exception, so that no handler swallows it."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)  # a second one ends the process at once
    raise Stopped(number)


def main() -> None:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × or → shows ?
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as for a background job
            signal.signal(number, _stop)
    if arguments[:1] == ["train"]:
        arguments = list(map(_with_value, arguments, [*arguments[1:], ""]))
    try:
        _register(arguments)
        _check_repeated(arguments)
        code = app(args=arguments, prog_name="kd", standalone_mode=False)
    except BrokenPipeError:  # `kd … | head`
        sys.stderr.close()
        sys.exit(1)
    except Stopped as stop:
        hint = "Rerun the same command" + (" to continue." if _command() in CONTINUED else ".")
        _fail(Interrupted("stopped", hint, exit_code=stop.exit_code))
    except Exception as error:
        if hasattr(error, "format_message") and not str(error.format_message()).strip():
            sys.exit(2)  # called without arguments: the help has been printed
        _fail(error if isinstance(error, KdError) else as_kd_error(error))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.exit(code if isinstance(code, int) else 0)


def _with_value(word: str, following: str) -> str:
    """`--resume` without a value as `--resume=`: Typer has no options whose value may be left out."""
    return "--resume=" if word == "--resume" and following[:1] in ("", "-") else word


def _version(requested: bool) -> None:
    if requested:
        from kdcli import __version__

        sys.stdout.write(f"kd {__version__}\n")
        raise typer.Exit


@app.callback()
def kd(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compress image classifiers by knowledge distillation.

    Train a small student from a large teacher, and verify that it is smaller, faster and nearly as accurate.
    """


def _register(arguments: list[str]) -> None:
    """Import the requested command; register the others by name and summary only.

    This keeps `kd --help` fast: at most one command's settings classes are built.
    """
    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS")  # shell completion
    words = typed.split()[1:] if typed and "_KD_COMPLETE" in os.environ else arguments
    requested = "".join(words[:1]).replace("_", "-")
    if not typed and requested[:1] not in ("", "-") and requested not in COMMANDS:
        raise UsageError(f"no such command: {requested}", nearest(requested, COMMANDS))
    for name in COMMANDS:
        module = name.replace("-", "_")
        if name == requested:
            add_command(app, importlib.import_module(f"kdcli.cli.{module}"))
        else:
            app.command(name, help=_summary(module))(lambda: None)


def add_command(app: typer.Typer, module: ModuleType) -> None:
    """Register a module's command; without arguments, a command that requires some prints its help."""
    name = module.__name__.rpartition(".")[2]
    command = getattr(module, name)
    required = any(p.default is p.empty for p in inspect.signature(command).parameters.values())
    app.command(name.replace("_", "-"), epilog=module.EPILOG, no_args_is_help=required)(command)


def _summary(module: str) -> str:
    """A command's docstring, parsed without importing its module."""
    text = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    functions = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
    return next((ast.get_docstring(node) or "" for node in functions if node.name == module), "")


def _check_repeated(arguments: list[str]) -> None:
    """Reject a repeated --method, of which click would silently take the last."""
    if sum(word == "--method" or word.startswith("--method=") for word in arguments) > 1:
        raise UsageError("--method is given twice", "A run has one method; make a run for each.")


def _fail(error: KdError) -> NoReturn:
    """Print an error with its hint and exit."""
    from kdcli.cli import output

    if not error.hint:
        error.hint = f"See: kd {command} --help-all" if (command := _command()) else "See: kd --help"
    output.settings.json |= "--json" in sys.argv  # not parsed yet where parsing failed
    output.error(error)
    sys.exit(error.exit_code)


def _command() -> str:
    """Name of the command on the command line; empty without one."""
    return next((word for word in sys.argv[1:] if word in COMMANDS), "")


def as_kd_error(error: Exception) -> KdError:
    """A KdError for a usage error of Typer, an OSError, exhausted memory, or a bug of kd."""
    if hasattr(error, "format_message"):
        similar = getattr(error, "possibilities", None)  # options, the nearest first
        text = str(error if similar else error.format_message()).rstrip(".")
        return UsageError(text[0].lower() + text[1:], f"Did you mean {similar[0]}?" if similar else "")
    if isinstance(error, OSError):
        prefix = f"{error.filename}: " if error.filename else ""
        return KdError(f"{prefix}{reason(error)}", "Check the path, its permissions and free space.")
    if is_out_of_memory(error):
        return KdError("out of memory", "Use smaller images, fewer of them, or a smaller batch.")
    return KdError(
        f"unexpected {type(error).__name__}: {error}",
        "This is a bug in kd: please report it with the output of the same command and --debug.",
    )
