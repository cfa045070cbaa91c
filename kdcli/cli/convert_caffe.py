"""`kd convert-caffe`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.base import units
from kdcli.base.config import ConvertConfig, ExportConfig, make, words_of
from kdcli.base.errors import KdError, UsageError
from kdcli.base.text import dims
from kdcli.cli import _ui
from kdcli.cli._options import examples, options_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kdcli.base.events import OnEvent
    from kdcli.caffe import CaffeFiles, Conversion
    from kdcli.caffe.opencv import Agreement
    from kdcli.data import Splits
    from kdcli.models import Classifier

EPILOG = examples(
    "kd convert-caffe weights/cifar10_nin.caffemodel",
    "kd convert-caffe net.caffemodel --prototxt deploy.prototxt -o weights/net.pt",
    "kd convert-caffe net.caffemodel --check --to onnx",
)


@options_of(ConvertConfig)
def convert_caffe(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A .caffemodel, or a .npy of caffe-tensorflow.")
    ],
    **options: Any,
) -> None:
    """Convert a Caffe network to a teacher, with Caffe's arithmetic and the network's own preprocessing.

    No code in the files is executed. --data is read only for fitting the preprocessing, for the input size, or for
    --check.
    """
    config = make(ConvertConfig, options)
    target, to_onnx = _target(model, config, explicit="output" in options)
    from kdcli import caffe
    from kdcli.caffe import opencv

    with _ui.progress() as on_event:
        # 1. Read the files, and the data if they are needed.
        source = caffe.read(model, config)
        if config.check and source.kind != "caffe":
            raise UsageError("--check needs a caffemodel", "OpenCV does not read caffe-tensorflow's .npy.")
        explicit_data = "data" in options
        needs_data = explicit_data or source.needs_images(config)
        splits = _load_data(source, config, explicit_data, on_event) if needs_data else None
        train_images = splits.train.images if splits else None
        # 2. Convert.
        conversion = caffe.to_classifier(
            source,
            config,
            train_images=train_images,
            classes=splits.train.classes if splits else None,
            data_label=splits.label if splits else None,
            on_event=on_event,
        )
        classifier = conversion.classifier
        # 3. Check against OpenCV, then write.
        images = opencv.check_images(classifier.input_size, train_images)
        agreement = _check(classifier, model, config, images, on_event) if config.check else None
        if to_onnx:
            from kdcli.deploy.export import export_classifier

            label = f"noise and {splits.label}" if splits else "noise"
            export_classifier(classifier, make(ExportConfig, {"output": target}), images, label, on_event)
        else:
            classifier.save(target)
    if _ui.settings.json:
        _ui.json(_to_json(model, target, conversion, agreement))
        return
    _render(conversion, target, agreement)
    if to_onnx:
        _ui.next_command(shlex.join(["kd", "bench", target.as_posix()]))
        return
    command = ["kd", "validate"]
    command += words_of("--teacher", target if "output" in options else ())
    command += words_of("--data", config.data if explicit_data else ())
    if source.kind == "caffe":
        command += words_of("--against", model) + words_of("--prototxt", config.prototxt or ())
    _ui.next_command(shlex.join(command))


def _target(model: Path, config: ConvertConfig, *, explicit: bool) -> tuple[Path, bool]:
    """The output file, and whether it is ONNX."""
    onnx_suffix = config.output.suffix.lower() == ".onnx"
    to_onnx = config.to == "onnx" or (config.to == "auto" and onnx_suffix)
    if not explicit and to_onnx:
        return Path("exports") / f"{model.stem}.onnx", True
    if explicit and onnx_suffix != to_onnx:
        raise UsageError(f"--output {config.output} does not match --to {config.to}")
    return config.output, to_onnx


def _check(
    classifier: Classifier,
    model: Path,
    config: ConvertConfig,
    images: npt.NDArray[np.uint8],
    on_event: OnEvent,
) -> Agreement:
    """Compare with OpenCV's reading of the same files; raise KdError if the two differ."""
    from kdcli.caffe import opencv

    agreement = opencv.compare_logits(classifier, model, config.prototxt, images, on_event=on_event)
    if agreement.holds:
        return agreement
    raise KdError(
        f"OpenCV reads another network from {model}: {agreement.text()}",
        "No file was written. Convert without --check to write it anyway.",
    )


def _load_data(source: CaffeFiles, config: ConvertConfig, explicit: bool, on_event: OnEvent) -> Splits:
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
            skip_broken=config.skip_broken,
            on_event=on_event,
        )
    except KdError as error:
        if explicit or source.input_size is not None:
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


def _render(conversion: Conversion, target: Path, agreement: Agreement | None) -> None:
    _ui.table(
        ["layer", "type", "output", "weights", "parameters"],
        [
            [
                layer.name,
                layer.type,
                dims(layer.output_shape),
                " ".join(map(dims, layer.weight_shapes.values())),
                f"{layer.parameters:,}" if layer.parameters else "",
            ]
            for layer in conversion.layers
        ],
        left=2,
    )
    classifier = conversion.classifier
    parameters = sum(weight.numel() for weight in classifier.network.parameters())
    _ui.say()
    _ui.say(
        f"{classifier.provenance['name']}: {units.count(parameters)} parameters, "
        f"images {dims(classifier.input_size)}, {len(classifier.classes)} classes, "
        f"preprocessing {classifier.preprocess.name} {classifier.preprocess.channel_order}"
    )
    if conversion.known is None:
        _ui.note("no published accuracy is known for these weights")
    if agreement is not None:
        _ui.say(f"largest difference from OpenCV: {agreement.text()}")
    _ui.say(f"wrote {target.as_posix()}")


def _to_json(
    model: Path, target: Path, conversion: Conversion, agreement: Agreement | None
) -> dict[str, Any]:
    classifier = conversion.classifier
    preprocess = classifier.preprocess
    return {
        "model": str(model),
        "output": str(target),
        "check": None if agreement is None else agreement.to_json(),
        "arch": classifier.arch,
        "classes": list(classifier.classes),
        "input_size": list(classifier.input_size),
        "preprocess": {"name": preprocess.name, "channel_order": preprocess.channel_order},
        "provenance": classifier.provenance,
        "parameters": sum(layer.parameters for layer in conversion.layers),
        "layers": [asdict(layer) for layer in conversion.layers],
    }
