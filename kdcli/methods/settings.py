"""Settings of `kd train`: the general ones and those of the methods in this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import create_model

from kdcli.base.config import TrainSettings
from kdcli.methods.registry import METHODS, discover

discover("kdcli.methods")

if TYPE_CHECKING:
    TrainConfig = TrainSettings
else:
    TrainConfig = create_model(
        "TrainConfig",
        __base__=TrainSettings,
        __module__=__name__,
        __doc__=TrainSettings.__doc__,
        **{name: field for entry in METHODS.values() for name, field in entry.fields.items()},
    )
