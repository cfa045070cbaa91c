"""Image trees in a folder or archive: train/<class>/* and test/<class>/*, or class folders without a split."""

import hashlib
import os
import posixpath
import unicodedata
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress
from kdcli.data import catalog, decode
from kdcli.data.datasets import Request
from kdcli.data.images import Splits
from kdcli.data.pack import FALLBACK_SIZE, Cache, Packer, Selection
from kdcli.data.sources import Source, open_source
from kdcli.data.split import digests_of_test_images

SPLIT_NAMES = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
BATCH_FILES = 64
BATCH_BYTES = 8 << 20
WAITING_BYTES = 64 << 20  # of files that are read and not decoded; one more may be larger
MAX_LISTED = 3  # broken images named in a note
LAYOUT_HINT = (
    "It must hold class folders: train/<class>/* and test/<class>/* (val and validation stand in for test), or "
    "<class>/* without a split."
)


@dataclass(frozen=True)
class Place:
    """Where an image belongs: `prefix` are the folders above its split.

    Its whole `name` is a part: images of one class may lie in `val/` and `valid/`, or in folders whose names are
    equal only once they are normalised.
    """

    prefix: str
    split: str  # train, test or val; "" of an image without a label
    class_name: str
    name: str


def is_ignored(name: str) -> bool:
    """Whether a file is hidden, lies in a hidden folder, or is what systems leave beside images."""
    parts = name.split("/")
    return (
        "__MACOSX" in parts
        or parts[-1].lower() in ("thumbs.db", "desktop.ini")
        or any(part.startswith(".") for part in parts)
    )


def place_of(name: str) -> Place | None:
    """The place that a file's path gives it; None for a file outside of all splits and classes."""
    parts = name.split("/")
    if "__MACOSX" in parts:
        return None
    # The plain layout first: a folder *above* may be called test, and a class may be called train.
    for at in (len(parts) - 3, *range(len(parts) - 3)):
        if at >= 0 and parts[at].lower() in SPLIT_NAMES:
            if is_ignored("/".join(parts[at:])):
                return None
            split, class_name = SPLIT_NAMES[parts[at].lower()], unicodedata.normalize("NFC", parts[at + 1])
            return Place("/".join(parts[:at]), split, class_name, name)
    return None


Places = dict[Place, int]


@dataclass
class Found:
    """Contents of a source."""

    images: Places = field(default_factory=dict)  # each place with the index of its image
    other: list[str] = field(default_factory=list)  # files that are not images
    broken: list[str] = field(default_factory=list)  # images that were skipped


def load_tree(path: Path, request: Request) -> Splits:
    """A data set from a folder or archive; decoded once, then read from the cache.

    Images that already have the requested size are stored as if no size were requested, so that one cache entry
    serves both. A KdError for another layout, a broken image, or with `skip_broken` a class that is left empty.
    """
    source = open_source(path)
    content, size, channels = source.key(), request.image_size, request.channels or 3
    recipe = {
        "tree": path.name,
        "content": content,
        "channels": channels,
        "crop": request.crop,
        "skip_broken": request.skip_broken,
        "test_fraction": request.test_fraction,
    }

    def cache_for(image_size: int | None) -> Cache:
        return Cache(request.cache_dir, {**recipe, "image_size": image_size}, request.on_event)

    packed = cache_for(None).load()
    if size is not None and (packed is None or packed.parts["train"].input_size[:2] != (size, size)):
        packed = cache_for(size).load()
    if packed is not None:
        return packed.splits(request.spec)
    with cache_for(size).packer(size, channels, request.crop) as packer:
        found, source, split_off = _found(source, packer, request)
        parts, classes, notes = _layout(found, source)
        if split_off:
            notes.append(
                f"{path.name} has no split: {len(parts['test']):,} of {len(found.images):,} images are test images, "
                f"chosen by their content (--test-fraction {request.test_fraction:g})."
            )
        if packer.resized and size is None:
            notes.append(
                f"Images differ in size: cropped to squares and resized to {FALLBACK_SIZE}x{FALLBACK_SIZE}. "
                "--image-size sets another size."
            )
        packed = cache_for(size if packer.resized else None).store(
            packer,
            {name: _selection(places, classes) for name, places in parts.items()},
            classes=classes,
            label=catalog.KNOWN_ARCHIVES.get(content, path.resolve().name or str(path)),
            notes=notes + skipped_notes(found, source),
            test_fraction=request.test_fraction if split_off else None,
        )
    return packed.splits(request.spec)


