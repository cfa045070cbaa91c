"""`kd predict`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kdcli.base.config import PredictConfig, make
from kdcli.cli import _ui
from kdcli.cli._find import existing_model
from kdcli.cli._options import examples, options_of

EPILOG = examples(
    "kd predict exports/kd-lenet-1.onnx cat.jpg",
    "kd predict runs/kd-lenet-1/student.pt photos/ --top-k 1 --json",
)


@options_of(PredictConfig)
def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint (.pt) or an ONNX file.")],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE", help="Image files, folders or archives of them.")
    ],
    **options: Any,
) -> None:
    """Classify images and show the top classes with their probabilities."""
    config = make(PredictConfig, options)
    model = existing_model(model)
    from kdcli.base import runtime
    from kdcli.deploy.load import load_model
    from kdcli.deploy.predict import predict as classify

    runtime.set_threads(config.threads)
    loaded = load_model(model, config.threads)
    with _ui.progress() as on_event:
        found = list(classify(loaded, images, config, on_event=on_event))
    if _ui.settings.json:
        _ui.json(
            {
                "model": str(model),
                "classes": list(loaded.classes),
                "images": [
                    {
                        "image": one.image,
                        "top": [
                            {"class": name, "probability": share}
                            for name, share in zip(one.classes, one.probabilities, strict=True)
                        ],
                    }
                    for one in found
                ],
            }
        )
        return
    rows = [
        [
            one.image,
            "\n".join(one.classes),
            "\n".join(_ui.percent(100 * share) for share in one.probabilities),
        ]
        for one in found
    ]
    _ui.table(["image", "class", "probability, %"], rows, left=2)
