"""Labelled images: train/<class>/* and test/<class>/*, class folders without a split, or a table."""

import hashlib
import posixpath
import shlex
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent
from kdcli.data import catalog, decode
from kdcli.data.datasets import Request
from kdcli.data.images import Splits
from kdcli.data.pack import FALLBACK_SIZE, Cache, Selection
from kdcli.data.read_images import Found, Place, Places, decode_all, is_ignored, skipped_notes
from kdcli.data.sources import Source, open_source
from kdcli.data.split import digests_of_test_images, split_of
from kdcli.data.tables import TableSource, table_source


def place_of(name: str) -> Place | None:
    """The place that a file's path gives it; None for a file outside of all splits and classes."""
    parts = name.split("/")
    if "__MACOSX" in parts:
        return None
    # The plain layout first: a folder *above* may be called test, and a class may be called train.
    for at in (len(parts) - 3, *range(len(parts) - 3)):
        if at >= 0 and (split := split_of(parts[at])):
            if is_ignored("/".join(parts[at:])):
                return None
            return Place("/".join(parts[:at]), split, unicodedata.normalize("NFC", parts[at + 1]), name)
    return None


def load_tree(path: Path, request: Request) -> Splits:
    """A data set from a folder, archive or table; decoded once, then read from the cache.

    Images that already have the requested size are stored as if no size were requested, so that one cache entry
    serves both. A KdError for another layout, a broken image, or with `skip_broken` a class that is left empty.
    """
    source = table_source(path) or open_source(path)
    content, size, channels = source.key(), request.image_size, request.channels or 3
    key = {
        "tree": path.name,
        "content": content,
        "channels": channels,
        "resize": request.resize,
        "skip_broken": request.skip_broken,
        "test_fraction": request.test_fraction,
    }

    def cache_for(image_size: int | None) -> Cache:
        return Cache(request.cache_dir, {**key, "image_size": image_size}, request.on_event)

    packed = cache_for(None).load()
    if size is not None and (packed is None or packed.parts["train"].input_size[:2] != (size, size)):
        packed = cache_for(size).load()
    if packed is not None:
        return packed.splits(request.spec)
    with cache_for(size).packer(size, channels, request.resize) as packer:
        found = find_images(source, packer.put, request.on_event, request.skip_broken, request.test_fraction)
        parts, classes, notes = layout(found, source)
        if found.split_off:
            notes.append(
                f"{path.resolve().name} has no split: {len(parts['test']):,} of {len(found.images):,} images are "
                f"test images, chosen by their content (--test-fraction {request.test_fraction:g})."
            )
        if packer.resized and size is None:
            notes.append(
                f"Images differ in size: cropped to squares and resized to {FALLBACK_SIZE}x{FALLBACK_SIZE}. "
                "--image-size sets another size."
            )
        packed = cache_for(size if packer.resized else None).store(
            packer,
            {
                "train": _selection(classes, parts["train"], parts["val"]),
                "test": _selection(classes, parts["test"]),
            },
            classes=classes,
            label=catalog.KNOWN_ARCHIVES.get(content, path.resolve().name or str(path)),
            notes=notes + skipped_notes(found, source),
            test_fraction=request.test_fraction if found.split_off else None,
            validation=len(parts["val"]),
        )
    return packed.splits(request.spec)


def layout(found: Found, source: Source) -> tuple[dict[str, Places], tuple[str, ...], list[str]]:
    """Images of the parts `train`, `test` and `val`, class names, and notes for the user; KdError if there are none.

    Where there are no test images, those of `val` stand in for them.
    """
    path = source.path
    filled = {(split, place.class_name) for place in found.images for split in (place.split, "")}
    for place in found.broken:
        if place.class_name and (place.split, place.class_name) not in filled:
            folder = f"{place.split}/{place.class_name}".lstrip("/")
            raise KdError(
                f"all images of {folder} in {path} are broken, as {place.name}",
                "A class needs images: replace them, or remove its folder.",
            )
    parts: dict[str, Places] = {"train": {}, "test": {}, "val": {}}
    for place, index in found.images.items():
        parts[place.split][place] = index
    stand_in = not parts["test"]
    if stand_in:
        parts["test"], parts["val"] = parts["val"], {}
    for split in ("train", "test"):
        if not parts[split]:
            raise KdError(f"{path} has no {split} images", _layout_hint(source, parts["train"]))
    prefixes = {place.prefix for place in found.images}
    prefix, *others = sorted(prefixes if len(prefixes) == 1 else set(map(_above_the_split, found.images)))
    if others:
        raise KdError(
            f"{path} holds more than one dataset: {', '.join([prefix or '.', *others][:4])}",
            "Point --data at one of them.",
        )
    names, tested, validated = ({place.class_name for place in places} for places in parts.values())
    by_number = all(name.isascii() and name.isdecimal() for name in names)  # 2 before 10
    stated = {name: number for number, name in enumerate(source.classes)}
    classes = tuple(
        sorted(names, key=lambda name: (stated.get(name, len(stated)), int(name) if by_number else 0, name))
    )
    if unknown := sorted((tested | validated) - names):
        raise KdError(
            f"{path} has classes without training images: {', '.join(unknown[:8])}",
            "Class names must be the same in train, val and test; upper and lower case differ.",
        )
    if len(classes) < 2:
        raise KdError(f"{path} has only one class: {classes[0]}", "A classifier needs two or more.")
    notes = [f"Images are below {prefix}/."] if prefix else []
    if stand_in:
        notes.append("Validation images stand in for test images: there is no test split.")
    elif parts["val"]:
        count = f"{len(parts['val']):,}"
        notes.append(f"{count} validation images by the data's own split: --val-fraction has no effect.")
    if unused := [name for name in stated if name not in names]:
        notes.append(f"Classes of {path.name} without images are left out: {', '.join(unused[:8])}.")
    if absent := sorted(names - tested):
        notes.append(f"No test images of {', '.join(absent)}.")
    return parts, classes, notes


