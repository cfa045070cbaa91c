"""`kd info`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.base import runs, units
from kdcli.base.config import InfoConfig, InputSettings
from kdcli.base.errors import UsageError
from kdcli.base.names import nearest
from kdcli.base.results import value_rows
from kdcli.base.text import dims
from kdcli.cli import output
from kdcli.cli.arguments import check_image_size, existing_model
from kdcli.cli.options import command, examples

if TYPE_CHECKING:
    from kdcli.deploy.info import ModelInfo

_MAX_CLASSES = 20
EPILOG = examples("kd info exports/kd-lenet-1.onnx", "kd info lenet --classes 100 --image-size 64")


@command(InfoConfig, without={"class_map"})
def info(
    model_or_network: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Run, checkpoint (.pt), ONNX file, or a network's name."),
    ],
    config: InfoConfig,
) -> None:
    """Show a model's layers, parameters, MACs, preprocessing, classes and origin."""
    from kdcli import models
    from kdcli.deploy.info import info as describe

    model, path = model_or_network, Path(model_or_network)
    if path.is_file() or not models.is_network(model):
        if path.parent == Path() and not path.suffix and ":" not in model and not runs.by_name(path).exists():
            raise UsageError(f"no file and no network: {model}", nearest(model, models.names()))
        model = str(existing_model(path))
        output.note_ignored(config.model_fields_set, ("classes", "grey"), "with a file, which records it")
    else:
        reason = "with the name of a network"
        output.note_ignored(
            config.model_fields_set, InputSettings.model_fields.keys() - {"image_size"}, reason
        )
    found = describe(model, config)
    check_image_size(model, found.input_size, config.image_size)
    output.json({"model": model, **asdict(found)})
    _show(model, found)


def _show(model: str, found: ModelInfo) -> None:
    more = len(found.classes) - _MAX_CLASSES
    classes = ", ".join(found.classes[:_MAX_CLASSES]) + (f" and {more} more" if more > 0 else "")
    facts = {
        "model": model,
        "kind": " ".join(filter(None, (found.kind, found.arch))),
        "parameters": f"{found.parameters:,}",
        "work": "unknown" if found.macs is None else f"{units.count(found.macs)} MACs per image",
        "images": dims(found.input_size) + (f", --resize {found.resize}" if found.resize else ""),
        "precision": found.precision,
        "output": found.gives,
        "classes": f"{len(found.classes)}: {classes}",
    }
    if found.preprocess is not None:
        values = [f"{key} {value}" for key, value in found.preprocess.items() if key != "name"]
        facts["preprocessing"] = ", ".join([str(found.preprocess["name"]), *values])
    if found.file_bytes is not None:
        facts |= {"file": units.size(found.file_bytes), "SHA-256": str(found.sha256)}
    if found.weights_sha256 is not None:
        facts["SHA-256 of weights"] = found.weights_sha256
    known = (row for row in value_rows(found.provenance) if row[1] != "—")
    title, *rest = [*facts.items(), *known]
    output.table(title, rest, left=2)
    output.text()
    rows = [
        [
            layer.name,
            layer.kind,
            dims(layer.output) if layer.output else "—",
            f"{layer.parameters:,}" if layer.parameters else "",
            "—" if layer.macs is None else f"{layer.macs:,}" if layer.macs else "",
        ]
        for layer in found.layers
    ]
    output.table(["layer", "operation", "output", "parameters", "MACs"], rows, left=3)
