"""Image trees: train/<class>/* and test/<class>/* in a folder or archive."""

from __future__ import annotations

import hashlib
import os
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress
from kdcli.data import catalog, decode
from kdcli.data.images import Splits
from kdcli.data.pack import FALLBACK_SIZE, FORMAT_VERSION, Cache, Selection, Spool
from kdcli.data.sources import Source, open_source

SPLIT_NAMES = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
JUNK_NAMES = ("thumbs.db", "desktop.ini")
BATCH_FILES = 64
BATCH_BYTES = 8 << 20
WAITING_BYTES = 64 << 20  # of files that are read and not decoded; one more may be larger
EVENT_SECONDS = 0.25
SHOWN_BROKEN = 3
LAYOUT_HINT = "It must hold train/<class>/* and test/<class>/* (val and validation stand in for test)."


@dataclass(frozen=True)
class Place:
    """Where an image belongs: `below` are the folders above its split, `rest` its path below the class."""

    below: str
    split: str  # train, test or val; "" of an image without a label
    class_name: str
    rest: str


def is_junk(parts: Sequence[str]) -> bool:
    """Whether a file, given as the parts of its path, is what systems leave beside images."""
    return "__MACOSX" in parts or parts[-1].lower() in JUNK_NAMES


def is_aside(name: str) -> bool:
    """Whether a file is hidden, lies in a hidden folder, or is junk."""
    parts = name.split("/")
    return is_junk(parts) or any(part.startswith(".") for part in parts)


def place_of(name: str) -> Place | None:
    """The place that a file's path gives it; None for a file that belongs to no class of no split."""
    parts = name.split("/")
    if is_junk(parts):
        return None
    # The plain layout first: a folder *above* may be called test, and a class may be called train.
    positions = [len(parts) - 3, *range(len(parts) - 3)]
    for at in positions:
        if at >= 0 and parts[at].lower() in SPLIT_NAMES:
            if any(part.startswith(".") for part in parts[at:]):
                return None
            class_name = unicodedata.normalize("NFC", parts[at + 1])
            return Place(
                "/".join(parts[:at]), SPLIT_NAMES[parts[at].lower()], class_name, "/".join(parts[at + 2 :])
            )
    return None


def load_tree(
    path: Path,
    spec: str,
    *,
    cache_dir: Path,
    image_size: int | None,
    channels: int,
    on_event: OnEvent,
    skip_broken: bool = False,
) -> Splits:
    """A dataset from a folder or archive; decoded once, then read from the cache.

    Images that already have the size asked for are kept as they would be if no size were asked for: one entry of
    the cache serves both. So it is with `skip_broken` and images none of which is broken.

    Raises:
        KdError: not an archive, no such layout, a broken image; with `skip_broken` a class that is left empty.
    """
    source = open_source(path)
    content = source.key()

    def cache_for(size: int | None, skipping: bool) -> Cache:
        words = f"tree {FORMAT_VERSION} {content} {size} {path.name}" + (" grey" if channels == 1 else "")
        words += " without broken images" if skipping else ""
        return Cache(cache_dir, hashlib.sha256(words.encode("utf-8", "replace")).hexdigest()[:32])

    for skipping in (False, True)[: 1 + skip_broken]:
        known = cache_for(None, skipping).load(spec)
        if image_size is not None and (
            known is None or known.train.input_size[:2] != (image_size, image_size)
        ):
            known = cache_for(image_size, skipping).load(spec)
        if known is not None:
            return known
    cache = cache_for(image_size, skip_broken)
    with cache.packing(image_size, channels) as (workspace, spool):
        found = decode_all(source, lambda index, _, pixels: spool.put(index, pixels), on_event, skip_broken)
        if found.lost:
            raise KdError(
                f"all images of {'/'.join(found.lost[0])} in {path} are broken, as {found.broken[0]}",
                "A class needs images: mend them, or remove its folder.",
            )
        cache = cache_for(image_size if spool.resized else None, bool(found.broken))
        _store(found, source, content, spool, cache, workspace, image_size)
    return cache.stored(spec)


@dataclass
class Found:
    """What a source held: each place with the number of its image in the spool."""

    images: dict[Place, int] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)  # files that are no images
    broken: list[str] = field(default_factory=list)  # images that were skipped
    lost: list[tuple[str, str]] = field(
        default_factory=list
    )  # splits' classes all of whose images are broken


def decode_all(
    source: Source,
    keep: Callable[[int, str, decode.Pixels], None],
    on_event: OnEvent,
    skip_broken: bool,
    place: Callable[[str], Place | None] = place_of,
) -> Found:
    """Read on this thread, decode on a few others; at most a few batches wait.

    Args:
        keep: called from any thread with each image's number, name and pixels (H, W, 3).
        place: where a file belongs by its name; None for one that is not wanted.

    Raises:
        KdError: a broken image, without `skip_broken`.
    """
    found = Found()
    room = decode.Room()
    broken: dict[int, str] = {}
    workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    started = announced = time.monotonic()
    pending: dict[Future[int], int] = {}  # and the bytes that each holds
    done = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def work(batch: list[tuple[int, str, bytes]]) -> int:
        for index, name, data in batch:
            try:
                decode.decode_into(partial(keep, index, name), data, name, room)
            except KdError:
                if not skip_broken:
                    raise
                broken[index] = name
        return len(batch)

    def announce() -> None:
        at = source.position()
        values = {"images_per_s": done / max(time.monotonic() - started, 1e-3)}
        on_event(Progress("decoding", at.done, at.total, at.unit, values))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on odd files: what matters is an error
        try:
            for batch in _batches(source, found, skip_broken, place):
                size = sum(len(data) for _, _, data in batch)
                while pending and (
                    len(pending) > 2 * workers or sum(pending.values()) + size > WAITING_BYTES
                ):
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        del pending[future]
                        done += future.result()
                pending[pool.submit(work, batch)] = size
                if time.monotonic() - announced >= EVENT_SECONDS:
                    announced = time.monotonic()
                    announce()
            done += sum(future.result() for future in pending)
            announce()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    _leave_out(found, broken)
    return found


