"""Loss functions: pure, from tensors to a scalar, each its paper's formula.

All are float32, or float64 where the student's side is: half types are promoted first, so call them outside autocast,
whose matrix products would be bfloat16 again. No gradient reaches the teacher's side, and no value is waited for.
"""

from __future__ import annotations

from kdcli.methods.losses.features import attention, hint, review, same_size, variational
from kdcli.methods.losses.labels import cross_entropy, mixed_cross_entropy
from kdcli.methods.losses.logits import (
    decoupled,
    dist,
    logit_regression,
    multi_level,
    perturb,
    soft_targets,
    standardize,
)
from kdcli.methods.losses.relations import contrastive, probabilistic, relational, similarity

__all__ = [
    "attention",
    "contrastive",
    "cross_entropy",
    "decoupled",
    "dist",
    "hint",
    "logit_regression",
    "mixed_cross_entropy",
    "multi_level",
    "perturb",
    "probabilistic",
    "relational",
    "review",
    "same_size",
    "similarity",
    "soft_targets",
    "standardize",
    "variational",
]
