"""`kd reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.base.config import ReproduceConfig
from kdcli.base.errors import KdError
from kdcli.cli import output
from kdcli.cli.arguments import run_folder
from kdcli.cli.options import command, examples

if TYPE_CHECKING:
    from kdcli.studies.reproduce import Reproduction

EPILOG = examples("kd reproduce kd-lenet-1", "kd reproduce runs/kd-lenet-1 --tolerance 0.3 --json")


@command(ReproduceConfig)
def reproduce(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, by name or folder.")],
    config: ReproduceConfig,
) -> None:
    """Repeat a finished run from its folder, and compare the two.

    Exit code 0: bit-identical, or within the tolerance; 1: different.
    """
    from kdcli.studies import reproduce as studies

    found = studies.read_finished(run_folder(run), config.method)
    data = studies.check_inputs(found, output.on_event)
    result = studies.reproduce(found, data, config.tolerance, output.on_event)
    output.json(result.to_dict())
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
    output.text(
        f"{result.verdict}: {result.run} and {result.again}",
        f"test accuracy {result.accuracy:.2f} % and {result.accuracy_again:.2f} % of {result.test_images:,} images "
        f"(tolerance {result.tolerance:g} points; 95 % interval of the first {output.interval(result.interval)})",
        f"SHA-256 of the students' tensors {result.sha256[:16]}… and {result.sha256_again[:16]}…",
    )
    if result.tensors_differ:
        output.text(
            f"{result.tensors_differ} of {result.tensors} tensors differ, "
            f"by at most {result.largest_difference:.3g}"
        )
        if not result.circumstances:
            output.text("machine, versions and threads are equal")
    for line in result.circumstances:
        output.text(f"different: {line}")
