"""Recipes: named sets of kd train's settings, and TOML files of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcli.base.errors import KdError, UsageError
from kdcli.base.files import read_document
from kdcli.base.names import nearest

# seed: settings of the reference code. teacher: CifarNet trained on labels with SGD (airbench94, arXiv:2404.00498).
# patient: long schedule, cached augmented views, mostly soft targets (Beyer et al., arXiv:2106.05237).
RECIPES: dict[str, dict[str, Any]] = {
    "seed": {
        "optimizer": "adam",
        "lr": 1e-3,
        "schedule": "step",
        "batch_size": 256,
        "epochs": 100,
        "augment": "none",
        "preprocess": "mean-image",
        "teacher_dropout": 0.5,
        "dropout": 0.5,
    },
    "teacher": {
        "method": "ce",
        "student": "cifarnet",
        "optimizer": "sgd",
        "lr": 0.26,
        "weight_decay": 0.00133,
        "epochs": 24,
        "augment": "flip-crop",
        "ema": 0.995,
    },
    "patient": {
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.02,
        "dropout": 0.2,
        "epochs": 30,
        "augment": "flip-crop",
        "views": 10,
        "tau": 4.0,
        "lamda": 0.1,
    },
}


def read_recipe(name: str, typed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings of a recipe in `RECIPES` or of a TOML file, by kd train's options; UsageError if it cannot be read.

    `views` of a recipe in `RECIPES` is for its augmentation: another one, `typed`, may have fewer.
    A run's config.toml lists in `filled` the settings that were derived from others. With options `typed` on the
    command line these are left out, and so derived again.
    """
    if name in RECIPES:
        recipe = RECIPES[name]
        same_views = (typed or {}).get("augment", recipe.get("augment")) == recipe.get("augment")
        return {key: value for key, value in recipe.items() if key != "views" or same_views}
    path = Path(name)
    if path.suffix != ".toml":
        raise UsageError(f"unknown recipe: {name}", nearest(name, RECIPES, ", or a .toml file"))
    try:
        document = read_document(path)
    except KdError as error:
        raise UsageError(error.message, "A recipe is TOML: lines such as epochs = 60.") from error
    filled = document.pop("filled", [])
    values: dict[str, Any] = {}
    for key, value in document.items():
        setting = "lamda" if key == "lambda" else key.replace("-", "_")
        if setting in values:
            raise UsageError(f"recipe {name} sets {setting} twice, the second time as {key}", "Keep one.")
        values[setting] = value
    if isinstance(filled, list) and typed is not None:
        values = {key: value for key, value in values.items() if key not in filled}
    return values
