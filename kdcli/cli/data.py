"""`kd data`."""

from __future__ import annotations

from typing import Annotated

import typer

from kdcli.base.config import DataConfig
from kdcli.base.text import dims
from kdcli.cli import output
from kdcli.cli.options import command, examples

_MAX_CLASSES, _MAX_NAMES = 30, 5
EPILOG = examples("kd data photos --sheet contact.png", "kd data photos.csv --json", "kd data digits")


@command(DataConfig)
def data(
    path: Annotated[
        str,
        typer.Argument(
            metavar="NAME|PATH",
            help="A data set's name, or a folder, archive or table (.csv, .parquet) of images.",
        ),
    ],
    config: DataConfig,
) -> None:
    """Show the images of a data set, and problems by file; exit 1 if kd train would reject it."""
    from kdcli.data.survey import survey

    found = survey(path, config, output.on_event)
    refusal = found.refusal
    output.json(
        {
            "data": path,
            "images": found.counts,
            "imbalance": found.imbalance,
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
    facts += [["largest class", f"{found.imbalance:.3g} × the smallest"]] * (found.imbalance > 1)
    facts += [[f"images: {kind}", f"{count:,}"] for kind, count in found.kinds.items()]
    for problem, names in found.problems.items():
        shown = [*map(_shown, names[:_MAX_NAMES])]
        if names[_MAX_NAMES:]:
            shown.append(f"… {len(names) - _MAX_NAMES:,} more")
        facts += [[problem if number == 0 else "", name] for number, name in enumerate(shown)]
    output.text()
    output.table(*([facts[0], facts[1:]] if facts else [["no images"], []]), left=2)
    if config.sheet is not None:
        output.text(f"wrote {config.sheet}")
    if refusal is not None:
        raise refusal


def _shown(name: str) -> str:
    """A name in one line, with escapes if it has control characters."""
    return name if name.isprintable() else ascii(name)
