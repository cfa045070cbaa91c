"""The methods by name: what each computes from a batch, with which weights, and what it needs.

Adding a method: one function in `losses`, one in `logits` or `features` here and one entry below, one parity test,
one row in `docs/methods.md`. Methods are joined by `+`; a function of one's own is named `package.module:function`.
"""

from __future__ import annotations

from collections.abc import Iterable

from kdcli.base.config import Ramp
from kdcli.base.errors import UsageError
from kdcli.methods import features, logits
from kdcli.methods.batch import Batch, Features, Shapes, Training, paired
from kdcli.methods.logits import noise_of
from kdcli.methods.objective import CE, Method, Objective
from kdcli.methods.own import any_own, check_own_method, is_own, load, method, source_sha256, sources
from kdcli.methods.settings import TrainConfig

__all__ = [
    "CE",
    "METHODS",
    "REFERENCE",
    "Batch",
    "Features",
    "Method",
    "Objective",
    "Shapes",
    "TrainConfig",
    "Training",
    "any_own",
    "check_head",
    "check_own_method",
    "check_unlabelled",
    "get",
    "is_own",
    "method",
    "noise_of",
    "paired",
    "source_sha256",
    "sources",
    "unread",
]

REFERENCE = ("ce", "logits", "noisy", "kd")  # the four that kd demo shows
_WARM_UP = 1 / 12  # of training: 20 of 240 epochs, as the authors of dkd and reviewkd have it


def _method(
    name: str,
    loss: object,
    summary: str,
    source: str,
    *,
    ce: float = 1.0,
    weight: float = 1.0,
    warm_up: float = 0.0,
    **more: object,
) -> Method:
    """An entry with constant weights, or a term whose weight rises from 0 over the first `warm_up` of training."""
    ramp = Ramp(0.0 if warm_up else weight, weight, warm_up or 1.0)
    return Method(name, loss, lambda config: ce, lambda config: ramp, summary, source, **more)  # type: ignore[arg-type]


METHODS = {
    entry.name: entry
    for entry in (
        _method("ce", None, "labels alone, no teacher: the baseline", "cross-entropy", needs_teacher=False),
        _method(
            "logits",
            logits.regression,
            "regress the teacher's logits",
            "Ba & Caruana, NIPS 2014",
            ce=0.0,
            regresses=True,
        ),
        _method(
            "noisy",
            logits.noisy,
            "regress logits that noise has scaled",
            "Sau & Balasubramanian, arXiv:1610.09650",
            ce=0.0,
            reads=("noisy_ratio", "noisy_sigma", "noise_scope"),
            regresses=True,
        ),
        Method(
            "kd",
            logits.soft_targets,
            lambda config: config.lamda,
            lambda config: Ramp(1 - config.lamda, 1 - config.lamda),
            "match the teacher's softened probabilities",
            "Hinton et al., arXiv:1503.02531",
            reads=("tau", "tau_end", "lamda", "standardize"),
            tau=3.0,
        ),
        _method(
            "ls",
            logits.smoothed,
            "smoothed labels, no teacher: the control",
            "Szegedy et al., CVPR 2016",
            ce=0.0,
            reads=("label_smoothing",),
            needs_teacher=False,
            needs_labels=True,
        ),
        _method(
            "dkd",
            logits.decoupled,
            "target class and the others apart",
            "Zhao et al., CVPR 2022",
            warm_up=_WARM_UP,
            reads=("tau", "tau_end", "dkd_alpha", "dkd_beta", "standardize"),
            tau=4.0,
            needs_labels=True,
        ),
        _method(
            "dist",
            logits.correlated,
            "correlate with the teacher, by image and by class",
            "Huang et al., NeurIPS 2022",
            reads=("tau", "tau_end", "dist_inter", "dist_intra"),
            tau=4.0,
        ),
        _method(
            "lskd",
            logits.standardized,
            "soft targets of standardized logits",
            "Sun et al., CVPR 2024",
            ce=0.1,
            weight=9.0,
            reads=("tau", "tau_end"),
            tau=2.0,
        ),
        _method(
            "mlkd",
            logits.multi_level,
            "images, batch and classes at several temperatures",
            "Jin et al., CVPR 2023",
        ),
        _method(
            "born-again",
            logits.soft_targets,
            "labels and an earlier student of the same network",
            "Furlanello et al., ICML 2018",
            reads=("tau", "tau_end", "standardize"),
            own_network=True,
        ),
        _method(
            "fitnet",
            features.hint,
            "regress the maps of a middle stage",
            "Romero et al., ICLR 2015",
            weight=100.0,
            reads=("hint_stage",),
            needs_features=True,
            headless=True,
            adapter=features.hint_adapter,
        ),
        _method(
            "at",
            features.attention,
            "match attention maps",
            "Zagoruyko & Komodakis, ICLR 2017",
            weight=1000.0,
            needs_features=True,
            headless=True,
        ),
        _method(
            "sp",
            features.similarity,
            "match which images are alike",
            "Tung & Mori, ICCV 2019",
            weight=3000.0,
            needs_features=True,
            headless=True,
        ),
        _method(
            "rkd",
            features.relational,
            "match distances and angles between images",
            "Park et al., CVPR 2019",
            reads=("rkd_distance", "rkd_angle"),
            needs_features=True,
            headless=True,
        ),
        _method(
            "pkt",
            features.probabilistic,
            "match neighbourhood probabilities",
            "Passalis & Tefas, ECCV 2018",
            weight=30000.0,
            needs_features=True,
            headless=True,
        ),
        _method(
            "vid",
            features.variational,
            "predict the teacher's maps, with a variance",
            "Ahn et al., CVPR 2019",
            needs_features=True,
            headless=True,
            adapter=features.variational_adapter,
        ),
        _method(
            "crd",
            features.contrastive,
            "tell the teacher's embedding from those of other classes",
            "Tian et al., ICLR 2020",
            weight=0.8,
            reads=("crd_dim", "crd_negatives", "crd_temperature"),
            needs_features=True,
            headless=True,
            unmixed=True,
            needs_labels=True,
            adapter=features.contrastive_adapter,
        ),
        _method(
            "reviewkd",
            features.review,
            "fuse later stages into earlier ones",
            "Chen et al., CVPR 2021",
            warm_up=_WARM_UP,
            needs_features=True,
            headless=True,
            adapter=features.review_adapter,
        ),
    )
}