def _layout_hint(source: Source, train: Places) -> str:
    """A remedy where a split has no images: the folders of a source, or training images as test images."""
    if source.skipped:
        return f"{source.layout_hint} Skipped {len(source.skipped)} links and special files."
    if not train or not source.path.is_dir():
        return source.layout_hint
    place = next(iter(train))
    depth = len(PurePosixPath(place.prefix).parts) + 1
    split = PurePosixPath(*PurePosixPath(place.name).parts[:depth])
    if split_of(split.name) is None:  # the source has no folders of splits
        return source.layout_hint
    return (
        f"To use a part of the training images as test images: --data {shlex.quote(str(source.path / split))}"
    )


def _above_the_split(place: Place) -> str:
    """The folders above an image's split, where that is a folder in one of the same name: seg_train/seg_train."""
    above, _, last = place.prefix.rpartition("/")
    return above if split_of(last) == place.split else place.prefix


def _in_a_folder(name: str) -> Place | None:
    """An image in any folder, as of a class of that path."""
    folder = unicodedata.normalize("NFC", name).rpartition("/")[0]
    return Place("", "", folder, name) if folder and not is_ignored(name) else None


def find_images(
    source: Source,
    put: Callable[[int, decode.Pixels], None],
    on_event: OnEvent,
    skip_broken: bool,
    test_fraction: float,
) -> Found:
    """The images of a source; without a split they are given one, and the source is read twice.

    `put` is called from any thread with each image's index and pixels (H, W, 3).
    """
    digests: dict[int, bytes] = {}

    def keep(index: int, name: str, pixels: decode.Pixels) -> None:
        put(index, pixels)
        digests[index] = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()

    def find(place: Callable[[str], Place | None]) -> tuple[Found, set[str]]:
        found = decode_all(source, keep, on_event, skip_broken, place)
        found.digests = digests
        return found, {place.split for place in (*found.images, *found.broken)}

    if isinstance(source, TableSource):
        listed = source.labels
        found, splits = find(lambda name: Place("", *listed[name], name))
        if len(splits) > 1 and "" in splits:
            raise KdError(f"{source.path} names the split of some images only", source.layout_hint)
        if len(splits) > 1:
            return found
        above, by_class = "", _grouped((place.class_name, place) for place in (*found.images, *found.broken))
    else:
        found, splits = find(place_of)
        if splits:
            return found
        found, _ = find(_in_a_folder)
        above, by_class = _class_folders([*found.images, *found.broken])
        _refuse_splits(source.path, above, by_class)
    _split_off_test_images(found, above, by_class, test_fraction)
    found.split_off = True
    return found


def _grouped(pairs: Iterable[tuple[str, Place]]) -> dict[str, list[Place]]:
    groups: dict[str, list[Place]] = defaultdict(list)
    for name, place in pairs:
        groups[name].append(place)
    return groups


def _class_folders(places: list[Place]) -> tuple[str, dict[str, list[Place]]]:
    """The deepest folder that holds all images, and the images of each folder below it; none without class folders.

    Images beside the class folders are left out.
    """
    above = posixpath.commonpath(place.class_name for place in places) if places else ""
    by_class = _grouped(
        (place.class_name[len(above) :].lstrip("/").partition("/")[0], place) for place in places
    )
    by_class.pop("", None)
    if all(map(split_of, by_class)):  # train/* and test/*
        return above, {}
    return above, by_class


def _refuse_splits(path: Path, above: str, by_class: dict[str, list[Place]]) -> None:
    """Raise KdError where class folders hold the same folders: they seem to be splits under other names."""
    below = len(f"{above}/".lstrip("/"))
    alike: dict[frozenset[str], list[str]] = defaultdict(list)
    for name, places in by_class.items():
        alike[frozenset(f"{place.class_name[below:]}/".split("/")[1] for place in places)].append(name)
    for inner, names in alike.items():
        if len(names) > 1 and len(inner) > 1 and "" not in inner:
            raise KdError(
                f"the folders {', '.join(sorted(names)[:4])} of {path} hold the same folders, as splits do",
                "Rename splits to train, val and test; move images of classes into one folder a class.",
            )


def _split_off_test_images(
    found: Found, above: str, by_class: dict[str, list[Place]], fraction: float
) -> None:
    """Put the images of each class in `train` and `test` by the SHA-256 of their pixels."""
    class_of = {place: name for name, members in by_class.items() for place in members}
    found.broken = {
        replace(place, split="", class_name=class_of.get(place, "")): problem
        for place, problem in found.broken.items()
    }
    made: Places = {}
    for class_name, members in by_class.items():
        images = {place.name: found.images[place] for place in members if place in found.images}
        test = digests_of_test_images((found.digests[index] for index in images.values()), fraction)
        for name, index in images.items():
            split = "test" if found.digests[index] in test else "train"
            made[Place(above, split, class_name, name)] = index
    found.images = made


def _selection(classes: tuple[str, ...], *parts: Places) -> Selection:
    """Indices, labels and names of one part after another, by class and then by name, whatever order they came in."""
    label_of = {name: label for label, name in enumerate(classes)}
    rows = [
        row
        for places in parts
        for row in sorted((label_of[place.class_name], place.name, index) for place, index in places.items())
    ]
    indices, labels = (np.array([row[part] for row in rows], dtype=np.int64) for part in (2, 0))
    return Selection(indices, labels, [name for _, name, _ in rows])
