"""How values are drawn: each trial from a generator of its own, so that a study gone on with repeats no draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial


class ByNumber(BaseSampler):
    """Draws for a trial depend on the seed, its number and the trials before it, not on who draws or when."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.seed = seed
        self._number: int | None = None
        self._own: BaseSampler = RandomSampler()

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            seed = int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0])
            # a trial that runs elsewhere counts as one that did badly: no two processes try the same
            self._own = (
                RandomSampler(seed) if self.name == "random" else TPESampler(seed=seed, constant_liar=True)
            )
            self._number = trial.number
        return self._own

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As the sampler in question does."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values of settings that are drawn together."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The value of a setting that is drawn by itself."""
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)
