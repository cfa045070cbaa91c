"""`kd convert-caffe`."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.base import units
from kdcli.base.config import ConvertConfig, DataSettings, ExportConfig, make, shell_command
from kdcli.base.errors import KdError, UsageError
from kdcli.base.text import dims
from kdcli.cli import output
from kdcli.cli.options import command, examples

if TYPE_CHECKING:
    from kdcli.base.events import OnEvent
    from kdcli.caffe import CaffeFiles, Conversion
    from kdcli.caffe.opencv import Agreement
    from kdcli.data import Splits

EPILOG = examples(
    "kd convert-caffe weights/cifar10_nin.caffemodel",
    "kd convert-caffe net.caffemodel --prototxt deploy.prototxt -o weights/net.pt",
    "kd convert-caffe net.caffemodel --check --to onnx",
)


@command(ConvertConfig)
def convert_caffe(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A .caffemodel, or a .npy of caffe-tensorflow.")
    ],
    config: ConvertConfig,
) -> None:
    """Convert a Caffe network to a teacher, with Caffe's arithmetic and the network's own preprocessing.

    No code in the files is executed. --data is read only for fitting the preprocessing, for the input size, or for
    --check.
    """
    target, to_onnx = _target(model, config)
    from kdcli import caffe, data
    from kdcli.caffe import opencv
    from kdcli.teacher import assumptions

    # 1. Read the files, and the data if they are needed.
    source = caffe.read(model, config)
    if config.check and source.kind != "caffe":
        raise UsageError("--check needs a caffemodel", "OpenCV does not read caffe-tensorflow's .npy.")
    needs_data = "data" in config.model_fields_set or source.needs_images(config)
    splits = _load_data(source, config, output.on_event) if needs_data else None
    train_images = splits.train.images if splits else None
    # 2. Convert.
    conversion = caffe.to_classifier(
        source,
        config,
        train_images=train_images,
        classes=splits.train.classes if splits else None,
        data_label=splits.label if splits else None,
        on_event=output.on_event,
    )
    classifier = conversion.classifier
    suited = splits.train if splits and not data.incompatibility(classifier, splits.train) else None
    if suited is not None:
        name = classifier.provenance["name"]
        assumptions.note_order(name, classifier, suited, output.on_event)
        assumptions.check(name, classifier, suited, output.on_event, task="trying alternatives")
    # 3. Check against OpenCV's reading of the same files, then write.
    images = opencv.check_images(classifier.input_size, train_images)
    agreement = None
    if config.check:
        agreement = opencv.compare_logits(
            classifier, model, config.prototxt, images, on_event=output.on_event
        )
        _require_agreement(agreement, model)
    if to_onnx:
        from kdcli.deploy.export import export_classifier

        label = f"noise and {splits.label}" if splits else "noise"
        export_classifier(classifier, make(ExportConfig, {"output": target}), images, label, output.on_event)
    else:
        classifier.save(target)
    output.json(_to_json(model, target, conversion, agreement))
    _show(conversion, target, agreement)
    if suited is None or to_onnx:
        output.next_command(shell_command("bench" if to_onnx else "info", {}, target))
    else:
        output.next_command(_validate(model, target, source.kind, config))


def _require_agreement(agreement: Agreement, model: Path) -> None:
    if not agreement.holds:
        raise KdError(
            f"OpenCV reads another network from {model}: {agreement.text()}",
            "No file was written. Convert without --check to write it anyway.",
        )


def _validate(model: Path, target: Path, kind: str, config: ConvertConfig) -> str:
    """Command that measures the converted teacher."""
    given = config.model_fields_set
    options = config.model_dump(include=given & DataSettings.model_fields.keys() - {"image_size"})
    options["teacher"] = target if "output" in given else None
    if kind == "caffe" and importlib.util.find_spec("cv2"):
        options |= {"against": model, "prototxt": config.prototxt}
    return shell_command("validate", options)


def _target(model: Path, config: ConvertConfig) -> tuple[Path, bool]:
    """The output file, and whether it is ONNX."""
    explicit = "output" in config.model_fields_set
    onnx_suffix = config.output.suffix.lower() == ".onnx"
    to_onnx = config.to == "onnx" or (config.to == "auto" and onnx_suffix)
    if not explicit and to_onnx:
        return Path("exports") / f"{model.stem}.onnx", True
    if explicit and onnx_suffix != to_onnx:
        raise UsageError(f"--output {config.output} does not match --to {config.to}")
    return config.output, to_onnx


def _load_data(source: CaffeFiles, config: ConvertConfig, on_event: OnEvent) -> Splits:
    """The data set of --data, with images of the network's size and channels."""
    from kdcli import data

    try:
        splits = data.load(
            config.data,
            data_dir=config.data_dir,
            cache_dir=config.cache_dir,
            image_size=config.image_size,
            grey=source.channels == 1,
            fit_to=source.input_size,
            crop=config.crop or source.crop,
            skip_broken=config.skip_broken,
            test_fraction=config.test_fraction,
            on_event=on_event,
        )
    except KdError as error:
        if "data" in config.model_fields_set or source.input_size is not None:
            raise
        raise KdError(
            f"{source.path} does not record its input size, and {error.message}",
            "Set the input size with --image-size, or pass data of that size with --data, or a deploy prototxt "
            "with --prototxt.",
        ) from error
    size = splits.train.input_size
    if source.input_size not in (None, size):
        raise KdError(
            f"{source.path} takes {dims(source.input_size)} images, {splits.label} has {dims(size)}",
            "Pass matching data with --data.",
        )
    return splits


def _show(conversion: Conversion, target: Path, agreement: Agreement | None) -> None:
    output.table(
        ["layer", "operation", "output", "parameters"],
        [
            [layer.name, layer.kind, dims(layer.output), f"{layer.parameters:,}" if layer.parameters else ""]
            for layer in conversion.layers
        ],
        left=2,
    )
    classifier = conversion.classifier
    parameters = sum(weight.numel() for weight in classifier.network.parameters())
    crop = "" if classifier.crop == 1 else f" (--crop {classifier.crop:.4g})"
    output.text(
        "",
        f"{classifier.provenance['name']}: {units.count(parameters)} parameters, "
        f"images {dims(classifier.input_size)}{crop}, {len(classifier.classes)} classes, "
        f"preprocessing {classifier.preprocess.name} {classifier.preprocess.channel_order}",
    )
    if conversion.known is None:
        output.note("no published accuracy is known for these weights")
    if agreement is not None:
        output.text(f"largest difference from OpenCV: {agreement.text()}")
    output.text(f"wrote {target.as_posix()}")


def _to_json(
    model: Path, target: Path, conversion: Conversion, agreement: Agreement | None
) -> dict[str, Any]:
    classifier = conversion.classifier
    preprocess = classifier.preprocess
    return {
        "model": str(model),
        "output": str(target),
        "check": None if agreement is None else agreement.to_dict(),
        "arch": classifier.arch,
        "classes": list(classifier.classes),
        "input_size": list(classifier.input_size),
        "crop": classifier.crop,
        "preprocess": {"name": preprocess.name, "channel_order": preprocess.channel_order},
        "provenance": classifier.provenance,
        "parameters": sum(layer.parameters for layer in conversion.layers),
        "layers": [asdict(layer) for layer in conversion.layers],
    }
