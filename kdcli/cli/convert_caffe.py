"""`kd convert-caffe`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli import _ui
from kdcli.cli._options import options_of
from kdcli.config import ConvertConfig, make

if TYPE_CHECKING:
    from kdcli.caffe import Conversion


@options_of(ConvertConfig)
def convert_caffe(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A .caffemodel, or a .npy of caffe-tensorflow.")
    ],
    **options: Any,
) -> None:
    """Turn a Caffe network into a teacher: weights by layer name, Caffe's own arithmetic, its preprocessing.

    Nothing in the files is executed. --data is read only to fit the preprocessing, or to learn the size.
    """
    config = make(ConvertConfig, options)
    from kdcli import caffe, data
    from kdcli.models import parameter_count

    with _ui.progress() as on_event:
        source = caffe.read(model, config)
        splits = None
        if "data" in options or source.needs_images(config):
            splits = data.load(
                config.data,
                data_dir=config.data_dir,
                cache_dir=config.cache_dir,
                image_size=config.image_size,
                grey=source.channels == 1,
                fit_to=source.input_size,
                on_event=on_event,
            )
        conversion = caffe.to_classifier(
            source,
            config,
            train_images=splits.train.images if splits else None,
            classes=splits.train.classes if splits else None,
            data_label=splits.label if splits else None,
            on_event=on_event,
        )
    conversion.classifier.save(config.output)
    if _ui.settings.json:
        _ui.json(_as_json(model, config, conversion))
        return
    _table(conversion)
    classifier = conversion.classifier
    height, width, channels = classifier.input_size
    _ui.say()
    _ui.say(
        f"{classifier.provenance['name']}: {_ui.count(parameter_count(classifier.network))} parameters, "
        f"images {height}×{width}×{channels}, {len(classifier.classes)} classes, "
        f"preprocessing {classifier.preprocess.name} {classifier.preprocess.channel_order}"
    )
    if conversion.known is None:
        _ui.note("these weights are not on kd's list: nothing is known of their accuracy")
    _ui.say(f"wrote {config.output.as_posix()}")
    words = ["kd", "validate"]
    words += ["--teacher", config.output.as_posix()] if "output" in options else []
    words += ["--data", config.data] if "data" in options else []
    words += ["--against", str(model)] if source.kind == "caffe" else []
    words += ["--prototxt", str(config.prototxt)] if source.kind == "caffe" and config.prototxt else []
    _ui.next_command(shlex.join(words))


def _table(conversion: Conversion) -> None:
    rows = []
    for row in conversion.rows:
        shapes = " ".join("×".join(map(str, shape)) for shape in row.weight_shapes.values())
        output = "×".join(map(str, row.output_shape))
        rows.append([row.name, row.type, output, shapes, f"{row.parameters:,}" if row.parameters else ""])
    _ui.table(["layer", "type", "output", "weights", "parameters"], rows, left=2)


def _as_json(model: Path, config: ConvertConfig, conversion: Conversion) -> dict[str, Any]:
    classifier = conversion.classifier
    return {
        "model": str(model),
        "output": str(config.output),
        "arch": classifier.arch,
        "classes": list(classifier.classes),
        "input_size": list(classifier.input_size),
        "preprocess": {
            "name": classifier.preprocess.name,
            "channel_order": classifier.preprocess.channel_order,
        },
        "provenance": classifier.provenance,
        "parameters": sum(row.parameters for row in conversion.rows),
        "layers": [
            {
                "name": row.name,
                "type": row.type,
                "output_shape": list(row.output_shape),
                "weight_shapes": {name: list(shape) for name, shape in row.weight_shapes.items()},
                "parameters": row.parameters,
            }
            for row in conversion.rows
        ],
    }


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "convert-caffe",
        no_args_is_help=True,
        epilog="[bold]kd convert-caffe weights/cifar10_nin.caffemodel[/bold]\n\n"
        "[bold]kd convert-caffe net.caffemodel --prototxt deploy.prototxt -o weights/net.pt[/bold]",
    )(convert_caffe)
