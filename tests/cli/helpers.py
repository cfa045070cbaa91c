"""The command line as a user runs it: environment, outcome, clean output."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import NamedTuple

from kdcli.base import code
from kdcli.cli.app import COMMANDS
from tests.helpers import ROOT

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")},
    "TERMINAL_WIDTH": "80",
    "COLUMNS": "80",
    "_TYPER_FORCE_DISABLE_TERMINAL": "1",
    "PYTHONPATH": str(ROOT),
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Kd = Callable[..., Outcome]


def printed_commands(outcome: Outcome) -> list[str]:
    """The commands that a command named as the next ones, and those inside its hint, which stand after a colon."""
    found = re.findall(r"^next: (.+)$", outcome.out, re.MULTILINE)
    command = rf"(?:{code.ALLOWED}=\S+ )?kd (?:runs(?! no | files)|{'|'.join(set(COMMANDS) - {'runs'})})\b"
    for hint in re.findall(r"^hint: .+$", outcome.err, re.MULTILINE):
        first = re.search(rf": ({command}.*)", hint)
        found += re.split("; (?=kd )", first[1]) if first else []
    return found


def is_clean(text: str) -> bool:
    """Whether a text has neither a traceback nor control characters (C0, C1), direction marks or lone surrogates."""
    steering = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return "Traceback" not in text and not re.search(steering, text)