def _leave_out(found: Found, broken: dict[int, str]) -> None:
    """Take broken images off what was found."""
    before = {(place.split, place.class_name) for place in found.images}
    found.images = {place: index for place, index in found.images.items() if index not in broken}
    found.broken = sorted([*found.broken, *broken.values()])
    found.lost = sorted(before - {(place.split, place.class_name) for place in found.images})


def _batches(
    source: Source, found: Found, skip_broken: bool, place_of_name: Callable[[str], Place | None]
) -> Iterator[list[tuple[int, str, bytes]]]:
    batch: list[tuple[int, str, bytes]] = []
    held = count = 0
    for name, data in source.read(lambda name: place_of_name(name) is not None):
        place = place_of_name(name)
        assert place is not None
        suffix = Path(name).suffix.lower()
        if not decode.is_image(data[:16]) and suffix not in decode.SUFFIXES:
            if suffix in decode.OTHER_SUFFIXES and skip_broken:
                found.broken.append(name)
            elif suffix in decode.OTHER_SUFFIXES:
                raise KdError(
                    f"cannot read image {name}: {suffix[1:]} is not supported",
                    "Convert it to PNG, JPEG, WebP or BMP.",
                )
            else:
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


def _store(
    found: Found,
    source: Source,
    content: str,
    spool: Spool,
    cache: Cache,
    workspace: Path,
    image_size: int | None,
) -> None:
    train, test, classes = _choose(found, source)
    notes = _notes(found, source, spool, image_size)
    missing = sorted(set(classes) - {place.class_name for place in test})
    if missing:
        notes.append(f"No test images of {', '.join(missing)}.")
    label = catalog.KNOWN_ARCHIVES.get(content, source.path.resolve().name or str(source.path))
    selections = [_selection(places, classes) for places in (train, test)]
    cache.store(workspace, spool.view(), selections, classes=classes, label=label, notes=notes)


Places = dict[Place, int]


def _choose(found: Found, source: Source) -> tuple[Places, Places, tuple[str, ...]]:
    """Train, test and classes."""
    path, links = source.path, source.skipped.links
    hint = LAYOUT_HINT + (f" Skipped {links} links and special files." if links else "")
    by_split: dict[str, Places] = {"train": {}, "test": {}, "val": {}}
    for place, index in found.images.items():
        by_split[place.split][place] = index
    if not found.images:
        raise KdError(f"no images found in train/<class> or test/<class> of {path}", hint)
    train, test = by_split["train"], by_split["test"] or by_split["val"]
    if not train:
        raise KdError(f"{path} has no training images: no folder train/<class>", hint)
    if not test:
        raise KdError(f"{path} has no test images: no folder test/<class>", hint)
    below = sorted({place.below for place in (*train, *test)})
    if len(below) > 1:
        raise KdError(
            f"{path} holds more than one dataset: {', '.join(name or '.' for name in below[:4])}",
            "Point --data at one of them.",
        )
    classes = tuple(sorted_names({place.class_name for place in train}))
    unknown = sorted({place.class_name for place in test} - set(classes))
    if unknown:
        raise KdError(
            f"{path} has test images of classes without training images: {', '.join(unknown[:8])}",
            "Folder names must be the same in train and test; upper and lower case differ.",
        )
    if len(classes) < 2:
        raise KdError(f"{path} has only one class: {classes[0]}", "A classifier needs two or more.")
    return train, test, classes


def sorted_names(names: set[str]) -> list[str]:
    """Class names in the order of their labels: by number if all are numbers (2 before 10), else as text."""
    if all(name.isascii() and name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _selection(places: Places, classes: tuple[str, ...]) -> Selection:
    """Images by class and then by name, whatever order they came in."""
    number = {name: label for label, name in enumerate(classes)}
    rows = sorted((number[place.class_name], place.rest, index) for place, index in places.items())
    labels = np.array([label for label, _, _ in rows], dtype=np.int64)
    return Selection(np.array([index for _, _, index in rows], dtype=np.int64), labels)


def _notes(found: Found, source: Source, spool: Spool, image_size: int | None) -> list[str]:
    notes = []
    splits = {place.split for place in found.images}
    below = next(place.below for place in found.images if place.split == "train")
    if below:
        notes.append(f"Images are below {below}/.")
    if "test" not in splits:
        notes.append("Validation images stand in for test images: there is no folder test.")
    elif "val" in splits:
        notes.append("The validation folder is not used: there is a test folder.")
    if spool.resized and image_size is None:
        notes.append(
            f"Images differ in size: cropped to squares and resized to {FALLBACK_SIZE}x{FALLBACK_SIZE}. "
            "--image-size sets another size."
        )
    return notes + left_out(found, source)


def left_out(found: Found, source: Source) -> list[str]:
    """Notes on files that a source holds and that are not used."""
    notes = []
    if found.broken:
        more = "" if len(found.broken) <= SHOWN_BROKEN else ", …"
        shown = ", ".join(_shown(name) for name in found.broken[:SHOWN_BROKEN])
        notes.append(f"Skipped {len(found.broken):,} broken images ({shown}{more}).")
    if found.other:
        notes.append(f"Skipped {len(found.other)} files that are no images ({_shown(found.other[0])}).")
    if source.skipped.links:
        notes.append(f"Skipped {source.skipped.links} links and special files.")
    return notes


def _shown(name: str) -> str:
    return name.encode("utf-8", "replace").decode()  # a name may be any bytes
