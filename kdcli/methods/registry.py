"""Registry of methods: each is a function under `@method` in a module of this package.

The modules are found by listing the package, and `kd train --help` imports them all: they import torch inside
functions only.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

from kdcli.base.config import Ramp
from kdcli.base.config.settings import OF_METHODS, setting

if TYPE_CHECKING:
    from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])
CE = "ce"  # the term of cross-entropy on the labels, which any method may have in addition to its own
METHODS: dict[str, Method] = {}
ATTRIBUTE = "__kd_method__"  # of a function: its entry


class option:  # noqa: N801
    """An option of kd train for a keyword-only parameter: `alpha: Annotated[float, option("weight …", ge=0)] = 1.0`.

    Args:
        text: help without a full stop; the method's name is put before it.
        flags, bounds: further spellings of the option, and pydantic's bounds.
        name: of the setting; by default METHOD_PARAMETER, and so --METHOD-PARAMETER.
    """

    def __init__(self, text: str, *flags: str, name: str = "", rare: bool = True, **bounds: Any) -> None:
        self.text, self.flags, self.name = text, flags, name
        self.bounds = {"rare": rare, **bounds}


@dataclass(frozen=True)
class Method:
    """A distillation loss, its default weights, and its requirements.

    Attributes:
        ce, weight: default weights of cross-entropy on the labels and of the method's own term.
        balance: computes (ce, weight) from settings, in place of the two.
        features_only: the loss does not read the student's logits, and so leaves the last layer untrained.
        adapter: makes a module that is trained along with the student and not exported.
        fields: its own settings as fields of `TrainConfig`: type and pydantic field.
        keywords: settings by the parameters of `loss`, `adapter` and `balance` that take them.
    """

    name: str
    loss: Callable[..., Tensor]  # computes the unweighted term, a scalar, from a `Batch` and settings
    summary: str = ""
    source: str = ""  # paper and equation
    ce: float = 0.0
    weight: float = 1.0
    warm_up: float = 0.0  # share of the training over which its own weight rises from 0
    balance: Callable[..., tuple[float, float]] | None = None
    tau: float | None = None  # default temperature; None for a loss without one
    needs_teacher: bool = True
    needs_features: bool = False
    needs_labels: bool = False
    features_only: bool = False
    regresses: bool = False  # the student's logits must take on the teacher's values, beyond their softmax
    same_network: bool = False  # the teacher is meant to be of the student's own network
    no_mixup: bool = False  # an image must have one class: neither mixup nor cutmix
    adapter: Callable[..., nn.Module] | None = None
    fields: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    keywords: Mapping[str, str] = field(default_factory=dict)

    @property
    def reads(self) -> set[str]:
        return {*self.keywords.values(), *(("tau", "tau_end") if self.tau is not None else ())}

    def arguments(self, function: Callable[..., Any], config: Any) -> dict[str, Any]:
        """Values of the settings that one of its functions takes, by parameter."""
        taken = inspect.signature(function).parameters
        return {name: getattr(config, key) for name, key in self.keywords.items() if name in taken}

    def weights(self, config: Any) -> tuple[float, Ramp]:
        """Default weights of cross-entropy and of the method's term for these settings."""
        ce, weight = self.ce, self.weight
        if self.balance is not None:
            ce, weight = self.balance(**self.arguments(self.balance, config))
        return ce, Ramp(0.0 if self.warm_up else weight, weight, self.warm_up or 1.0)


def method(
    name: str = "", *, needs: Sequence[Literal["features", "labels"]] = (), **attributes: Any
) -> Callable[[F], F]:
    """Describe a function as a method.

    Keyword-only parameters of the function, `adapter` and `balance` are settings: with an `option`, the method's own;
    without, a general setting of kd train of the same name.

    Args:
        name: by default the function's; the summary is the first line of its docstring.
        needs: `features` for maps or embeddings of both networks, with which the teacher runs in each step; `labels`.
        attributes: of `Method`; ValueError for a weight or temperature out of range, or features without a teacher.
    """
    numbers = [attributes.get(key, 1.0) for key in ("ce", "weight", "tau")]
    if not all(isinstance(each, int | float) and 0 <= each < math.inf for each in numbers) or not numbers[2]:
        raise ValueError("@method: ce and weight must be numbers, 0 or more, and tau above 0")
    if not set(needs) <= {"features", "labels"}:
        raise ValueError(f"@method: needs takes features and labels, not {needs!r}")
    if "features" in needs and not attributes.get("needs_teacher", True):
        raise ValueError("@method: features are the teacher's, too: needs_teacher must be true")
    attributes |= {"needs_features": "features" in needs, "needs_labels": "labels" in needs}

    def register(function: F) -> F:
        setattr(function, ATTRIBUTE, _describe(function, name or function.__name__, attributes))
        return function

    return register


# a loss on features alone, in addition to cross-entropy
feature_method = partial(method, ce=1.0, needs=("features",), features_only=True)


def _describe(function: Callable[..., Any], name: str, attributes: Mapping[str, Any]) -> Method:
    fields: dict[str, tuple[Any, Any]] = {}
    keywords: dict[str, str] = {}
    for part in (function, attributes.get("adapter"), attributes.get("balance")):
        for parameter, kind in _keyword_only(part) if part is not None else ():
            key = parameter.name
            extras = getattr(kind, "__metadata__", ())
            own = next((extra for extra in extras if isinstance(extra, option)), None)
            if own is not None:
                key = own.name or f"{name}_{parameter.name}".replace("-", "_")
                text = f"{name}: {own.text}."
                about = setting(parameter.default, text, OF_METHODS, *own.flags, **own.bounds)
                fields[key] = (kind.__origin__, about)
            keywords[parameter.name] = key
    return Method(name, function, summary_of(function), fields=fields, keywords=keywords, **attributes)


def _keyword_only(function: Callable[..., Any]) -> list[tuple[inspect.Parameter, Any]]:
    """Keyword-only parameters with their types; annotations of others may name modules that are not imported."""
    parameters = inspect.signature(function).parameters.values()
    keywords = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    annotated = SimpleNamespace(__annotations__={each.name: each.annotation for each in keywords})
    kinds = get_type_hints(annotated, function.__globals__, include_extras=True)
    return [(parameter, kinds[parameter.name]) for parameter in keywords]


def summary_of(function: object) -> str:
    """First line of a docstring, as part of a sentence."""
    first = (inspect.getdoc(function) or "").partition("\n")[0].removesuffix(".")
    return first[:1].lower() + first[1:]


def discover(package: str) -> None:
    """Fill `METHODS` from the modules of a package: methods of labels first, then of logits, then of features."""
    found: list[Method] = []
    for module in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
        if not module.ispkg:
            for value in vars(import_module(module.name)).values():
                if getattr(value, "__module__", "") == module.name and hasattr(value, ATTRIBUTE):
                    found.append(getattr(value, ATTRIBUTE))
    names = [name for entry in found for name in (entry.name, *entry.fields)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"method or setting {twice} is defined twice in {package}")
    found.sort(key=lambda entry: (entry.needs_features, entry.needs_teacher))
    METHODS.update((entry.name, entry) for entry in found)
