"""`kd validate`."""

from __future__ import annotations

import shlex
from typing import Any

import typer

from kdcli.base.config import ValidateConfig, make
from kdcli.base.errors import KdError
from kdcli.cli import _ui
from kdcli.cli._find import data_for
from kdcli.cli._options import options_of


@options_of(ValidateConfig)
def validate(**options: Any) -> None:
    """Measure a converted teacher: did the conversion preserve it?

    Its accuracy on test data stands beside what is published and what was measured before.

    With --against, its logits stand beside those of OpenCV's own importer. (For a student, see kd test.)
    """
    config = make(ValidateConfig, options)
    if config.against is None:
        _ui.note_ignored(options, ("images", "prototxt"), "without --against")
    import numpy as np

    from kdcli import models
    from kdcli.base import runtime
    from kdcli.caffe import opencv
    from kdcli.data.rows import take
    from kdcli.engine import evaluate

    runtime.set_threads(config.threads)
    teacher = models.load(config.teacher)
    with _ui.progress() as on_event:
        splits = data_for(teacher, config.teacher, config.data, config, on_event, config.image_size)
        comparison = None
        if config.against is not None:
            count = min(config.images, len(splits.test))  # spread: the images of a folder are sorted by class
            images = take(splits.test.images, np.arange(count) * len(splits.test) // count)
            comparison = opencv.compare_logits(
                teacher, config.against, config.prototxt, images, on_event=on_event
            )
        result = evaluate(teacher, splits.test, task="validating", on_event=on_event)
    published = str(teacher.provenance.get("published") or "")
    measured = (teacher.provenance.get("measured") or {}).get(splits.label)
    if _ui.settings.json:
        _ui.json(
            {
                "teacher": str(config.teacher),
                "name": teacher.provenance.get("name"),
                "data": splits.label,
                "published": published or None,
                "measured_before": measured,
                "test": result.to_json(),
                "against": None
                if comparison is None
                else {"file": str(config.against), **comparison.to_json()},
            }
        )
    else:
        low, high = result.accuracy_interval
        rows = [
            ["accuracy here", f"{result.accuracy:.2f} % ({low:.2f}–{high:.2f}, n = {result.count:,})"],
            [f"measured before on {splits.label}", "—" if measured is None else f"{measured:.2f} %"],
            ["published", published or "—"],
        ]
        if comparison is not None:
            rows.append(["largest difference from OpenCV", comparison.text()])
        _ui.table([f"{config.teacher} on {splits.label}", ""], rows, left=2)
        if comparison is None or comparison.holds:
            typed = f" --data {shlex.quote(config.data)}" if "data" in options else ""
            typed += f" --teacher {shlex.quote(str(config.teacher))}" if "teacher" in options else ""
            _ui.next_command(f"kd train --method noisy{typed}")
    if comparison is not None and not comparison.holds:
        if _ui.settings.json:
            raise typer.Exit(1)
        raise KdError(
            f"the teacher is not {config.against}: "
            f"logits differ by up to {comparison.largest_difference:.3g}",
            "Convert it again with kd convert-caffe; give --prototxt to both commands or to none.",
        )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "validate",
        epilog="[bold]kd validate --data cifar10[/bold]\n\n"
        "[bold]kd validate --against weights/cifar10_nin.caffemodel[/bold]",
    )(validate)
