"""Loss functions: pure, from tensors to a scalar, each its paper's formula.

All are float32, or float64 where the student's side is: half types are promoted first, so call them outside autocast,
whose matrix products would be bfloat16 again. No gradient reaches the teacher's side, and no value is waited for.
"""

from __future__ import annotations

from kdcli.methods.losses.contrast import Contrast, Negatives, contrastive
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
from kdcli.methods.losses.maps import (
    Hint,
    Review,
    Variational,
    attention,
    hint,
    review,
    same_size,
    variational,
)
from kdcli.methods.losses.pairwise import probabilistic, relational, similarity

__all__ = [
    "Contrast",
    "Hint",
    "Negatives",
    "Review",
    "Variational",
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
