"""`kd convert-caffe`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.base import units
from kdcli.base.config import ConvertConfig, ExportConfig, make
from kdcli.base.errors import KdError, UsageError
from kdcli.cli import _ui
from kdcli.cli._options import options_of

if TYPE_CHECKING:
    from kdcli.base.events import OnEvent
    from kdcli.caffe import Conversion
    from kdcli.caffe.opencv import Agreement
    from kdcli.data import Splits
    from kdcli.models import Classifier


@options_of(ConvertConfig)
def convert_caffe(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A .caffemodel, or a .npy of caffe-tensorflow.")
    ],
    **options: Any,
) -> None:
    """Turn a Caffe network into a teacher: weights by layer name, Caffe's own arithmetic, its preprocessing.

    Nothing in the files is executed. --data is read only to fit the preprocessing, to learn the size, or for --check.
    """
    config = make(ConvertConfig, options)
    target, onnx = _target(model, config, typed="output" in options)
    from kdcli import caffe, data
    from kdcli.caffe import opencv
    from kdcli.models import parameter_count

    with _ui.progress() as on_event:
        source = caffe.read(model, config)
        if config.check and source.kind != "caffe":
            raise UsageError(
                "--check goes with a caffemodel", "OpenCV does not read caffe-tensorflow's .npy."
            )
        splits = None
        if "data" in options or source.needs_images(config):
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
                if "data" in options or source.input_size is not None:
                    raise
                raise KdError(
                    f"{model} does not say how large its images are, and {error.message}",
                    "Name their side with --image-size, data of that size with --data, or a deploy prototxt "
                    "with --prototxt.",
                ) from error
        conversion = caffe.to_classifier(
            source,
            config,
            train_images=splits.train.images if splits else None,
            classes=splits.train.classes if splits else None,
            data_label=splits.label if splits else None,
            on_event=on_event,
        )
        classifier = conversion.classifier
        if splits and splits.train.input_size != classifier.input_size:
            wanted, found = (
                "×".join(map(str, size)) for size in (classifier.input_size, splits.train.input_size)
            )
            raise KdError(f"{model} takes {wanted} images, {splits.label} has {found}", "See --data.")
        images = opencv.check_images(classifier.input_size, splits.train.images if splits else None)
        comparison = None
        if config.check:
            comparison = opencv.compare_logits(classifier, model, config.prototxt, images, on_event=on_event)
            if not comparison.holds:
                raise KdError(
                    f"OpenCV reads another network from {model}: {comparison.text()}",
                    "Nothing was written. One of the two is wrong about a layer; convert without --check to go on.",
                )
        if onnx:
            _write_onnx(classifier, target, images, splits, on_event)
        else:
            classifier.save(target)
    if _ui.settings.json:
        _ui.json(_as_json(model, target, conversion, comparison))
        return
    _table(conversion)
    height, width, channels = classifier.input_size
    _ui.say()
    _ui.say(
        f"{classifier.provenance['name']}: {units.count(parameter_count(classifier.network))} parameters, "
        f"images {height}×{width}×{channels}, {len(classifier.classes)} classes, "
        f"preprocessing {classifier.preprocess.name} {classifier.preprocess.channel_order}"
    )
    if conversion.known is None:
        _ui.note("these weights are not on kd's list: nothing is known of their accuracy")
    if comparison is not None:
        _ui.say(f"largest difference from OpenCV: {comparison.text()}")
    _ui.say(f"wrote {target.as_posix()}")
    if onnx:
        _ui.next_command(shlex.join(["kd", "bench", target.as_posix()]))
        return
    words = ["kd", "validate"]
    words += ["--teacher", target.as_posix()] if "output" in options else []
    words += ["--data", config.data] if "data" in options else []
    words += ["--against", str(model)] if source.kind == "caffe" else []
    words += ["--prototxt", str(config.prototxt)] if source.kind == "caffe" and config.prototxt else []
    _ui.next_command(shlex.join(words))


def _target(model: Path, config: ConvertConfig, *, typed: bool) -> tuple[Path, bool]:
    """The file to write, and whether it is ONNX; before anything is read."""
    ends = config.output.suffix.lower()
    onnx = config.to == "onnx" or (config.to == "auto" and ends == ".onnx")
    if not typed:
        return (Path("exports") / f"{model.stem}.onnx" if onnx else config.output), onnx
    if (ends == ".onnx") != onnx:
        raise UsageError(f"--output {config.output} does not go with --to {config.to}")
    return config.output, onnx


def _write_onnx(
    classifier: Classifier, target: Path, images: Any, splits: Splits | None, on_event: OnEvent
) -> None:
    from kdcli.deploy.export import export_classifier

    label = f"noise and {splits.label}" if splits else "noise"
    export_classifier(classifier, make(ExportConfig, {"output": target}), images, label, on_event)


def _table(conversion: Conversion) -> None:
    rows = []
    for row in conversion.layers:
        shapes = " ".join("×".join(map(str, shape)) for shape in row.weight_shapes.values())
        output = "×".join(map(str, row.output_shape))
        rows.append([row.name, row.type, output, shapes, f"{row.parameters:,}" if row.parameters else ""])
    _ui.table(["layer", "type", "output", "weights", "parameters"], rows, left=2)


def _as_json(
    model: Path, target: Path, conversion: Conversion, comparison: Agreement | None
) -> dict[str, Any]:
    classifier = conversion.classifier
    return {
        "model": str(model),
        "output": str(target),
        "check": None if comparison is None else comparison.to_json(),
        "arch": classifier.arch,
        "classes": list(classifier.classes),
        "input_size": list(classifier.input_size),
        "preprocess": {
            "name": classifier.preprocess.name,
            "channel_order": classifier.preprocess.channel_order,
        },
        "provenance": classifier.provenance,
        "parameters": sum(row.parameters for row in conversion.layers),
        "layers": [
            {
                "name": row.name,
                "type": row.type,
                "output_shape": list(row.output_shape),
                "weight_shapes": {name: list(shape) for name, shape in row.weight_shapes.items()},
                "parameters": row.parameters,
            }
            for row in conversion.layers
        ],
    }


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "convert-caffe",
        no_args_is_help=True,
        epilog="[bold]kd convert-caffe weights/cifar10_nin.caffemodel[/bold]\n\n"
        "[bold]kd convert-caffe net.caffemodel --prototxt deploy.prototxt -o weights/net.pt[/bold]\n\n"
        "[bold]kd convert-caffe net.caffemodel --check --to onnx[/bold]",
    )(convert_caffe)
