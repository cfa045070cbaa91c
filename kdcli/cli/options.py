"""Typer options generated from settings classes: one definition of each default, bound and help text."""

import inspect
import os
import re
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from rich.markup import escape

from kdcli.base import code, runs
from kdcli.base.config import DATA, METHOD, OPTIMISER, RUN, Settings, make, option_flag
from kdcli.base.config.settings import INPUT, OF_METHODS
from kdcli.base.names import DATA_SETS, NETWORKS
from kdcli.base.recipes import RECIPES
from kdcli.cli import output

# in the order of --help; None: arguments, "": the other panels
_PANELS = (None, "", METHOD, OF_METHODS, DATA, OPTIMISER, RUN, INPUT, "Output")
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "--config",
        help="Preset of kd train settings, overridden by explicit options; teacher: a teacher trained on "
        "labels; patient: distillation with a long schedule; seed: the settings of the reference code.",
        metavar="|".join([*RECIPES, "FILE.toml"]),
        rich_help_panel=METHOD,
    ),
]


def _files(*patterns: str) -> list[str]:
    return [path.as_posix() for pattern in patterns for path in sorted(Path().glob(pattern))]


def _runs() -> list[str]:
    return [path.name for path in runs.run_folders()]


def _models() -> list[str]:
    return _files("weights/*.pt", "runs/*/student.pt", "exports/*.onnx")


def _methods() -> list[str]:
    from kdcli.methods import METHODS

    return list(METHODS)


def _downloads() -> list[str]:
    from kdcli.data.catalog import DOWNLOADS

    return [*DOWNLOADS, "all"]


# values that shell completion offers, by parameter; the shell completes paths where none fits
_OFFERED: dict[str, Callable[[], Iterable[str]]] = {
    "method": _methods,
    "methods": _methods,
    "baseline": _methods,
    "student": lambda: [*NETWORKS, *_models()],
    "assistant": lambda: NETWORKS,
    "teacher": _models,
    "data": lambda: DATA_SETS,
    "recipe": lambda: [*RECIPES, *_files("*.toml")],
    "model": lambda: [*_runs(), *_models()],
    "model_or_network": lambda: [*_runs(), *_models(), *NETWORKS],
    "checkpoint": lambda: [*_runs(), *_models()],
    "resume": _runs,
    "run": _runs,
    "runs": _runs,
    "what": _downloads,
}


def examples(*commands: str) -> str:
    """Epilog of a command's help, one example per paragraph."""
    return "\n\n".join(f"[bold]{command}[/bold]" for command in commands)


def command(
    *settings: type[Settings], without: Iterable[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command with one option for each field of `settings`, and with those of every command.

    The given options of `settings[0]` become the parameter `config`, if there is one; all others are `**options`, so
    that their defaults do not override a recipe.

    Fields in `without` get no option.
    """
    fields: dict[str, FieldInfo] = {}
    for kind in settings:
        fields |= {name: f for name, f in kind.model_fields.items() if name not in {*fields, *without}}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = {name: p for name, p in signature.parameters.items() if name not in ("config", "options")}
        parameters = [_parameter(name, field) for name, field in fields.items()]
        parameters += own.values()
        parameters += [_keyword(name, False, bool, option) for name, option in _OUTPUT.items()]
        parameters.sort(key=_place)
        for parameter in parameters:
            if parameter.name in _OFFERED:
                parameter.annotation.__metadata__[0].autocompletion = _OFFERED[parameter.name]

        def run(**values: Any) -> None:
            for name in _OUTPUT:
                setattr(output.settings, name, values.pop(name))
            local = os.environ.get("LOCAL_RANK")  # set by torchrun and Fabric
            output.settings.follower = local is not None and os.environ.get("RANK", local) != "0"
            arguments = {name: values.pop(name) for name in own}
            options = {name: value for name, value in values.items() if value is not None}
            for name, value in (arguments | options).items():
                if name not in ("method", "methods"):  # their functions are losses
                    code.allow(*map(str, value if isinstance(value, list) else [value]))
            if "config" in signature.parameters:
                given = {name: options.pop(name) for name in settings[0].model_fields if name in options}
                arguments["config"] = make(settings[0], given)
            with output.activity.running():
                function(**arguments, **options)

        run.__name__ = function.__name__
        # lines are wrapped by the terminal
        run.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(function) or "")
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _help_all(context: typer.Context, asked: bool) -> None:
    if asked:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        context.get_help()  # Typer prints it
        raise typer.Exit


_OUTPUT = {  # options of every command
    "help_all": typer.Option("--help-all", help="Show all options.", callback=_help_all, is_eager=True),
    "json": typer.Option(
        "--json", help="Print one JSON object on stdout instead of text.", rich_help_panel="Output"
    ),
    "quiet": typer.Option("--quiet", "-q", help="Hide progress and notes.", rich_help_panel="Output"),
    "debug": typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output"),
}


def _place(parameter: inspect.Parameter) -> int:
    """Place of a parameter's panel in --help."""
    panel = parameter.annotation.__metadata__[0].rich_help_panel
    return _PANELS.index(panel if panel in _PANELS else "")


def _keyword(name: str, default: Any, kind: Any, option: Any) -> inspect.Parameter:
    if kind in (bool, bool | None):
        option.metavar = ""  # a flag takes no value
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    extra: Any = field.json_schema_extra or {}
    # a BeforeValidator parses the raw string
    is_parsed = any(isinstance(each, BeforeValidator) for each in field.metadata)
    kind = str if is_parsed else _value_type(field.annotation)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    placeholder = extra.get("metavar") or "|".join(map(str, choices))
    option = typer.Option(
        option_flag(name),
        *extra.get("flags", []),
        help=_help(field),
        rich_help_panel=extra.get("panel", "Options"),
        show_default=False,
        metavar=placeholder or None,
        hidden=extra.get("rare", False) and "_KD_COMPLETE" not in os.environ,
        autocompletion=lambda: map(str, choices),
    )
    return _keyword(name, None, (str if choices else kind) | None, option)


def _value_type(annotation: Any) -> Any:
    """`X | None` → X, `tuple[X, ...]` → list[X]; pydantic has already removed `Annotated`."""
    if get_origin(annotation) is tuple:
        return list[get_args(annotation)[0]]  # type: ignore[misc]
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _help(field: FieldInfo) -> str:
    """Description, default value, and bounds except ≥ 0 and large ones. None stands for an option not given."""
    text, default = escape(field.description or ""), field.default
    facts = [
        f"{sign} {getattr(part, name):g}"
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        for part in field.metadata
        if getattr(part, name, 100) < 100 and getattr(part, "ge", 1) != 0
    ]
    if not (default is None or default == "" or default is False or default == ()):
        [default] = default if isinstance(default, tuple) else [default]
        facts.insert(0, f"default: {default.as_posix() if isinstance(default, Path) else default}")
    return f"{text} [dim]\\[{', '.join(facts)}][/dim]" if facts else text