def get(name: str) -> Objective:
    """The method of that name, or those joined by `+`.

    Raises:
        UsageError: there is none, one is named twice, or a function of the user's own cannot be had.
    """
    parts = tuple(_part(word) for word in name.split("+"))
    names = [part.name for part in parts]
    twice = next((part for part in names if names.count(part) > 1), None)
    if twice is not None:
        raise UsageError(
            f"method {twice} is named twice in {name}", "Give its term a weight: --weight NAME=W."
        )
    return Objective(name, parts)


def _part(name: str) -> Method:
    if is_own(name):
        return load(name, taken=METHODS)
    if name not in METHODS:
        raise UsageError(
            f"unknown method: {name}" if name else "a method has no name",
            f"Known are {', '.join(METHODS)}; joined as in kd+at; or package.module:function, of your own.",
        )
    return METHODS[name]


def check_head(config: TrainConfig) -> None:
    """Raise UsageError where no term trains the student's last layer: it would guess for good."""
    method = get(config.method)
    if not method.trains_head(config):
        raise UsageError(
            f"method {config.method} reads features alone, and nothing trains the student's last layer",
            f"Join it with a method of logits, as --method kd+{config.method}, or give cross-entropy a weight.",
        )


def check_unlabelled(config: TrainConfig) -> None:
    """Raise UsageError where a term that weighs anything reads labels: there are images without any."""
    method = get(config.method)
    if not method.needs_labels(config):
        return
    chosen = method.ramps(config)
    rest = [part for part in method.own if part.name in chosen]
    if rest and all(part.headless for part in rest) and not any(part.needs_labels for part in rest):
        hint = (
            f"Join it with a method of logits, which trains the last layer: --method logits+{config.method}"
        )
    elif not rest or any(part.needs_labels for part in rest):
        hint = "Use a method without labels, as --method logits, or leave --unlabelled out."
    else:  # cross-entropy alone is why
        more = " or, so that the soft term gets its share, --lamda 0" if "lamda" in method.reads else ""
        hint = f"Leave cross-entropy out: --ce-weight 0{more}."
    raise UsageError(f"method {config.method} reads labels, and unlabelled images have none", hint)


def unread(name: str, settings: Iterable[str]) -> list[str]:
    """Those of some settings that belong to methods, and that this method does not read."""
    return get(name).unread(settings, METHODS.values())
