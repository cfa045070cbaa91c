"""Settings: every default, bound and help text, once. The command line and the recipe files are made from these.

A field's `description` is its help text; `json_schema_extra` may give `panel` (where --help lists it), `flag`
(in place of the field's own name), `flags` (further spellings) and `metavar`.
"""

from kdcli.config.base import DATA, METHOD, OPTIMISER, RUN, DataSettings, Settings, make
from kdcli.config.commands import (
    BenchConfig,
    ConvertConfig,
    DemoConfig,
    DownloadConfig,
    ExportConfig,
    InfoConfig,
    PredictConfig,
    ReportConfig,
    TestConfig,
    ValidateConfig,
)
from kdcli.config.train import AUGMENT_STEPS, TrainConfig

__all__ = [
    "AUGMENT_STEPS",
    "DATA",
    "METHOD",
    "OPTIMISER",
    "RUN",
    "BenchConfig",
    "ConvertConfig",
    "DataSettings",
    "DemoConfig",
    "DownloadConfig",
    "ExportConfig",
    "InfoConfig",
    "PredictConfig",
    "ReportConfig",
    "Settings",
    "TestConfig",
    "TrainConfig",
    "ValidateConfig",
    "make",
]
