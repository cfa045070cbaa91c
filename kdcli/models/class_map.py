"""Classes of a data set as groups of a model's outputs, matched by name or by a CSV file."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.base.tables import csv_lines

HINT = "Match them by lines of teacher class, data class: --class-map FILE.csv"
_LINES = "Each line is a class of the teacher, or its number from 0 on, and a class of the data: tabby,cat"


@dataclass(frozen=True)
class ClassMap:
    """The outputs of each class; the others are left out."""

    groups: tuple[tuple[int, ...], ...]  # numbers of outputs, for each class of the data
    text: str = ""  # description, for a note

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, outputs) → (B, classes): the log-sum-exp of each group.

        The probabilities of a group are summed, and those of all groups renormalised.
        """
        width, outputs = max(map(len, self.groups)), logits.shape[1]
        index = [[*group, *[outputs] * (width - len(group))] for group in self.groups]
        padded = nn.functional.pad(logits, (0, 1), value=-math.inf)
        return padded[:, torch.tensor(index, device=logits.device)].logsumexp(dim=2)


def find(outputs: Sequence[str], classes: Sequence[str], file: Path | None = None) -> ClassMap | None:
    """A map by the lines of a file (KdError: a class without an output), or by names (None unless they match 1:1)."""
    groups = _by_file(file, outputs, classes) if file else _by_name(outputs, classes)
    if not file and ({len(group) for group in groups} != {1} or len(set(groups)) < len(groups)):
        return None
    used = sum(map(len, groups))
    counts = f"{used:,} of its {len(outputs):,} classes matched with the data's {len(groups):,}"
    return ClassMap(groups, f"{counts} by {file or 'name'}")


def _by_name(outputs: Sequence[str], classes: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The outputs of the same name, else of the same name but for case and separators."""
    exact, alike = _numbers(outputs), _numbers([_plain(name) for name in outputs])
    return tuple(tuple(exact.get(name, alike.get(_plain(name), []))) for name in classes)


def _by_file(file: Path, outputs: Sequence[str], classes: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    numbers = {str(number): [number] for number in range(len(outputs))} | _numbers(outputs)
    groups, known = {name: list[int]() for name in classes}, set[int]()
    for line, (where, words) in enumerate(csv_lines(file, _LINES)):
        if line == 0 and words == ["teacher", "data"]:
            continue
        output, name = words if len(words) == 2 else ("", "")
        found = numbers.get(output, [])
        for wrong, problem in (
            (len(words) != 2, f"{len(words)} values instead of 2"),
            (len(found) != 1, f"the teacher has {len(found) or 'no'} classes {output!r}"),
            (name not in groups, f"the data has no class {name!r}"),
            (known.intersection(found), f"class {output!r} is there twice"),
        ):
            if wrong:
                raise KdError(f"{where}: {problem}", _LINES)
        known.update(found)
        groups[name] += found
    if missing := [name for name, group in groups.items() if not group]:
        listed = ", ".join(missing[:6]) + ", …" * (len(missing) > 6)
        raise KdError(f"{file} has no class of the teacher for {listed}", _LINES)
    return tuple(map(tuple, groups.values()))


def _numbers(names: Sequence[str]) -> dict[str, list[int]]:
    found = defaultdict(list)
    for number, name in enumerate(names):
        found[name].append(number)
    return dict(found)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
