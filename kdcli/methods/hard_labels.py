"""Methods that learn from labels, without a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from kdcli.methods import losses
from kdcli.methods.batch import Batch
from kdcli.methods.registry import CE, method, option

if TYPE_CHECKING:
    from torch import Tensor

Smoothing = Annotated[
    float, option("share of each label distributed over all classes", name="label_smoothing", ge=0, lt=1)
]


@method(CE, source="cross-entropy", needs=("labels",), needs_teacher=False)
def cross_entropy(batch: Batch) -> Tensor:
    """Cross-entropy on labels, without a teacher: the baseline."""
    return label_smoothing(batch, smoothing=0.0)


@method("ls", source="Szegedy et al., CVPR 2016, section 7", needs=("labels",), needs_teacher=False)
def label_smoothing(batch: Batch, *, smoothing: Smoothing = 0.1) -> Tensor:
    """Cross-entropy on smoothed labels, without a teacher."""
    mixup = batch.other_labels, batch.shares
    return losses.logits.cross_entropy(batch.student_logits, batch.labels, smoothing, *mixup)
