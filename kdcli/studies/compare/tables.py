"""A comparison as a table for programs, and as one for a README."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from kdcli.base.tables import csv_cell, markdown_cell
from kdcli.studies.compare.result import Comparison, Standing

_SHOWN_SEEDS = 12


def to_csv(found: Comparison) -> str:
    """All figures, a line for each method."""
    buffer = io.StringIO(newline="")
    rows = []
    for row in found.standings:
        difference, (low, high) = row.difference, row.test_interval or (None, None)
        below, above = (difference.interval if difference else None) or (None, None)
        rows.append(
            {
                "method": csv_cell(row.method),
                "baseline": csv_cell(found.baseline),
                "runs": row.count,
                "failed": row.failed,
                "test_mean": row.test_mean,
                "test_deviation": row.test_deviation,
                "test_low": low,
                "test_high": high,
                "val_mean": row.val_mean,
                "pairs": difference.count if difference else 0,
                "difference": difference.mean if difference else None,
                "difference_deviation": difference.deviation if difference else None,
                "difference_low": below,
                "difference_high": above,
                "p": difference.p if difference else None,
                "p_holm": difference.p_holm if difference else None,
                "verdict": row.verdict,
            }
        )
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def to_markdown(found: Comparison) -> str:
    """The table that matters, and what it was measured on."""
    lines = [
        [
            "method",
            "runs",
            "test accuracy, %: mean ± sd",
            f"against {markdown_cell(found.baseline)}, points",
            "95 % interval",
            "p (Holm)",
            "verdict",
        ],
        [":--", "--:", "--:", "--:", "--:", "--:", ":--"],
    ]
    lines += [[markdown_cell(row.method), *cells(row)] for row in found.standings]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = [
        f"{found.test_images:,} test images of {markdown_cell(found.data)}; student {markdown_cell(found.student)}, "
        f"{found.epochs:,} epochs; {explained(found)}."
    ]
    notes += [f"{markdown_cell(text)}." for text in found.notes]
    return f"{table}\n\n{' '.join(notes)}\n"


def explained(found: Comparison) -> str:
    """How the figures came about, one line."""
    count = found.comparisons
    return (
        f"{_seeds(found.seeds)}, the same for each method; paired t-interval over seeds; "
        f"{count} comparison{'' if count == 1 else 's'} with {found.baseline}, Holm's p holds for all of them"
    )


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) > 2 and list(seeds) == list(range(len(seeds))):
        return f"seeds 0 to {len(seeds) - 1}"
    more = f" and {len(seeds) - _SHOWN_SEEDS} more" if len(seeds) > _SHOWN_SEEDS else ""
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds[:_SHOWN_SEEDS]))}{more}"


def cells(row: Standing) -> list[str]:
    """Runs, mean ± sd, difference, interval, Holm's p and verdict, as text."""
    difference = row.difference
    interval = difference.interval if difference else None
    return [
        str(row.count) + (f" (+{row.failed} failed)" if row.failed else ""),
        "—" if row.test_mean is None else f"{row.test_mean:.2f}{_deviation(row)}",
        "" if difference is None else signed(difference.mean),
        "" if interval is None else f"{signed(interval[0])} … {signed(interval[1])}",
        "" if difference is None or difference.p_holm is None else p_text(difference.p_holm),
        "" if row.is_baseline else row.verdict,
    ]


def _deviation(row: Standing) -> str:
    return "" if row.test_deviation is None else f" ± {row.test_deviation:.2f}"


def signed(value: float) -> str:
    """`+0.67`, `−1.20`."""
    return f"{value:+.2f}".replace("-", "−")


def p_text(value: float) -> str:
    """A p-value: two figures, and nothing that claims more."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
