"""What a study has found: its best trial as a command, and which settings mattered."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import optuna

from kdcli.base.config import words_of
from kdcli.methods import TrainConfig
from kdcli.studies.tune.space import apply
from kdcli.studies.tune.study import Trial

_ENOUGH = 5  # finished trials, below which a share of the variance means nothing


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The finished trial with the highest accuracy; of equals the first."""
    done = [trial for trial in trials if trial.state == "complete" and trial.accuracy is not None]
    return max(done, key=lambda trial: (trial.accuracy or 0.0, -trial.number), default=None)


def config_of(trial: Trial, config: TrainConfig) -> TrainConfig:
    """The settings of a trial's run, of the first where it had several seeds.

    The precision is the one it was computed in: `auto` may settle for another next time.
    """
    settled = {"precision": trial.precision} if trial.precision else {}
    return apply(config, {**trial.values, **settled})


def command_of(config: TrainConfig) -> str:
    """The kd train that has these settings: all that are not defaults, quoted for a shell."""
    words = ["kd", "train"]
    for name, field in TrainConfig.model_fields.items():
        value = getattr(config, name)
        if value == field.default or value is None or name == "name":
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        flag = str(extra.get("flag", "--" + name.replace("_", "-")))
        words += words_of(flag, value)
    return shlex.join(words)


def importance(study: optuna.Study, trials: Sequence[Trial]) -> tuple[dict[str, float], str]:
    """Each setting's share of what accuracies differ by (fANOVA), largest first; or none, and why.

    Hutter, Hoos & Leyton-Brown, ICML 2014: a forest predicts the accuracy from the settings, and its variance is
    split among them. Settings that only some trials have are left out.
    """
    done = [trial for trial in trials if trial.state == "complete"]
    if len(done) < _ENOUGH:
        return {}, f"{len(done)} finished trials are too few to say what matters; it takes {_ENOUGH}"
    if len({trial.accuracy for trial in done}) == 1:
        return {}, "all finished trials have the same accuracy, so nothing can be said of what matters"
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except RuntimeError:  # the forest has not split anywhere
        return {}, "the settings do not tell accuracies apart, so nothing can be said of what matters"
    if not found:
        return {}, "no setting is in all trials, so nothing can be said of what matters"
    return {name: float(share) for name, share in found.items()}, ""
