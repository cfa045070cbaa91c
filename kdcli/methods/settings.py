"""Settings of `kd train`: the general ones and those of the registered methods."""

from __future__ import annotations

from kdcli.base.config import TrainSettings

TrainConfig = TrainSettings
