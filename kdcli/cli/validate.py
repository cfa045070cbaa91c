"""`kd validate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import tomli_w

from kdcli.base.config import DataSettings, ValidateConfig, shell_command
from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import sha256_file, write_text
from kdcli.base.text import reason
from kdcli.cli import output
from kdcli.cli.arguments import data_for
from kdcli.cli.defaults import INPUTS, inputs_file, teacher_of
from kdcli.cli.options import command, examples

if TYPE_CHECKING:
    from kdcli.base.events import OnEvent
    from kdcli.caffe.opencv import Agreement
    from kdcli.data import ImageSet, Splits

_REPEATED = {*DataSettings.model_fields, "teacher", "resize"} - {"image_size"}  # options of kd train too
EPILOG = examples("kd validate --data cifar10", "kd validate --against weights/cifar10_nin.caffemodel")


@command(ValidateConfig)
def validate(config: ValidateConfig) -> None:
    """Measure the accuracy of a teacher, beside the published one and earlier measurements.

    --against compares its logits with OpenCV's; --probe finds the input format of an ONNX file. Students: kd test.
    """
    given = config.model_fields_set
    if config.probe and config.against is not None:
        raise UsageError("--probe and --against exclude each other", "Leave one of them out.")
    if config.against is None:
        output.note_ignored(given, ("images", "prototxt"), "without --against")
    from kdcli.base import runtime
    from kdcli.deploy.load import load_model
    from kdcli.engine import evaluate
    from kdcli.models import Classifier
    from kdcli.teacher import assumptions

    config = config.model_copy(update={"teacher": teacher_of(config)})
    runtime.set_threads(config.threads)
    teacher = load_model(config.teacher, config.threads, config)
    target = config.teacher if isinstance(teacher, Classifier) else None
    again = shell_command("convert-caffe", {"prototxt": config.prototxt, "output": target}, config.against)
    if config.against is not None and target is None:
        raise UsageError("--against compares a .pt teacher", f"Make one: {again}")
    teacher, splits = data_for(teacher, config, output.on_event)
    if config.probe:
        _probe(teacher, config, splits)
        return
    agreement = _compare(teacher, config, splits.test, output.on_event) if config.against else None
    result = evaluate(teacher, splits.test, task="validating", on_event=output.on_event)
    assumptions.check(str(config.teacher), teacher, splits.test, output.on_event, task="trying alternatives")
    published = str(teacher.provenance.get("published") or "")
    recorded = teacher.provenance.get("measured")
    measured = recorded.get(splits.label) if isinstance(recorded, dict) else None
    measured = measured if isinstance(measured, float) else None
    output.json(
        {
            "teacher": str(config.teacher),
            "name": teacher.provenance.get("name"),
            "data": splits.label,
            "published": published or None,
            "measured_before": measured,
            "test": result.to_dict(),
            "against": agreement and {"file": str(config.against), **agreement.to_dict()},
        }
    )
    interval = output.interval(result.accuracy_interval)
    table = [
        ["accuracy", f"{result.accuracy:.2f} % ({interval}, n = {result.count:,})"],
        [f"measured before on {splits.label}", output.number(measured, unit=" %")],
        ["published", published or "—"],
    ]
    if agreement is not None:
        table.append(["largest difference from OpenCV", agreement.text()])
    output.table([f"{config.teacher} on {splits.label}", ""], table, left=2)
    if agreement is not None and not agreement.holds:
        raise KdError(
            f"{config.teacher} differs from {config.against}: logits differ by up to "
            f"{agreement.largest_difference:.3g}",
            f"Convert it again: {again}",
        )
    method = "noisy" if teacher.gives == "logits" else "kd"
    output.next_command(_training(config, method, config.given, teacher))


def _training(config: ValidateConfig, method: str, inputs: dict[str, Any], teacher: Any) -> str:
    """The command that trains from this teacher, with these settings of its input.

    A checkpoint of an external network records its own: the network is named instead, and made again with these.
    """
    options = config.model_dump(include=config.model_fields_set & _REPEATED)
    options |= {"grey": True} if teacher.input_size[2] == 1 else {}
    if inputs and teacher.provenance.get("kind") == "pretrained":
        args = [f"{name}={value!r}" for name, value in teacher.arch_args.items()]
        options |= {"teacher": teacher.provenance["name"], "teacher_args": args}
    options |= {f"teacher_{name}": value for name, value in inputs.items() if name != "resize"}
    return shell_command("train", {"method": method, **options})


def _probe(teacher: Any, config: ValidateConfig, splits: Splits) -> None:
    """Measure candidate input formats of the teacher; print the options of the best, and write them beside it."""
    from kdcli.teacher import assumptions

    found = assumptions.probe(
        str(config.teacher), teacher, splits.test, "trying likely inputs", output.on_event
    )
    best = found[0]
    output.json({"teacher": config.teacher, "data": splits.label, "inputs": list(map(asdict, found))})
    output.table(
        [
            f"input of {config.teacher}, on {best.count} images of {splits.label}",
            "accuracy, %",
            "95 % interval",
        ],
        [[each.text or "as set", f"{each.accuracy:.1f}", output.interval(each.interval)] for each in found],
    )
    if best.text:
        output.text(assumptions.advice(teacher, splits.test, best))
    if not best.by_text:
        replaced = ("scale", "mean", "std") if "scale" in best.options else ()
        kept = {name: value for name, value in config.given.items() if name not in replaced}
        inputs = {**kept, **best.options}
        recorded = {name: inputs[key] for name in INPUTS if (key := name.removeprefix("teacher_")) in inputs}
        if recorded and teacher.is_foreign:
            path = inputs_file(config.teacher)
            try:
                write_text(path, tomli_w.dumps({"sha256": sha256_file(config.teacher), **recorded}))
                output.text(f"wrote {path.as_posix()}: kd train takes this input where no other is set")
            except OSError as error:
                output.note(
                    f"cannot write {path.as_posix()}: {reason(error)}; the command below sets this input"
                )
        output.next_command(_training(config, "kd", inputs, teacher))


def _compare(teacher: Any, config: ValidateConfig, data: ImageSet, on_event: OnEvent) -> Agreement:
    """Compare a checkpoint's logits with those of OpenCV's Caffe importer on test images."""
    import numpy as np

    from kdcli.caffe import opencv
    from kdcli.data.rows import take

    assert config.against is not None
    count = min(config.images, len(data))
    samples = np.arange(count) * len(data) // count  # spread: folders are sorted by class
    images = take(data.images, samples)
    return opencv.compare_logits(teacher, config.against, config.prototxt, images, on_event=on_event)
