"""`load`: from what the user wrote after --data to two splits of images.

Adding a dataset is one function here or in a module beside, and one entry in `DATASETS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Note, OnEvent, ignore
from kdcli.base.files import expand
from kdcli.data.cifar import find_cifar10, is_cifar10, load_cifar10
from kdcli.data.cifar100 import CIFAR100
from kdcli.data.decode import fit, with_channels
from kdcli.data.formats import Format, load_format
from kdcli.data.idx import FASHION_MNIST, MNIST
from kdcli.data.images import ImageSet, Splits, fingerprint_of
from kdcli.data.svhn import SVHN
from kdcli.data.tree import load_tree
from kdcli.data.unlabelled import add_unlabelled

DIGITS_TRAIN = 1437  # of 1,797: the split is contiguous, so that writers mostly do not overlap


@dataclass(frozen=True)
class Request:
    """What a dataset function needs to know."""

    spec: str
    data_dir: Path
    cache_dir: Path
    image_size: int | None
    channels: int | None
    on_event: OnEvent
    skip_broken: bool = False


def load(
    spec: str,
    *,
    data_dir: Path = Path("data"),
    cache_dir: Path = Path("cache"),
    image_size: int | None = None,
    grey: bool = False,
    fit_to: tuple[int, int, int] | None = None,
    skip_broken: bool = False,
    unlabelled: Path | None = None,
    on_event: OnEvent = ignore,
) -> Splits:
    """Images and labels of a named dataset, a folder or an archive.

    Args:
        spec: a name in `DATASETS`, or the path of a folder or archive with train/<class>/* and
            test/<class>/*.
        data_dir: where `kd download` puts datasets.
        cache_dir: decoded images are packed below it, once.
        image_size: pixels per side; None keeps the images' own size if they share one, else 32.
        grey: turn colour images to grey (N, H, W, 1).
        fit_to: (H, W, C) that a model takes: images get its number of channels, and, if it is square and no
            `image_size` is given, its size.
        skip_broken: leave images out that cannot be read, and say so in a note, instead of an error.
        unlabelled: a folder or archive of further images to train on, see `add_unlabelled`.
        on_event: gets progress while images are decoded, and the notes of the result.

    Raises:
        UsageError: neither a name nor a path.
        KdError: the data is missing, damaged or laid out in another way.
    """
    if image_size is None and fit_to is not None and fit_to[0] == fit_to[1]:
        image_size = fit_to[0]
    channels = 1 if grey else fit_to[2] if fit_to is not None and fit_to[2] in (1, 3) else None
    request = Request(spec, data_dir, cache_dir, image_size, channels, on_event, skip_broken)
    path = expand(spec)
    if spec in DATASETS:
        splits = DATASETS[spec](request)
    elif not spec or "\0" in spec or not path.exists():
        raise _unknown(spec)
    else:
        read = load_cifar10 if is_cifar10(path) else partial(load_tree, skip_broken=skip_broken)
        splits = read(
            path,
            spec,
            cache_dir=cache_dir,
            image_size=image_size,
            channels=channels or 3,
            on_event=on_event,
        )
    if unlabelled is not None:
        splits = add_unlabelled(
            splits, expand(str(unlabelled)), cache_dir=cache_dir, skip_broken=skip_broken, on_event=on_event
        )
    for note in splits.notes:
        on_event(Note(note))
    return splits


def source_for(
    model: Path, provenance: dict[str, object], named: str | None, skip_broken: bool
) -> tuple[str, bool]:
    """The data to use with a model: what the user named, else what it was trained on, as it was read then.

    Returns:
        What stands after --data, and whether broken images are left out.

    Raises:
        KdError: the model does not say, or its data is not where it was.
    """
    if named is not None:
        return named, skip_broken
    recorded = provenance.get("data")
    recorded = recorded if isinstance(recorded, dict) else {}
    spec = str(recorded.get("spec") or "")
    if not spec:
        raise KdError(
            f"{model} does not say what data it belongs to",
            "Name it: --data cifar10, --data digits, or a folder or archive of images.",
        )
    if spec not in DATASETS and not expand(spec).exists():
        raise KdError(f"{model} was trained on {Path(spec).name}, which is not here", "Name it with --data.")
    return spec, skip_broken or recorded.get("skip_broken") is True


def _unknown(spec: str) -> UsageError:
    near = difflib.get_close_matches(spec.lower().replace("-", ""), DATASETS, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    return UsageError(
        f"no dataset or path: {spec or '(empty)'}",
        f"{hint}--data takes {', '.join(DATASETS)}, or the path of a folder or archive of images.",
    )


def _digits(request: Request) -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8×8, grey: no download, for demos and tests."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # (1797, 8, 8, 1)
    if request.image_size is not None:
        grey = np.stack([fit(image, request.image_size) for image in grey])
    if request.channels == 3:
        grey = np.stack([with_channels(image, 3) for image in grey])
    labels = bunch.target.astype(np.int64)
    classes = tuple("0123456789")
    first, last = (
        ImageSet(grey[part], labels[part], classes, fingerprint_of(grey[part], labels[part], classes))
        for part in (slice(None, DIGITS_TRAIN), slice(DIGITS_TRAIN, None))
    )
    return Splits(spec=request.spec, label="digits", train=first, test=last)


def _cifar10(request: Request) -> Splits:
    return load_cifar10(
        find_cifar10(request.data_dir),
        request.spec,
        cache_dir=request.cache_dir,
        image_size=request.image_size,
        channels=request.channels or 3,
        on_event=request.on_event,
    )


def _loader(kind: Format) -> Callable[[Request], Splits]:
    def load_it(request: Request) -> Splits:
        return load_format(
            kind,
            request.spec,
            data_dir=request.data_dir,
            cache_dir=request.cache_dir,
            image_size=request.image_size,
            channels=request.channels,
            on_event=request.on_event,
        )

    return load_it


DATASETS: dict[str, Callable[[Request], Splits]] = {
    "cifar10": _cifar10,
    "digits": _digits,
    **{kind.name: _loader(kind) for kind in (CIFAR100, SVHN, MNIST, FASHION_MNIST)},
}
