"""A method, and several of them joined: named terms, each with a weight that may change while training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kdcli.base.config import Ramp
from kdcli.base.errors import UsageError
from kdcli.methods.batch import Batch, Training
from kdcli.methods.settings import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

CE = "ce"  # the name of cross-entropy on the labels, which any method may have beside its own term


@dataclass(frozen=True)
class Method:
    """A way to learn.

    Attributes:
        loss: its own term, unweighted, a scalar; None for cross-entropy on the labels alone.
        ce_weight, weight: the default weights of cross-entropy and of its own term under these settings.
        summary, source: one line each, for help and reports.
        reads: its own settings.
        tau: its default temperature.
        needs_teacher: it reads the teacher's logits, or its features.
        needs_features: it reads maps or embeddings of both: the teacher runs in each step.
        needs_labels: its own term reads labels.
        own_network: the teacher is to be of the student's own network.
        regresses: the student's logits must take on the teacher's values, not only their softmax.
        headless: its own term reads features alone, and trains all of the student but the last layer.
        unmixed: an image has one class for it, so that mixup does not go with it.
        adapter: makes a module that learns along with the student and is not exported.
    """

    name: str
    loss: Callable[[Batch], Tensor] | None
    ce_weight: Callable[[TrainConfig], float]
    weight: Callable[[TrainConfig], Ramp]
    summary: str
    source: str
    reads: tuple[str, ...] = ()
    tau: float = 1.0
    needs_teacher: bool = True
    needs_features: bool = False
    needs_labels: bool = False
    own_network: bool = False
    regresses: bool = False
    headless: bool = False
    unmixed: bool = False
    adapter: Callable[[Training], nn.Module] | None = None


_OF_TEACHERS = (  # settings that only a method with a teacher reads
    "teacher",
    "teacher_weight",
    "teacher_dropout",
    "teacher_cache",
    "teacher_precision",
    "cache_top_k",
    "assistant",
    "generations",
)
_OF_CACHES = ("cache_top_k", "teacher_cache")  # and that a teacher run in each step does not
_OF_FEATURES = ("student_stages", "teacher_stages")


@dataclass(frozen=True)
class Objective:
    """What a run minimises: the terms of one or several methods, and cross-entropy beside them.

    Cross-entropy has the weight that the first method gives it; 1 if `ce` is named among others.
    """

    name: str
    parts: tuple[Method, ...]
    idle: tuple[str, ...] = ()  # methods whose term weighs nothing, see `active`

    @property
    def needs_teacher(self) -> bool:
        return any(part.needs_teacher for part in self.own)

    @property
    def needs_features(self) -> bool:
        return any(part.needs_features for part in self.own)

    @property
    def regresses(self) -> bool:
        return any(part.regresses for part in self.own)

    @property
    def own_network(self) -> bool:
        return any(part.own_network for part in self.parts)

    @property
    def reads(self) -> set[str]:
        """Settings of its methods."""
        return {setting for part in self.parts for setting in part.reads}

    @property
    def own(self) -> tuple[Method, ...]:
        """The methods that have a term of their own, and one that weighs something."""
        return tuple(part for part in self.parts if part.loss is not None and part.name not in self.idle)

    def ramps(self, config: TrainConfig) -> dict[str, Ramp]:
        """Weight of each term: the user's, else the method's own; terms that never weigh anything are left out.

        Raises:
            UsageError: a weight for a term there is not, or none is left.
        """
        named = any(part.loss is None for part in self.parts)
        ce = 1.0 if named else self.parts[0].ce_weight(config)
        found = {CE: Ramp(ce, ce)}
        found |= {part.name: part.weight(config) for part in self.parts if part.loss is not None}
        if config.kd_weight is not None:
            teachers = [part.name for part in self.parts if part.needs_teacher]
            if len(teachers) > 1:
                raise UsageError(
                    f"--kd-weight: method {self.name} has {len(teachers)} terms of the teacher",
                    f"Say which: --weight {teachers[0]}={config.kd_weight:g}",
                )
            found |= {name: found[name].to(config.kd_weight) for name in teachers}
        if config.ce_weight is not None:
            found[CE] = Ramp(config.ce_weight, config.ce_weight)
        for name, ramp in config.weights.items():
            if name not in found:
                raise UsageError(
                    f"--weight {name}: method {self.name} has no such term", f"It has {', '.join(found)}."
                )
            found[name] = ramp
        chosen = {name: ramp for name, ramp in found.items() if ramp.first or ramp.last}
        if not chosen:
            raise UsageError(f"all weights of method {self.name} are 0", "Raise --ce-weight or --weight.")
        return chosen

    def weights(self, config: TrainConfig, done: float = 1.0) -> dict[str, float]:
        """Weight of each term when a share of the training is done."""
        return {name: ramp.at(done) for name, ramp in self.ramps(config).items()}

    def active(self, config: TrainConfig) -> Objective:
        """The same, knowing which terms weigh nothing under these settings, so that nothing is done for them."""
        chosen = self.ramps(config)
        return replace(self, idle=tuple(part.name for part in self.parts if part.name not in chosen))

    def needs_labels(self, config: TrainConfig) -> bool:
        """Whether a term that weighs anything reads labels."""
        chosen = self.ramps(config)
        return CE in chosen or any(part.needs_labels for part in self.own if part.name in chosen)

    def trains_head(self, config: TrainConfig) -> bool:
        """Whether a term reads the student's logits; else its last layer would stay as it was made."""
        chosen = self.ramps(config)
        return CE in chosen or any(part.name in chosen and not part.headless for part in self.own)

    def adapters(self, training: Training) -> dict[str, nn.Module]:
        """The modules that learn along with the student, by the method's name."""
        return {part.name: part.adapter(training) for part in self.own if part.adapter is not None}

    def terms(self, batch: Batch, adapters: Mapping[str, nn.Module] | None = None) -> dict[str, Tensor]:
        """The named, unweighted terms whose weight is not 0, each a scalar."""
        from kdcli.methods import losses

        wanted = self.ramps(batch.config)
        found: dict[str, Tensor] = {}
        if CE in wanted:
            found[CE] = labelled(losses.cross_entropy, losses.mixed_cross_entropy)(batch)
        for part in self.own:
            if part.name in wanted and part.loss is not None:
                found[part.name] = part.loss(
                    replace(
                        batch,
                        adapter=(adapters or {}).get(part.name),
                        tau=temperature(batch.config, part.tau, batch.done),
                    )
                )
        return found

    def unread(self, settings: Iterable[str], others: Iterable[Method]) -> list[str]:
        """Those of some settings that belong to methods, and that none of these reads."""
        foreign = {setting for other in others for setting in other.reads} - self.reads
        if not self.needs_teacher:
            foreign |= {*_OF_TEACHERS, "kd_weight"}
        foreign |= set(_OF_CACHES if self.needs_features else _OF_FEATURES)
        return [setting for setting in settings if setting in foreign]


def labelled(
    plain: Callable[..., Tensor], mixed: Callable[..., Tensor], **settings: float
) -> Callable[[Batch], Tensor]:
    """A loss on labels that knows mixup's two."""

    def loss(batch: Batch) -> Tensor:
        if batch.other_labels is None or batch.shares is None:
            return plain(batch.student_logits, batch.labels, **settings)
        return mixed(batch.student_logits, batch.labels, batch.other_labels, batch.shares, **settings)

    return loss


def temperature(config: TrainConfig, own: float, done: float) -> float:
    """τ when a share of the training is done: the user's, else the method's own, on its way to `tau_end`."""
    first = own if config.tau is None else config.tau
    return Ramp(first, first if config.tau_end is None else config.tau_end).at(done)
