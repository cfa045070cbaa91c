"""`kd data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcli.base.config import DataConfig
from kdcli.base.errors import UsageError
from kdcli.base.files import expand
from kdcli.base.text import dims
from kdcli.cli import output
from kdcli.cli.options import command, examples

_MAX_CLASSES, _MAX_NAMES = 30, 5
EPILOG = examples("kd data photos", "kd data photos.csv --json")


@command(DataConfig)
def data(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Folder, archive or table (.csv, .parquet) of images.")
    ],
    config: DataConfig,
) -> None:
    """Show the images of a folder, archive or table, and problems by file; exit 1 if training would refuse it."""
    from kdcli.data.survey import survey

    place = expand(str(path))
    if not place.exists():
        raise UsageError(f"no such file or folder: {path}", "Pass a folder, archive or table of images.")
    found = survey(place, config.skip_broken, output.on_event)
    refusal = found.refusal
    output.json(
        {
            "data": path,
            "images": found.counts,
            "sizes": found.sizes,
            "kinds": found.kinds,
            "problems": found.problems,
            "error": refusal and refusal.message,
            "hint": refusal and refusal.hint,
        }
    )
    classes = sorted({name for split in found.counts.values() for name in split})
    count = sum(sum(split.values()) for split in found.counts.values())
    output.text(f"{path}: {count:,} images of {len(classes):,} classes")
    rows = [
        [_shown(name), *(f"{split.get(name, 0):,}" for split in found.counts.values())]
        for name in classes[:_MAX_CLASSES]
    ]
    if classes[_MAX_CLASSES:]:
        rows.append([f"… {len(classes) - _MAX_CLASSES:,} more", *("" for _ in found.counts)])
    output.table(["class", *found.counts], rows)
    facts = [[f"{name} image", dims(size)] for name, size in found.sizes.items()]
    facts += [[f"images: {kind}", f"{count:,}"] for kind, count in found.kinds.items()]
    for problem, names in found.problems.items():
        shown = [*map(_shown, names[:_MAX_NAMES])]
        if names[_MAX_NAMES:]:
            shown.append(f"… {len(names) - _MAX_NAMES:,} more")
        facts += [[problem if number == 0 else "", name] for number, name in enumerate(shown)]
    output.text()
    output.table(*([facts[0], facts[1:]] if facts else [["no images"], []]), left=2)
    if refusal is not None:
        raise refusal


def _shown(name: str) -> str:
    """A name in one line, with escapes if it has control characters."""
    return name if name.isprintable() else ascii(name)
