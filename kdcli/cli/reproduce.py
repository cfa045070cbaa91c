"""`kd reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.base.config import ReproduceConfig, make
from kdcli.base.errors import KdError
from kdcli.cli import _ui
from kdcli.cli._options import options_of

if TYPE_CHECKING:
    from kdcli.studies.reproduce import Reproduction


@options_of(ReproduceConfig)
def reproduce(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    **options: Any,
) -> None:
    """Repeat a finished run from its folder, and say whether the same comes out.

    Exit code 0: bit-identical, or within the tolerance; 1: different.
    """
    config = make(ReproduceConfig, options)
    from kdcli.studies import reproduce as engine

    found = engine.read_finished(run, config.method)
    with _ui.progress() as on_event:
        data = engine.check_inputs(found, on_event)
        made = engine.reproduce(found, data, config.tolerance, on_event)
    if _ui.settings.json:
        _ui.json({**made.to_json(), "holds": made.holds})
    else:
        _show(made)
    if not made.holds:
        raise KdError(
            f"{made.run} did not come out the same: test accuracy {made.accuracy:.2f} and "
            f"{made.accuracy_again:.2f} %, more than {made.tolerance:g} points apart",
            "What is different about machine and versions is listed above."
            if made.circumstances
            else "Machine, versions and threads are the same: was the run's folder changed?",
        )


def _show(made: Reproduction) -> None:
    _ui.say(f"{made.verdict}: {made.run} and {made.again}")
    low, high = made.interval
    _ui.say(
        f"test accuracy {made.accuracy:.2f} % and {made.accuracy_again:.2f} % of {made.test_images:,} images"
        f" (tolerance {made.tolerance:g} points; 95 % interval of the first {low:.2f}–{high:.2f})"
    )
    _ui.say(f"SHA-256 of the students' tensors {made.sha256[:16]}… and {made.sha256_again[:16]}…")
    if made.tensors_differ:
        _ui.say(
            f"{made.tensors_differ} of {made.tensors} tensors differ, by at most {made.largest_difference:.3g}"
        )
    for line in made.circumstances:
        _ui.say(f"different: {line}")
    if made.tensors_differ and not made.circumstances:
        _ui.say("machine, versions and threads are the same")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "reproduce",
        epilog="[bold]kd reproduce runs/kd-lenet-1[/bold]\n\n"
        "[bold]kd reproduce runs/kd-lenet-1 --tolerance 0.3 --json[/bold]",
    )(reproduce)
