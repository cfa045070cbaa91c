"""Load a data set by name, or from a folder or archive of images."""

from dataclasses import replace
from pathlib import Path

from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Note, OnEvent, Progress, ignore
from kdcli.base.files import expand, regular_size
from kdcli.base.names import nearest
from kdcli.base.units import size
from kdcli.data.datasets import DATASETS, Request, discover
from kdcli.data.images import Splits
from kdcli.data.tree import load_tree
from kdcli.data.unlabelled import add_unlabelled

_MAX_RECORDED_ARCHIVE = 16e9  # bytes of an archive that a model's file names; a typed one has no limit

discover()


def load(
    spec: str,
    *,
    data_dir: Path = Path("data"),
    cache_dir: Path = Path("cache"),
    image_size: int | None = None,
    grey: bool = False,
    fit_to: tuple[int, int, int] | None = None,
    crop: float = 1.0,
    skip_broken: bool = False,
    unlabelled: Path | None = None,
    on_event: OnEvent = ignore,
) -> Splits:
    """A data set: named, a folder or an archive.

    Args:
        spec: a name in `DATASETS`, or a folder or archive with train/<class>/* and test/<class>/*.
        data_dir: folder of the files of named data sets.
        cache_dir: folder of the cache of decoded images.
        image_size: pixels per side; None keeps the images' own size if they share one, else 32.
        grey: turn colour images to grey (N, H, W, 1).
        fit_to: (H, W, C) of a model's input: images get its number of channels and, if it is square and no
            `image_size` is given, its size.
        crop: share of the shorter side that is kept before the resize, see `decode.resize`.
        skip_broken: leave out broken images, with a note, instead of an error.
        unlabelled: a folder or archive of further images to train on; see `add_unlabelled`.
        on_event: receives progress while images are decoded, and the notes of the result.

    Raises:
        UsageError: neither a name nor a path, or a crop without a size.
        KdError: the data is missing or damaged, or its layout is unknown.
    """
    on_event(Progress("reading the data", 0, 0))
    if image_size is None and fit_to is not None and fit_to[0] == fit_to[1]:
        image_size = fit_to[0]
    if crop != 1 and image_size is None:
        raise UsageError(f"--crop {crop:g} goes with images of a given square size", "Add --image-size.")
    channels = 1 if grey else fit_to[2] if fit_to is not None and fit_to[2] in (1, 3) else None
    request = Request(spec, data_dir, cache_dir, image_size, channels, on_event, skip_broken, crop)
    path = expand(spec)
    if spec in DATASETS:
        splits = DATASETS[spec](request)
    elif not spec or "\0" in spec or not path.exists():
        hint = nearest(spec, DATASETS, ", or the path of a folder or archive of images")
        raise UsageError(f"no dataset or path: {spec or '(empty)'}", hint)
    else:
        splits = _load_path(path, request)
    if unlabelled is not None:
        splits = add_unlabelled(splits, expand(str(unlabelled)), request)
    splits = replace(splits, train=replace(splits.train, crop=crop), test=replace(splits.test, crop=crop))
    for note in splits.notes:
        on_event(Note(note))
    if splits.overlap:
        count = f"{splits.overlap:,} of {len(splits.test):,} test images"
        on_event(Note(f"{count} are among the train images, pixel by pixel."))
    return splits


def _load_path(path: Path, request: Request) -> Splits:
    """A named data set whose files are there, or else a tree of images.

    Of data sets with equal file names, that of the longest name in the path; else the first, with a note.
    """
    located = {name: known.locate(path) for name, known in DATASETS.items()}
    found = [name for name, files in located.items() if files]
    if not found:
        return load_tree(path, request)
    place = path.resolve().as_posix().lower().replace("-", "")
    name = max(found, key=lambda name: len(name) * (name.replace("-", "") in place))
    splits = DATASETS[name](request, located[name])
    if len(found) == 1 or name.replace("-", "") in place:
        return splits
    others = ", ".join(DATASETS[other].label for other in found if other != name)
    note = f"Read as {splits.label}; files of {others} have the same names. A folder of its name decides."
    return replace(splits, notes=(*splits.notes, note))


def source_for(
    model: Path, provenance: dict[str, object], named: str | None, skip_broken: bool
) -> tuple[str, bool]:
    """The data to use with a model: named by the user, or else recorded when it was trained.

    Returns:
        The value of --data, and whether broken images are left out.

    Raises:
        KdError: nothing is recorded, or the recorded path does not exist.
    """
    if named is not None:
        return named, skip_broken
    recorded = provenance.get("data")
    recorded = recorded if isinstance(recorded, dict) else {}
    spec = str(recorded.get("spec") or "")
    if not spec:
        raise KdError(
            f"no data set recorded in {model}",
            "Name it: --data cifar10, --data digits, or a folder or archive of images.",
        )
    if spec not in DATASETS:
        path = expand(spec)
        try:
            usable = path.is_dir() or 0 <= regular_size(path) <= _MAX_RECORDED_ARCHIVE
        except OSError:
            usable = False
        if not usable:
            raise KdError(
                f"{model} was trained on {path.name}, which is not here as a folder or an archive of at most "
                + size(_MAX_RECORDED_ARCHIVE),
                "Pass it with --data.",
            )
    return spec, skip_broken or recorded.get("skip_broken") is True
