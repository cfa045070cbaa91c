"""`kd reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.base.config import ReproduceConfig, make
from kdcli.base.errors import KdError
from kdcli.cli import _ui
from kdcli.cli._options import examples, options_of

if TYPE_CHECKING:
    from kdcli.studies.reproduce import Reproduction

EPILOG = examples(
    "kd reproduce runs/kd-lenet-1",
    "kd reproduce runs/kd-lenet-1 --tolerance 0.3 --json",
)


@options_of(ReproduceConfig)
def reproduce(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    **options: Any,
) -> None:
    """Repeat a finished run from its folder, and compare the two.

    Exit code 0: bit-identical, or within the tolerance; 1: different.
    """
    config = make(ReproduceConfig, options)
    from kdcli.studies import reproduce as studies

    found = studies.read_finished(run, config.method)
    with _ui.progress() as on_event:
        data = studies.check_inputs(found, on_event)
        result = studies.reproduce(found, data, config.tolerance, on_event)
    if _ui.settings.json:
        _ui.json(result.to_json())
    else:
        _show(result)
    if not result.holds:
        raise KdError(
            f"{result.run} was not reproduced: test accuracy {result.accuracy:.2f} and "
            f"{result.accuracy_again:.2f} %, more than {result.tolerance:g} points apart",
            "The differences of machine and versions are listed above."
            if result.circumstances
            else "Machine, versions and threads are equal: was the run's folder changed?",
        )


def _show(result: Reproduction) -> None:
    _ui.say(f"{result.verdict}: {result.run} and {result.again}")
    low, high = result.interval
    _ui.say(
        f"test accuracy {result.accuracy:.2f} % and {result.accuracy_again:.2f} % of {result.test_images:,} images"
        f" (tolerance {result.tolerance:g} points; 95 % interval of the first {low:.2f}–{high:.2f})"
    )
    _ui.say(f"SHA-256 of the students' tensors {result.sha256[:16]}… and {result.sha256_again[:16]}…")
    if result.tensors_differ:
        _ui.say(
            f"{result.tensors_differ} of {result.tensors} tensors differ, by at most {result.largest_difference:.3g}"
        )
    for line in result.circumstances:
        _ui.say(f"different: {line}")
    if result.tensors_differ and not result.circumstances:
        _ui.say("machine, versions and threads are equal")
