"""`kd validate`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import typer

from kdcli.base.config import ValidateConfig, make
from kdcli.base.errors import KdError
from kdcli.cli import _ui
from kdcli.cli._find import data_for
from kdcli.cli._options import examples, options_of

if TYPE_CHECKING:
    from kdcli.caffe.opencv import Agreement
    from kdcli.engine import Evaluation

EPILOG = examples(
    "kd validate --data cifar10",
    "kd validate --against weights/cifar10_nin.caffemodel",
)


@options_of(ValidateConfig)
def validate(**options: Any) -> None:
    """Measure the accuracy of a converted teacher, beside the published one and earlier measurements.

    With --against, compare its logits with those of OpenCV's Caffe importer. (For a student, see kd test.)
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
        agreement = None
        if config.against is not None:
            total = len(splits.test)
            count = min(config.images, total)
            rows = np.arange(count) * total // count  # spread: folders are sorted by class
            images = take(splits.test.images, rows)
            agreement = opencv.compare_logits(
                teacher, config.against, config.prototxt, images, on_event=on_event
            )
        result = evaluate(teacher, splits.test, task="validating", on_event=on_event)
    published = str(teacher.provenance.get("published") or "")
    measured = (teacher.provenance.get("measured") or {}).get(splits.label)
    failed = agreement is not None and not agreement.holds
    if _ui.settings.json:
        against = agreement and {"file": str(config.against), **agreement.to_json()}
        _ui.json(
            {
                "teacher": str(config.teacher),
                "name": teacher.provenance.get("name"),
                "data": splits.label,
                "published": published or None,
                "measured_before": measured,
                "test": result.to_json(),
                "against": against,
            }
        )
        raise typer.Exit(int(failed))
    table = _rows(result, agreement, splits.label, measured, published)
    _ui.table([f"{config.teacher} on {splits.label}", ""], table, left=2)
    if agreement is not None and failed:
        raise KdError(
            f"{config.teacher} differs from {config.against}: logits differ by up to "
            f"{agreement.largest_difference:.3g}",
            "Convert it again with kd convert-caffe; pass the same --prototxt to both commands.",
        )
    command = ["kd", "train", "--method", "noisy"]
    command += ["--data", config.data] if "data" in options else []
    command += ["--teacher", str(config.teacher)] if "teacher" in options else []
    _ui.next_command(shlex.join(command))


def _rows(
    result: Evaluation, agreement: Agreement | None, label: str, measured: float | None, published: str
) -> list[list[str]]:
    low, high = result.accuracy_interval
    return [
        ["accuracy", f"{result.accuracy:.2f} % ({low:.2f}–{high:.2f}, n = {result.count:,})"],
        [f"measured before on {label}", "—" if measured is None else f"{measured:.2f} %"],
        ["published", published or "—"],
        *([["largest difference from OpenCV", agreement.text()]] if agreement else []),
    ]
