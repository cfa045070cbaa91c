"""Objective of a run: terms of one or several methods, with scheduled weights and temperatures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kdcli.base.config import Ramp, TeacherInputSettings
from kdcli.base.errors import UsageError
from kdcli.base.names import nearest
from kdcli.methods import custom
from kdcli.methods.batch import Batch, Training
from kdcli.methods.registry import CE, METHODS, Method

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kdcli.methods import TrainConfig

# settings of `kd train` that only some methods read
_CHAIN_SETTINGS = ("assistant", "generations")
_CACHE_SETTINGS = ("cache_top_k", "teacher_cache")  # of methods with a teacher and without features
_TEACHER_SETTINGS = (
    "teacher", "teacher_weights", "teacher_args", "teacher_weight", "teacher_dropout", "teacher_precision",
    "kd_weight",
    *TeacherInputSettings.model_fields,
)  # fmt: skip
_FEATURE_SETTINGS = ("student_stages", "teacher_stages")
# attributes of `Method` that an objective has if one of its methods has them
_FLAGS = ("needs_teacher", "needs_features", "needs_labels", "regresses", "same_network", "no_mixup")


def parse(name: str) -> tuple[Method, ...]:
    """Methods joined by `+`: of the registry, or functions as `package.module:function`, which are imported."""
    methods: dict[str, Method] = {}
    for word in name.split("+"):
        if not custom.is_custom(word) and word not in METHODS:
            raise UsageError(
                f"unknown method: {word}" if word else "a method has no name",
                nearest(word, METHODS, "; joined as in kd+at; or package.module:function"),
            )
        method = custom.load(word) if custom.is_custom(word) else METHODS[word]
        if method.name in methods:
            raise UsageError(
                f"method {method.name} is named twice in {name}", "Give its term a weight: --weight NAME=W."
            )
        methods[method.name] = method
    return tuple(methods.values())


@dataclass(frozen=True)
class Term:
    """A method's loss with its weight and temperature over a run, and the keyword arguments of the loss."""

    method: Method
    weight: Ramp
    tau: Ramp
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Objective:
    """Weighted sum of terms that a run minimises; terms whose weight is always 0 are left out.

    The flags, such as `needs_teacher`, are those of any method in it.
    """

    config: TrainConfig
    terms: Mapping[str, Term]  # by the method's name, cross-entropy on the labels (`ce`) first
    needs_teacher: bool
    needs_features: bool
    needs_labels: bool
    regresses: bool
    same_network: bool
    no_mixup: bool

    @property
    def methods(self) -> tuple[Method, ...]:
        return tuple(term.method for term in self.terms.values())

    @property
    def default_tau(self) -> float | None:
        """The default temperature of the terms that have one; None if they differ, or none has."""
        taus = {method.tau for method in self.methods if method.tau is not None}
        return taus.pop() if len(taus) == 1 else None

    @property
    def settings(self) -> dict[str, Any]:
        """Values of the settings of methods that the terms read, by name."""
        return {name: getattr(self.config, name) for method in self.methods for name in method.reads}

    def weights(self, done: float = 1.0) -> dict[str, float]:
        """Weight of each term when a share `done` of the training, 0 … 1, is over."""
        return {name: term.weight.at(done) for name, term in self.terms.items()}

    def adapters(self, training: Training) -> dict[str, nn.Module]:
        """Make the modules that are trained along with the student, by the method's name."""
        return {
            method.name: method.adapter(training, **method.arguments(method.adapter, self.config))
            for method in self.methods
            if method.adapter is not None
        }

    def compute(self, batch: Batch, adapters: Mapping[str, nn.Module] | None = None) -> dict[str, Tensor]:
        """Compute the unweighted terms, each a scalar, by name in the order of `terms`."""
        found = {}
        for name, term in self.terms.items():
            own = replace(batch, adapter=(adapters or {}).get(name), tau=term.tau.at(batch.done))
            found[name] = term.method.loss(own, **term.settings)
        return found

    def check(self, *, unlabelled: bool = False) -> None:
        """Raise UsageError if the terms cannot train a student, or need labels that `unlabelled` images lack."""
        name = self.config.method
        if unlabelled and self.needs_labels:
            raise UsageError(
                f"method {name} reads labels, and unlabelled images have none",
                "Use methods without labels, as --method logits or logits+at, and --ce-weight 0 (kd: --lamda 0).",
            )
        if all(method.features_only for method in self.methods):
            raise UsageError(
                f"method {name} reads features alone, and nothing trains the student's last layer",
                f"Join it with a method of logits, as --method kd+{name}, or give cross-entropy a weight.",
            )


def objective(config: TrainConfig) -> Objective:
    """Parse method, weights, temperatures and settings of a run."""
    methods = parse(config.method)
    known = {CE: METHODS[CE]} | {method.name: method for method in methods}
    terms = {}
    for name, weight in _weights(methods, config).items():
        method = known[name]
        tau = config.tau if config.tau is not None else 1.0 if method.tau is None else method.tau
        taus = Ramp(tau, tau if config.tau_end is None else config.tau_end)
        terms[name] = Term(method, weight, taus, method.arguments(method.loss, config))
    flags = {name: any(getattr(term.method, name) for term in terms.values()) for name in _FLAGS}
    return Objective(config, terms, **flags)


def _weights(methods: tuple[Method, ...], config: TrainConfig) -> dict[str, Ramp]:
    """Weight of each term, the user's, else the method's own; terms whose weight is always 0 are left out.

    Cross-entropy has the weight that the first method gives it, or 1 if it is named.
    """
    ce = 1.0 if any(method.name == CE for method in methods) else methods[0].weights(config)[0]
    found = {CE: Ramp(ce, ce)}
    found |= {method.name: method.weights(config)[1] for method in methods if method.name != CE}
    if config.kd_weight is not None:
        teachers = [method.name for method in methods if method.needs_teacher]
        if len(teachers) > 1:
            raise UsageError(
                f"--kd-weight: method {config.method} has {len(teachers)} terms of the teacher",
                f"Name the term: --weight {teachers[0]}={config.kd_weight:g}",
            )
        found |= {name: found[name].to(config.kd_weight) for name in teachers}
    if config.ce_weight is not None:
        found[CE] = Ramp(config.ce_weight, config.ce_weight)
    for name, ramp in config.weights.items():
        if name not in found:
            raise UsageError(
                f"--weight {name}: method {config.method} has no such term", f"It has {', '.join(found)}."
            )
        found[name] = ramp
    chosen = {name: ramp for name, ramp in found.items() if ramp.first or ramp.last}
    if not chosen:
        raise UsageError(f"all weights of method {config.method} are 0", "Raise --ce-weight or --weight.")
    return chosen


def unread(name: str, settings: Iterable[str]) -> list[str]:
    """Select those of some settings that belong to methods and that this method does not read."""
    methods = parse(name)
    foreign = {setting for other in METHODS.values() for setting in other.reads}
    foreign -= {setting for method in methods for setting in method.reads}
    if not any(method.needs_teacher for method in methods):
        foreign |= {*_TEACHER_SETTINGS, *_CHAIN_SETTINGS, *_CACHE_SETTINGS}
    features = any(method.needs_features for method in methods)
    foreign |= set(_CACHE_SETTINGS if features else _FEATURE_SETTINGS)
    return [setting for setting in settings if setting in foreign]