def decode_all(
    source: Source,
    keep: Callable[[int, str, decode.Pixels], None],
    on_event: OnEvent,
    skip_broken: bool,
    place: Callable[[str], Place | None] = place_of,
) -> Found:
    """Read images on this thread and decode them on a few others, which a few batches may wait for.

    Args:
        keep: called from any thread with each image's index, name and pixels (H, W, 3).
        place: where a file belongs by its name; None for a file to ignore.
    """
    found = Found()
    broken: dict[int, str] = {}

    def work(batch: list[tuple[int, str, bytes]]) -> None:
        for index, name, data in batch:
            try:
                with decode.decoded(data, name) as pixels:
                    keep(index, name, pixels)
                    del pixels  # before the next large image
            except KdError:
                if not skip_broken:
                    raise
                broken[index] = name

    workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    pending: deque[tuple[Future[None], int]] = deque()  # and the bytes of each batch
    waiting = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd files; only errors matter here
        try:
            for batch in _batches(source, found, place):
                size = sum(len(data) for _, _, data in batch)
                while pending and (len(pending) > 2 * workers or waiting + size > WAITING_BYTES):
                    future, decoded = pending.popleft()
                    future.result()
                    waiting -= decoded
                pending.append((pool.submit(work, batch), size))
                waiting += size
                on_event(Progress("decoding", source.done, source.total, source.unit))
            for future, _ in pending:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    found.images = {place: index for place, index in found.images.items() if index not in broken}
    found.broken = sorted(broken.values())
    return found


def _batches(
    source: Source, found: Found, place_of_name: Callable[[str], Place | None]
) -> Iterator[list[tuple[int, str, bytes]]]:
    """Index, name and bytes of the images, a batch at a time; enters them in `found`."""
    batch: list[tuple[int, str, bytes]] = []
    held = count = 0
    for name, data in source.read(lambda name: place_of_name(name) is not None):
        if (place := place_of_name(name)) is None:
            continue
        if not decode.is_image(data[:16], name):
            found.other.append(name)
            continue
        if not place.class_name.isprintable():
            raise KdError(f"unusable class name {place.class_name!r}", "Rename the folder.")
        found.images[place] = count  # of two members with one name the later holds, as in tar
        batch.append((count, name, data))
        held, count = held + len(data), count + 1
        if len(batch) >= BATCH_FILES or held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _layout(found: Found, source: Source) -> tuple[dict[str, Places], tuple[str, ...], list[str]]:
    """Images of the parts `train` and `test`, class names, and notes for the user; a KdError if there are none."""
    path = source.path
    filled = {(place.split, place.class_name) for place in found.images}
    for name in found.broken:
        place = place_of(name)
        if place is not None and (place.split, place.class_name) not in filled:
            raise _all_broken(f"{place.split}/{place.class_name}", source, name)
    hint = LAYOUT_HINT + f" Skipped {source.skipped} links and special files." * bool(source.skipped)
    by_split: dict[str, Places] = {"train": {}, "test": {}, "val": {}}
    for place, index in found.images.items():
        by_split[place.split][place] = index
    parts = {"train": by_split["train"], "test": by_split["test"] or by_split["val"]}
    for split, places in parts.items():
        if not places:
            raise KdError(f"{path} has no {split} images: no folder {split}/<class>", hint)
    prefix, *others = sorted({place.prefix for places in parts.values() for place in places})
    if others:
        raise KdError(
            f"{path} holds more than one dataset: {', '.join([prefix or '.', *others][:4])}",
            "Point --data at one of them.",
        )
    names, tested = ({place.class_name for place in places} for places in parts.values())
    by_number = all(name.isascii() and name.isdecimal() for name in names)  # 2 before 10
    classes = tuple(sorted(names, key=lambda name: (int(name) if by_number else 0, name)))
    if unknown := sorted(tested - names):
        raise KdError(
            f"{path} has test images of classes without train images: {', '.join(unknown[:8])}",
            "Folder names must be the same in train and test; upper and lower case differ.",
        )
    if len(classes) < 2:
        raise KdError(f"{path} has only one class: {classes[0]}", "A classifier needs two or more.")
    notes = [f"Images are below {prefix}/."] if prefix else []
    if not by_split["test"]:
        notes.append("Validation images stand in for test images: there is no folder test.")
    elif by_split["val"]:
        notes.append("The validation folder is not used: there is a test folder.")
    if absent := sorted(names - tested):
        notes.append(f"No test images of {', '.join(absent)}.")
    return parts, classes, notes


