"""Teachers that are stored outputs: packs of logits from `kd teacher-logits`, and CSV files of probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

from kdcli.base.config import shell_command
from kdcli.base.errors import KdError
from kdcli.base.files import read_document, sha256_file
from kdcli.base.text import printable
from kdcli.data import ImageSet
from kdcli.teacher.assumptions import check_outputs
from kdcli.teacher.cache import LogitCache
from kdcli.teacher.member import Member
from kdcli.teacher.probabilities import logits_of

FORMAT = "kd-logits-1"
MADE_WITH = {
    "data", "image_size", "resize", "grey", "skip_broken", "test_fraction", "unlabelled", "val_fraction", "augment",
    "views", "view_seed",
}  # fmt: skip
_AGAIN = "Copy the pack again, or make it again: kd teacher-logits --teacher FILE"
# Entries of a cache's key that must agree, and the options that set them
_MUST_AGREE = {
    "data": "images, labels or names of classes",
    "augment": "--augment",
    "torchvision": "version of torchvision, which makes the views",
    "seed": "--view-seed",
    "mixed_in": "--val-fraction",
}


def only_probabilities(path: Path) -> bool:
    """Whether logits are known only up to a shift, or only the largest."""
    return _is_csv(path) or bool(_read(path).get("only_probabilities"))


def made_with(path: Path) -> dict[str, Any]:
    """The settings of kd train that a pack is for; empty for a CSV file."""
    values = {} if _is_csv(path) else _read(path).get("made_with")
    known = values if isinstance(values, dict) else {}
    return {name: value for name, value in known.items() if name in MADE_WITH}


def stored_views(
    member: Member, needed: LogitCache, data: ImageSet, views: int, *, measured: bool
) -> list[npt.NDArray[Any]]:
    """Outputs for each view, as in `CachedLogits.stored`; a KdError if they are of other images or views.

    `needed` is where the logits of a model would be. With `measured` a KdError also if those of another program are
    near chance; a pack's model was measured when it was made.
    """
    path, augment = member.path, needed.key["augment"]
    member.check_unchanged(sha256_file(path))
    if not _is_csv(path):
        try:
            return _views_of_pack(path, needed, views)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise KdError(f"{path} is damaged", _AGAIN) from error
    if augment != "none":
        raise KdError(
            f"{path} has outputs of plain images, not of --augment {augment}",
            "Use --augment none, or --teacher-cache fixed.",
        )
    logits = logits_of(path, member.sha256, data, member.assumed.class_map)
    if measured:
        check_outputs(f"teacher {path}", logits, data)
    return [logits]


def _views_of_pack(path: Path, needed: LogitCache, views: int) -> list[npt.NDArray[Any]]:
    pack, document = path.parent, _read(path)
    by_sum = {sha256_file(file): file for file in pack.glob("teacher/*/manifest.json")}
    files = [by_sum[sha256] for sha256 in document["manifests"]]  # that of the views of training images first
    manifests = {file.parent: read_document(file) for file in files}

    def difference(folder: Path) -> str:
        """The first entry that differs; empty if none does."""
        key = manifests[folder]["recipe"]
        return next((name for name in _MUST_AGREE if key.get(name) != needed.key.get(name)), "")

    best = max(manifests, key=lambda folder: [*_MUST_AGREE, ""].index(difference(folder)))
    key, count = manifests[best]["recipe"], len(manifests[best]["views"])
    hint = printable(
        f"Train with its settings: {shell_command('train', made_with(path)).partition(' train ')[2]}"
    )
    if name := difference(best):
        known = name in ("augment", "torchvision", "seed")
        values = printable(f": {key[name]} there, {needed.key[name]} here") if known else ""
        message = f"{pack} was made with other {_MUST_AGREE[name]}{values}"
        raise KdError(message, _AGAIN if name == "torchvision" else hint)
    if count < views:
        raise KdError(f"{pack} was made with other --views: {count} there, {views} here", hint)
    cache = LogitCache(best, key, needed.count, needed.classes)
    found = [(view, cache.find(view)) for view in range(views)]
    for view, stored in found:
        if stored is None:
            raise KdError(f"{cache.path(view)} is missing or damaged", _AGAIN)
    return [stored for _, stored in found if stored is not None]


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _read(path: Path) -> dict[str, Any]:
    document = read_document(path)
    if document.get("format") != FORMAT:
        raise KdError(f"{path} is not a pack of logits", "Make one: kd teacher-logits --teacher FILE")
    return document
