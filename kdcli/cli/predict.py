"""`kd predict`."""

from pathlib import Path
from typing import Annotated

import typer

from kdcli.base.config import PredictConfig
from kdcli.cli import output
from kdcli.cli.arguments import check_image_size, existing_model
from kdcli.cli.options import command, examples

EPILOG = examples(
    "kd predict exports/kd-lenet-1.onnx cat.jpg",
    "kd predict runs/kd-lenet-1/student.pt photos/ --top-k 1 --json",
)


@command(PredictConfig, without={"class_map"})
def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Run, checkpoint (.pt) or ONNX file.")],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE", help="Image files, folders or archives of them.")
    ],
    config: PredictConfig,
) -> None:
    """Classify images and show the top classes with their probabilities."""
    model = existing_model(model)
    from kdcli.base import runtime
    from kdcli.deploy.load import load_model
    from kdcli.deploy.predict import predict as classify

    runtime.set_threads(config.threads)
    loaded = load_model(model, config.threads, config)
    check_image_size(model, loaded.input_size, config.image_size)
    predictions = list(classify(loaded, images, config, on_event=output.on_event))
    documents, rows = [], []
    for found in predictions:
        top = list(zip(found.classes, found.probabilities, strict=True))
        shares = [{"class": name, "probability": probability} for name, probability in top]
        documents.append({"image": found.image, "top": shares})
        percent = [f"{100 * probability:.2f}" for _, probability in top]
        rows.append([found.image, "\n".join(found.classes), "\n".join(percent)])
    output.json({"model": str(model), "classes": list(loaded.classes), "images": documents})
    output.table(["image", "class", "probability, %"], rows, left=2)