def _in_a_folder(name: str) -> Place | None:
    """An image in any folder, as of a class of that path."""
    folder = unicodedata.normalize("NFC", name).rpartition("/")[0]
    return Place("", "", folder, name) if folder and not is_ignored(name) else None


def _found(source: Source, packer: Packer, request: Request) -> tuple[Found, Source, bool]:
    """The packed images, the source as it was read, and whether its images had no split and were given one."""
    digests: dict[int, bytes] = {}

    def keep(index: int, name: str, pixels: decode.Pixels) -> None:
        packer.put(index, pixels)
        digests[index] = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()

    found = decode_all(source, keep, request.on_event, request.skip_broken)
    if found.images or found.broken:
        return found, source, False
    source = open_source(source.path)
    found = decode_all(source, keep, request.on_event, request.skip_broken, _in_a_folder)
    found.images = _split_off_test_images(found, source, digests, request.test_fraction)
    return found, source, True


def _split_off_test_images(
    found: Found, source: Source, digests: dict[int, bytes], fraction: float
) -> Places:
    """Images of class folders, in `train` and `test` by the SHA-256 of their pixels; empty without class folders.

    Classes are the folders below the deepest one that holds all images; images beside them are left out.
    """
    places = [*found.images, *filter(None, map(_in_a_folder, found.broken))]
    above = posixpath.commonpath(place.class_name for place in places) if places else ""
    by_class: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        by_class[place.class_name[len(above) :].lstrip("/").partition("/")[0]].append(place)
    by_class.pop("", None)
    if {name.lower() for name in by_class} <= SPLIT_NAMES.keys():  # train/* and test/*
        return {}
    made: Places = {}
    for class_name, members in by_class.items():
        images = {place.name: found.images[place] for place in members if place in found.images}
        if not images:
            raise _all_broken(class_name, source, members[0].name)
        test = digests_of_test_images((digests[index] for index in images.values()), fraction)
        for name, index in images.items():
            made[Place(above, "test" if digests[index] in test else "train", class_name, name)] = index
    return made


def _all_broken(folder: str, source: Source, name: str) -> KdError:
    return KdError(
        f"all images of {folder} in {source.path} are broken, as {name}",
        "A class needs images: replace them, or remove its folder.",
    )


def _selection(places: Places, classes: tuple[str, ...]) -> Selection:
    """Indices and labels of images, by class and then by name, whatever order they came in."""
    label_of = {name: label for label, name in enumerate(classes)}
    rows = sorted((label_of[place.class_name], place.name, index) for place, index in places.items())
    indices, labels = (np.array([row[part] for row in rows], dtype=np.int64) for part in (2, 0))
    return indices, labels


def skipped_notes(found: Found, source: Source) -> list[str]:
    """Notes on files of a source that are not used."""
    notes = []
    if found.broken:
        more = "" if len(found.broken) <= MAX_LISTED else ", …"
        listed = ", ".join(_printable(name) for name in found.broken[:MAX_LISTED])
        notes.append(f"Skipped {len(found.broken):,} broken images ({listed}{more}).")
    if found.other:
        notes.append(f"Skipped {len(found.other)} files that are not images ({_printable(found.other[0])}).")
    if source.skipped:
        notes.append(f"Skipped {source.skipped} links and special files.")
    return notes


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode()  # a file name may be any bytes
