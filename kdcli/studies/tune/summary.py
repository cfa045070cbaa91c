"""Results of a study: its best trial as a command, the importance of each setting, a figure of all trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import optuna

from kdcli.base.config import shell_command
from kdcli.base.plotting import BLUE, FRONT, GREEN, GRID, ORANGE, drawn_to
from kdcli.methods import TrainConfig
from kdcli.studies.tune.space import TuneConfig, apply
from kdcli.studies.tune.study import Trial, trials_of

_ENOUGH = 5  # finished trials that shares of the variance require


@dataclass(frozen=True)
class TuneResult:
    """Result of a study."""

    settings: TuneConfig
    storage: str  # address of its database, without secrets
    trials: tuple[Trial, ...]  # finished, running and waiting ones
    importance: dict[str, float]  # each setting's share, largest first; empty for the reason in `why_not`
    why_not: str
    figure: Path | None  # None without a finished trial

    @property
    def best(self) -> Trial | None:
        return best_of(self.trials)

    @property
    def config(self) -> TrainConfig | None:
        """Settings of the best trial's run, of the first one with several seeds."""
        if self.best is None:
            return None
        # with the precision it was computed in, because `auto` may choose another next time
        precision = {"precision": self.best.precision} if self.best.precision else {}
        return apply(self.settings.train, {**self.best.values, **precision})

    @property
    def run(self) -> Path | None:
        """That run's folder; None if it was trained on another machine."""
        folder = self.settings.run_folder(self.best.number, self.settings.seed) if self.best else None
        return folder if folder is not None and folder.is_dir() else None

    def count(self, state: str) -> int:
        return sum(trial.state == state for trial in self.trials)

    def to_dict(self) -> dict[str, Any]:
        return {
            "study": self.settings.study_name,
            "folder": self.settings.folder.as_posix(),
            "storage": self.storage,
            "best": vars(self.best) if self.best else None,
            "command": command_of(self.config) if self.config else None,
            "run": self.run.as_posix() if self.run else None,
            "importance": self.importance,
            "trials": [vars(trial) for trial in self.trials],
            "figure": self.figure,
        }


def summarize(config: TuneConfig, study: optuna.Study, address: str) -> TuneResult:
    """The current result of a study; draws its figure."""
    trials = trials_of(study)
    figure = config.folder / "trials.svg" if best_of(trials) is not None else None
    if figure is not None:
        draw_history(trials, figure)
    return TuneResult(config, address, trials, *importance(study, trials), figure)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The finished trial with the highest accuracy; of equals the first."""
    finished = [trial for trial in trials if trial.state == "complete" and trial.accuracy is not None]
    return max(finished, key=lambda trial: (trial.accuracy or 0.0, -trial.number), default=None)


def command_of(config: TrainConfig) -> str:
    """The kd train command with these settings: the data, and all that are not defaults, quoted for a shell."""
    changed = {
        name: getattr(config, name)
        for name, field in TrainConfig.model_fields.items()
        if name == "data" or (name != "name" and getattr(config, name) != field.default)
    }
    return shell_command("train", changed)


def importance(study: optuna.Study, trials: Sequence[Trial]) -> tuple[dict[str, float], str]:
    """Each setting's share of the variance of accuracies (fANOVA), largest first; or none, and why.

    Hutter, Hoos & Leyton-Brown, ICML 2014: a random forest predicts the accuracy from the settings, and its variance
    is split among them. Settings that only some trials have are left out.
    """
    finished = [trial for trial in trials if trial.state == "complete"]
    if len(finished) < _ENOUGH:
        return {}, f"importance of settings: {len(finished)} finished trials are too few, it takes {_ENOUGH}"
    if len({trial.accuracy for trial in finished}) == 1:
        return {}, "importance of settings: all finished trials have the same accuracy"
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except RuntimeError:  # the forest has no split
        shares = {}
    if not shares:
        return {}, "importance of settings: no setting explains the accuracies of all trials"
    return {name: float(share) for name, share in shares.items()}, ""


def draw_history(trials: Sequence[Trial], target: Path) -> None:
    """Draw the accuracy of each trial by number, and the best so far."""
    from matplotlib.ticker import MaxNLocator

    with drawn_to(target, 7.2, 4.0) as figure:
        axes = figure.add_subplot()
        finished = [trial for trial in trials if trial.state == "complete"]
        numbers = [trial.number for trial in finished]
        best = list(accumulate((trial.accuracy or 0.0 for trial in finished), max))
        axes.step(numbers, best, where="post", color=FRONT, linewidth=1.5, label="best so far")
        for state, colour, label in (("complete", BLUE, "finished"), ("pruned", ORANGE, "pruned")):
            own = [trial for trial in trials if trial.state == state and trial.accuracy is not None]
            if own:
                x, y = [trial.number for trial in own], [trial.accuracy or 0.0 for trial in own]
                axes.scatter(x, y, s=30, color=colour, label=label, zorder=2)
        if finished:
            top = numbers[best.index(best[-1])]
            axes.plot([top], [best[-1]], "o", markersize=9.5, mfc="none", mec=GREEN, mew=1.8, zorder=3)
            axes.set_title(f"best {best[-1]:.2f} % in trial {top}", fontsize=9, loc="right")
        axes.set_xlabel("trial")
        axes.set_ylabel("validation accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=GRID, linewidth=0.6)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9)
