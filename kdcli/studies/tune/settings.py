"""Settings of `kd tune`."""

from typing import Literal

from kdcli.base.config.settings import FolderName, make, setting
from kdcli.methods import TrainConfig

SEARCH = "Search"


class TuneConfig(TrainConfig):
    """`kd tune`: the settings of kd train that all trials share, and those of the search."""

    trials: int = setting(
        20, "Trials of the study in all; rerun the command to train missing ones.", SEARCH, ge=1, le=100_000
    )
    study: FolderName = setting(
        "",
        "Name of the study and of its folder in --runs-dir; by default its method and student.",
        SEARCH,
        max_length=200,
    )
    storage: str = setting(
        "",
        "The study's database, an SQLAlchemy URL that several machines can share; by default SQLite "
        "in the study's folder.",
        SEARCH,
        metavar="URL",
    )
    sampler: Literal["tpe", "random"] = setting(
        "tpe", "Optuna's sampler of values; its draws follow from --seed.", SEARCH
    )
    pruner: Literal["median", "none"] = setting(
        "median", "median: stop a trial whose best epoch so far is below the median of the others.", SEARCH
    )
    seeds: int = setting(
        1, "Runs of each trial, with seeds from --seed on; their mean counts.", SEARCH, ge=1, le=1000
    )
    timeout: float | None = setting(
        None, "Start no trial after this many minutes.", SEARCH, gt=0, metavar="MINUTES"
    )

    @property
    def study_name(self) -> str:
        """The study's name, by default made of what is tuned."""
        return self.study or f"tune-{self.method_name}-{self.student_name}"

    @property
    def train(self) -> TrainConfig:
        """The settings of a run alone."""
        return make(TrainConfig, {name: getattr(self, name) for name in TrainConfig.model_fields})
