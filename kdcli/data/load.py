"""Load a data set by name, or from a folder or archive of images."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcli.base.config import DataSettings, ModelDataSettings
from kdcli.base.config.settings import TEST_FRACTION
from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Note, OnEvent, Progress, ignore
from kdcli.base.files import expand, recorded_path, regular_size
from kdcli.base.names import nearest
from kdcli.base.units import size
from kdcli.data.datasets import DATASETS, Request, discover
from kdcli.data.decode import checked_resize
from kdcli.data.images import Splits
from kdcli.data.tree import load_tree
from kdcli.data.unlabelled import add_unlabelled

# Bytes of an archive that a model's file names; a typed one has no limit
_MAX_RECORDED_ARCHIVE = 16_000_000_000
# settings of data, in addition to its name, that a model's file records
_RECORDED = {"image_size": int, "resize": int, "grey": bool, "skip_broken": bool, "test_fraction": float}

discover()


def load(
    spec: str,
    *,
    data_dir: Path = Path("data"),
    cache_dir: Path = Path("cache"),
    image_size: int | None = None,
    grey: bool = False,
    fit_to: tuple[int, int, int] | None = None,
    resize: int | None = None,
    skip_broken: bool = False,
    test_fraction: float | None = None,
    unlabelled: Path | None = None,
    on_event: OnEvent = ignore,
) -> Splits:
    """A data set: named, a folder or an archive; a KdError if it is missing or damaged, or its layout is unknown.

    Args:
        spec: a name in `DATASETS`, or a folder, archive or table, see `load_tree`.
        data_dir: folder of the files of named data sets.
        cache_dir: folder of the cache of decoded images.
        image_size: pixels per side; None keeps the images' own size if they share one, else 32.
        grey: turn colour images to grey (N, H, W, 1).
        fit_to: (H, W, C) of a model's input: images get its number of channels and, if it is square and no
            `image_size` is given, its size.
        resize: pixels of the shorter side before the centre crop, see `decode.resize`.
        skip_broken: leave out broken images, with a note, instead of an error.
        test_fraction: share of test images where the data has no split.
        unlabelled: a folder or archive of further images to train on; see `add_unlabelled`.
    """
    on_event(Progress("reading the data", 0, 0))
    if image_size is None and fit_to is not None and fit_to[0] == fit_to[1]:
        image_size = fit_to[0]
    full = checked_resize(resize, image_size, image_size)
    channels = 1 if grey else fit_to[2] if fit_to is not None and fit_to[2] in (1, 3) else None
    share = TEST_FRACTION if test_fraction is None else test_fraction
    if not 0 < share < 1:
        raise UsageError(f"--test-fraction {share:g}: must be above 0 and below 1")
    request = Request(spec, data_dir, cache_dir, image_size, channels, on_event, skip_broken, full, share)
    splits = DATASETS[spec](request) if spec in DATASETS else _load_path(existing(spec), request)
    if spec in DATASETS and Path(spec).exists():
        on_event(Note(f"{spec} is the data set of that name; what lies here is ./{spec}"))
    if unlabelled is not None:
        splits = add_unlabelled(splits, expand(str(unlabelled)), request)
    train, test = splits.train, splits.test
    splits = replace(
        splits,
        train=replace(train, resize=full, other_names=test.name_bytes),
        test=replace(test, resize=full, other_names=train.name_bytes),
    )
    _report_notes(splits, test_fraction, on_event)
    return splits


def existing(spec: str) -> Path:
    """The path of a folder, archive or table; a UsageError if there is none, with the nearest name of a data set."""
    path = expand(spec)
    if not spec or "\0" in spec or not path.exists():
        hint = nearest(spec, DATASETS, ", or the path of a folder, archive or table of images")
        raise UsageError(f"no dataset or path: {spec or '(empty)'}", hint)
    return path


def _report_notes(splits: Splits, test_fraction: float | None, on_event: OnEvent) -> None:
    """Report the notes of a data set as events."""
    for note in splits.notes:
        on_event(Note(note))
    if splits.overlap:
        count = f"{splits.overlap:,} of {len(splits.test):,} test images"
        on_event(Note(f"{count} are among the training images, pixel by pixel."))
    if test_fraction is not None and splits.test_fraction is None:
        on_event(Note(f"{splits.label} has test images: a test fraction of {test_fraction:g} has no effect."))


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


def recorded_source(model: Any) -> dict[str, Any]:
    """The settings of data that are recorded in a model's untrusted file; empty without any."""
    found = model.provenance.get("data")
    if not isinstance(found, Mapping) or not isinstance(spec := found.get("spec"), str) or not spec:
        return {}
    if spec not in DATASETS and "\0" not in spec:
        spec = str(recorded_path(expand(spec), model.path))
    known = {name: found.get(name) for name, kind in _RECORDED.items() if type(found.get(name)) is kind}
    return {"data": spec, **known}


def is_same_source(spec: str, other: str) -> bool:
    """Whether two texts name the same data set or path."""
    if spec in DATASETS or other in DATASETS or not other or "\0" in other:
        return spec == other
    return expand(spec).resolve() == expand(other).resolve()


def source_for(model: Any, config: DataSettings | ModelDataSettings) -> dict[str, Any]:
    """Arguments of `load` for the data of a model: as set, else as recorded in its file.

    The images are fitted to the model. A KdError if nothing is recorded, or the recorded path does not exist.
    """
    known, given = recorded_source(model), config.model_fields_set
    spec = config.data if "data" in given else None
    skip_broken = config.skip_broken or (spec is None and known.get("skip_broken", False))
    if spec is None:
        spec = known.get("data", config.data)
        if spec is None:
            raise KdError(
                f"no data set recorded in {model.path}",
                "Name it: --data cifar10, --data digits, or a folder or archive of images.",
            )
        _check_recorded(spec, model.path)
    return {
        "spec": spec,
        "skip_broken": skip_broken,
        "test_fraction": config.test_fraction or known.get("test_fraction"),
        "data_dir": config.data_dir if "data_dir" in given else recorded_path(config.data_dir, model.path),
        "cache_dir": config.cache_dir,
        "fit_to": model.input_size,
        "resize": model.resize,
    }


def _check_recorded(spec: str, model: Path) -> None:
    """Raise KdError unless the data that a model's file names is a data set, a folder or an archive that is there."""
    if spec in DATASETS:
        return
    path = Path(spec)
    try:
        usable = path.is_dir() or 0 <= regular_size(path) <= _MAX_RECORDED_ARCHIVE
    except (OSError, ValueError):
        usable = False
    if not usable:
        raise KdError(
            f"{model} was trained on {path.name}, which is not here as a folder or an archive of at most "
            + size(_MAX_RECORDED_ARCHIVE),
            "Pass it with --data.",
        )
