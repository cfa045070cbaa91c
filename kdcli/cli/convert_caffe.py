"""`kd convert-caffe`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.base import units
from kdcli.base.config import ConvertConfig, DataSettings, ExportConfig, make, shell_command
from kdcli.base.errors import KdError, UsageError
from kdcli.base.text import dims
from kdcli.cli import output
from kdcli.cli.arguments import check_image_size
from kdcli.cli.options import command, examples

if TYPE_CHECKING:
    from kdcli.caffe import CaffeFiles
    from kdcli.caffe.opencv import Agreement
    from kdcli.data import Splits
    from kdcli.models import Classifier

EPILOG = examples(
    "kd convert-caffe weights/cifar10_nin.caffemodel",
    "kd convert-caffe net.caffemodel --prototxt deploy.prototxt -o weights/net.pt",
    "kd convert-caffe net.caffemodel --check -o exports/net.onnx",
)


@command(ConvertConfig)
def convert_caffe(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A .caffemodel, or a .npy of caffe-tensorflow.")
    ],
    config: ConvertConfig,
) -> None:
    """Convert a Caffe network to a teacher, with Caffe's arithmetic and the network's own preprocessing.

    Files are read without execution of code. --data is used for the preprocessing, the input size, or --check.
    """
    from kdcli import caffe, data
    from kdcli.caffe import opencv
    from kdcli.teacher import assumptions

    # 1. Read the files, and the data if they are needed.
    source = caffe.read(model, config)
    if config.check and source.kind != "caffe":
        raise UsageError("--check needs a caffemodel", "Leave --check out: OpenCV does not read .npy.")
    given = "data" in config.model_fields_set
    if not given and source.kind == "caffe" and (name := source.missing_mean(config)):
        raise UsageError(
            f"{name}, the mean image of {model}, is not in its folder",
            "Put it there, or give the mean of each channel (--mean 104,117,123), or training images (--data).",
        )
    needs_data = given or source.needs_images(config)
    splits = _load_data(source, config) if needs_data else None
    train_images = splits.train.images if splits else None
    # 2. Convert.
    classifier = caffe.to_classifier(
        source,
        config,
        train_images=train_images,
        classes=splits.train.classes if splits else None,
        data_label=splits.label if splits else None,
        on_event=output.on_event,
    )
    suited = splits.train if splits and not data.incompatibility(classifier, splits.train) else None
    if suited is not None:
        name = classifier.provenance["name"]
        assumptions.note_order(name, classifier, suited, output.on_event)
        assumptions.check(name, classifier, suited, output.on_event, task="trying alternatives")
    check_image_size(model, classifier.input_size, config.image_size)
    # 3. Check against OpenCV's reading of the same files, then write.
    images = opencv.check_images(classifier.input_size, train_images)
    agreement = None
    if config.check:
        agreement = opencv.compare_logits(
            classifier, model, config.prototxt, images, on_event=output.on_event
        )
        if not agreement.holds:
            raise KdError(
                f"OpenCV reads another network from {model}: {agreement.text()}",
                "No file was written. Convert without --check to write it anyway.",
            )
    if config.output.suffix.lower() == ".onnx":
        from kdcli.deploy.export import export_classifier

        label = f"noise and {splits.label}" if splits else "noise"
        settings = make(ExportConfig, {"output": config.output})
        export_classifier(classifier, settings, images, label, output.on_event)
    else:
        classifier.save(config.output)
    _show(model, config.output, classifier, agreement)
    output.next_command(_next(model, source.kind, config, measurable=suited is not None))


def _next(model: Path, kind: str, config: ConvertConfig, *, measurable: bool) -> str:
    """Command that measures the converted teacher, or shows it without data to measure it on."""
    if config.output.suffix.lower() == ".onnx":
        return shell_command("bench", {}, config.output)
    if not measurable:
        return shell_command("info", {}, config.output)
    given = config.model_fields_set
    options = config.model_dump(include=given & DataSettings.model_fields.keys() - {"image_size"})
    options["teacher"] = config.output if "output" in given else None
    if kind == "caffe" and importlib.util.find_spec("cv2"):
        options |= {"against": model, "prototxt": config.prototxt}
    return shell_command("validate", options)


def _load_data(source: CaffeFiles, config: ConvertConfig) -> Splits:
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
            resize=config.resize or source.resize,
            skip_broken=config.skip_broken,
            test_fraction=config.test_fraction,
            on_event=output.on_event,
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


def _show(model: Path, target: Path, classifier: Classifier, agreement: Agreement | None) -> None:
    preprocess, name = classifier.preprocess, classifier.provenance["name"]
    parameters = sum(weight.numel() for weight in classifier.network.parameters())
    output.json(
        {
            "model": model,
            "output": target,
            "check": agreement and agreement.to_dict(),
            "arch": classifier.arch,
            "classes": classifier.classes,
            "input_size": classifier.input_size,
            "resize": classifier.resize,
            "preprocess": {"name": preprocess.name, "channel_order": preprocess.channel_order},
            "provenance": classifier.provenance,
            "parameters": parameters,
        }
    )
    resize = f" (--resize {classifier.resize})" if classifier.resize else ""
    output.text(
        f"{name}: {units.count(parameters)} parameters, images {dims(classifier.input_size)}{resize}, "
        f"{len(classifier.classes)} classes, preprocessing {preprocess.name} {preprocess.channel_order}",
    )
    if agreement is not None:
        output.text(f"largest difference from OpenCV: {agreement.text()}")
    output.text(f"wrote {target.as_posix()}")
