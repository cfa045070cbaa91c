"""Flags that may stand alone or have a value: Typer knows no such flags."""

from __future__ import annotations

import re
from collections.abc import Sequence

FLAGS: dict[str, tuple[str, str]] = {}  # flag → the value it has alone; what a value of its own looks like


def spell_out(words: Sequence[str]) -> list[str]:
    """Give flags that stand alone the value they then have.

    `--int8 student.pt` becomes `--int8=u8s8-channel-minmax student.pt`, and `--int8 auto` stays.
    """
    spelt: list[str] = []
    for number, word in enumerate(words):
        if word == "--":
            return [*spelt, *words[number:]]
        following = words[number + 1] if number + 1 < len(words) else ""
        alone = word in FLAGS and not re.fullmatch(FLAGS[word][1], following)
        spelt.append(f"{word}={FLAGS[word][0]}" if alone else word)
    return spelt
