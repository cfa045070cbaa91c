"""Settings of `kd tune`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kdcli.base.config.settings import FolderName, about, make
from kdcli.base.config.train import TrainConfig

SEARCH = "Search"


class TuneConfig(TrainConfig):
    """`kd tune`: the settings of kd train that all trials share, and those of the search."""

    trials: int = Field(
        20,
        ge=1,
        le=100_000,
        description="Trials of the study in all: typed again, the command does those that are missing.",
        json_schema_extra=about(SEARCH),
    )
    study: FolderName = Field(
        "",
        max_length=200,
        description="Name of the study and of its folder in --runs-dir; by default of method and student.",
        json_schema_extra=about(SEARCH),
    )
    storage: str = Field(
        "",
        description="The study's database, an SQLAlchemy URL that several machines can share; by default SQLite "
        "in the study's folder.",
        json_schema_extra=about(SEARCH, metavar="URL"),
    )
    sampler: Literal["tpe", "random"] = Field(
        "tpe",
        description="How values are drawn: by what did well so far, or evenly. --seed repeats the draws.",
        json_schema_extra=about(SEARCH),
    )
    pruner: Literal["median", "none"] = Field(
        "median",
        description="median: end a trial whose best epoch so far is below the median of the others there.",
        json_schema_extra=about(SEARCH),
    )
    seeds: int = Field(
        1,
        ge=1,
        le=1000,
        description="Runs of each trial, with seeds from --seed on; their mean counts.",
        json_schema_extra=about(SEARCH),
    )
    timeout: float | None = Field(
        None,
        gt=0,
        description="Begin no trial after this many minutes.",
        json_schema_extra=about(SEARCH, metavar="MINUTES"),
    )

    @property
    def study_name(self) -> str:
        """The study's name, by default made of what is tuned."""
        return self.study or f"tune-{self.method_name}-{self.student_name}"

    @property
    def train(self) -> TrainConfig:
        """The settings of a run alone."""
        return make(TrainConfig, {name: getattr(self, name) for name in TrainConfig.model_fields})
