"""Results of a study: its best trial as a command, the importance of each setting, figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import optuna

from kdcli.base.config import option_flag, shell_command
from kdcli.base.plotting import BLUE, FRONT, GREEN, GRID, ORANGE, drawn_to, shown
from kdcli.methods import TrainConfig
from kdcli.studies.tune.settings import TuneConfig
from kdcli.studies.tune.space import apply
from kdcli.studies.tune.study import Trial, trials_of

_ENOUGH = 5  # finished trials, below which shares of the variance mean nothing


@dataclass(frozen=True)
class TuneResult:
    """Result of a study.

    Attributes:
        folder: holds the runs of its trials and its figures.
        storage: address of its database, without secrets.
        trials: finished, running and waiting ones.
        best: the finished trial with the highest validation accuracy; None if none is finished.
        config: settings of its run, of the first one with several seeds.
        run: that run's folder; None if it was trained on another machine.
        importance: each setting's share, largest first; empty for the reason in `why_not`.
        figures: files that were drawn.
    """

    study: str
    folder: Path
    storage: str
    trials: tuple[Trial, ...]
    best: Trial | None
    config: TrainConfig | None
    run: Path | None
    importance: dict[str, float]
    why_not: str
    figures: tuple[Path, ...]

    def count(self, state: str) -> int:
        """How many trials are in a state."""
        return sum(trial.state == state for trial in self.trials)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "study": self.study,
            "folder": self.folder.as_posix(),
            "storage": self.storage,
            "best": vars(self.best) if self.best else None,
            "command": command_of(self.config) if self.config else None,
            "run": self.run.as_posix() if self.run else None,
            "importance": self.importance,
            "trials": [vars(trial) for trial in self.trials],
            "figures": [path.as_posix() for path in self.figures],
        }


def summarize(config: TuneConfig, study: optuna.Study, address: str) -> TuneResult:
    """The current result of a study; draws its figures.

    Raises:
        KdError: a figure cannot be written.
    """
    trials = trials_of(study)
    shares, why_not = importance(study, trials)
    folder = config.runs_dir / config.study_name
    drawn: list[Path] = []
    best, settings, run = best_of(trials), None, None
    if best is not None:
        # with the precision it was computed in, because `auto` may choose another next time
        precision = {"precision": best.precision} if best.precision else {}
        settings = apply(config.train, {**best.values, **precision})
        run = run_folder(config, best.number, config.seed)
        drawn.append(folder / "trials.svg")
        draw_history(trials, drawn[-1])
    if shares:
        drawn.append(folder / "importance.svg")
        draw_importance(shares, drawn[-1])
    return TuneResult(
        study=config.study_name,
        folder=folder,
        storage=address,
        trials=trials,
        best=best,
        config=settings,
        run=run if run is not None and run.is_dir() else None,
        importance=shares,
        why_not=why_not,
        figures=tuple(drawn),
    )


def trial_folder(config: TuneConfig, number: int) -> Path:
    """The folder of a trial."""
    return config.runs_dir / config.study_name / f"trial-{number:04d}"


def run_folder(config: TuneConfig, number: int, seed: int) -> Path:
    """The folder of a trial's run with a seed."""
    folder = trial_folder(config, number)
    return folder if config.seeds == 1 else folder / f"seed-{seed}"


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The finished trial with the highest accuracy; of equals the first."""
    finished = [trial for trial in trials if trial.state == "complete" and trial.accuracy is not None]
    return max(finished, key=lambda trial: (trial.accuracy or 0.0, -trial.number), default=None)


def command_of(config: TrainConfig) -> str:
    """The kd train command with these settings: all that are not defaults, quoted for a shell."""
    changed = {
        name: getattr(config, name)
        for name, field in TrainConfig.model_fields.items()
        if name != "name" and getattr(config, name) != field.default
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


def draw_importance(shares: Mapping[str, float], target: Path) -> None:
    """Draw each setting's share as a bar, the largest on top."""
    names = list(shares)[::-1]
    with drawn_to(target, 7.2, 1.2 + 0.4 * len(names)) as figure:
        axes = figure.add_subplot()
        percent = [100 * shares[name] for name in names]
        bars = axes.barh(range(len(names)), percent, color=BLUE, height=0.6)
        axes.bar_label(bars, [f"{value:.0f} %" for value in percent], padding=4)
        axes.set_yticks(range(len(names)), [shown(option_flag(name)) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 110)
        axes.set_xlabel("share of the variance of accuracies, %")
        axes.grid(axis="x", color=GRID, linewidth=0.6)


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
