"""A comparison as CSV, as Markdown, and as cells of any table."""

from collections.abc import Sequence

from kdcli.base.tables import csv_text, markdown_cell, markdown_text
from kdcli.studies.compare.result import Comparison, Standing


def to_csv(result: Comparison) -> str:
    """All figures, a line for each method."""
    rows = []
    for row in result.standings:
        difference = row.difference
        low, high = row.test_interval or (None, None)
        below, above = (difference and difference.interval) or (None, None)
        rows.append(
            {
                "method": row.method,
                "baseline": result.baseline,
                "runs": row.count,
                "failed": row.failed,
                "test_mean": row.test_mean,
                "test_deviation": row.test_deviation,
                "test_low": low,
                "test_high": high,
                "val_mean": row.val_mean,
                "pairs": difference.count if difference else 0,
                "difference": difference and difference.mean,
                "difference_deviation": difference and difference.deviation,
                "difference_low": below,
                "difference_high": above,
                "p": difference and difference.p,
                "p_holm": difference and difference.p_holm,
                "verdict": row.verdict,
            }
        )
    return csv_text(rows)


def to_markdown(result: Comparison) -> str:
    """The table of differences, and a line about its runs."""
    columns = [
        "method",
        "runs",
        "test accuracy, %: mean ± sd",
        f"difference to {result.baseline}, points",
        "95 % interval",
        "p (Holm)",
        "verdict",
    ]
    rows = [[row.method, *cells(row)] for row in result.standings]
    table = markdown_text(columns, rows, left=(0, len(columns) - 1))
    notes = [
        f"{result.test_images:,} test images of {result.data}; student {result.student}, "
        f"{result.epochs:,} epochs; {statistics_note(result)}",
        *result.notes,
    ]
    return f"{table}\n\n{' '.join(f'{markdown_cell(text)}.' for text in notes)}\n"


def statistics_note(result: Comparison) -> str:
    """How the figures were computed, one line."""
    count = result.comparisons
    return (
        f"{_seeds(result.seeds)}, the same for each method; paired t-interval over seeds; "
        f"{count} comparison{'' if count == 1 else 's'} with {result.baseline}, Holm's p covers all of them"
    )


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) > 2 and list(seeds) == list(range(len(seeds))):
        return f"seeds 0 to {len(seeds) - 1}"
    if len(seeds) > 12:
        return f"{len(seeds)} seeds"
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def cells(row: Standing) -> list[str]:
    """Runs, mean ± sd, difference, interval, Holm's p and verdict, as text."""
    difference = row.difference
    interval = difference.interval if difference else None
    deviation = "" if row.test_deviation is None else f" ± {row.test_deviation:.2f}"
    return [
        str(row.count) + (f" (+{row.failed} failed)" if row.failed else ""),
        "—" if row.test_mean is None else f"{row.test_mean:.2f}{deviation}",
        "" if difference is None else signed(difference.mean),
        "" if interval is None else f"{signed(interval[0])} … {signed(interval[1])}",
        "" if difference is None or difference.p_holm is None else p_text(difference.p_holm),
        "" if row.is_baseline else row.verdict,
    ]


def signed(value: float) -> str:
    """`+0.67`, `−1.20`."""
    return f"{value:+.2f}".replace("-", "−")


def p_text(value: float) -> str:
    """A p-value with two significant figures."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
