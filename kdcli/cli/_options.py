"""Typer options generated from settings classes: one definition of each default, bound and help text."""

import inspect
import types
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from kdcli.base.config import METHOD, Settings
from kdcli.base.recipes import RECIPES
from kdcli.cli import _ui

Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "--config",
        help="Preset of kd train settings, overridden by explicit options; seed: the settings of the reference code.",
        metavar="|".join([*RECIPES, "FILE.toml"]),
        rich_help_panel=METHOD,
    ),
]


def examples(*commands: str) -> str:
    """Epilog of a command's help, one example per paragraph."""
    return "\n\n".join(f"[bold]{command}[/bold]" for command in commands)


def options_of(
    *settings: type[Settings], metavars: Mapping[str, str] | None = None, without: Container[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command with one option for each field of `settings`, passed to its `**options`.

    Only options given on the command line are passed, so that defaults do not override a recipe.

    Args:
        metavars: placeholders in --help for values that `config` cannot list (registry names).
        without: fields of the last class that get no option.
    """
    fields = {
        name: field
        for number, kind in enumerate(settings)
        for name, field in kind.model_fields.items()
        if number < len(settings) - 1 or name not in without
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters += [_parameter(name, field, (metavars or {}).get(name)) for name, field in fields.items()]
        parameters += [_keyword(name, False, bool, option) for name, option in _OUTPUT.items()]

        def run(**values: Any) -> None:
            for name in _OUTPUT:
                setattr(_ui.settings, name, values.pop(name))
            command(**{n: v for n, v in values.items() if n not in fields or v is not None})

        run.__name__ = command.__name__
        run.__doc__ = command.__doc__
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _output_flag(*flags: str, text: str) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel="Output")


_OUTPUT = {  # options of every command
    "json": _output_flag("--json", text="Print one JSON object on stdout instead of text."),
    "quiet": _output_flag("--quiet", "-q", text="Print errors only."),
    "debug": _output_flag("--debug", text="Show the traceback of an error."),
}


def _keyword(name: str, default: Any, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(name: str, field: FieldInfo, metavar: str | None) -> inspect.Parameter:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    kind = _value_type(field.annotation)
    flag = "--" + name.replace("_", "-")
    flags = [str(extra.get("flag", flag)), *(str(text) for text in extra.get("flags", []))]  # type: ignore[union-attr]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    placeholder = metavar or extra.get("metavar") or "|".join(map(str, choices))
    option = typer.Option(
        *flags,
        help=_help(field),
        rich_help_panel=str(extra.get("panel", "Options")),
        show_default=False,
        metavar=str(placeholder) or None,
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
    """Description and default value. The option's own default is None, to recognise options not given."""
    text, default = escape(field.description or ""), field.default
    if default is None or default == "" or default is False or default == ():
        return text
    if isinstance(default, tuple):
        [default] = default
    return f"{text} [dim]\\[default: {default.as_posix() if isinstance(default, Path) else default}][/dim]"
