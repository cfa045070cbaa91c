"""The images of a source, read on one thread and decoded on others."""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from joblib import cpu_count

from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress
from kdcli.base.text import printable
from kdcli.data import decode
from kdcli.data.sources import Source

BATCH_FILES = 64
BATCH_BYTES = 8 << 20
WAITING_BYTES = 64 << 20  # of files that are read and not decoded; one more may be larger
MAX_LISTED = 3  # broken images named in a note


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


Places = dict[Place, int]


@dataclass
class Found:
    """Contents of a source."""

    images: Places = field(default_factory=dict)  # each place with the index of its image
    other: list[str] = field(default_factory=list)  # files that are not images
    broken: dict[Place, str] = field(default_factory=dict)  # skipped images, with the reason
    kinds: list[str] = field(default_factory=list)  # conversions, see `decode.decoded`
    digests: dict[int, bytes] = field(default_factory=dict)  # SHA-256 of each image's pixels
    split_off: bool = False  # whether test images were split off, as the source has no split


def is_ignored(name: str) -> bool:
    """Whether a file is hidden, lies in a hidden folder, or is a system's own, such as Thumbs.db."""
    parts = name.split("/")
    return (
        "__MACOSX" in parts
        or parts[-1].lower() in ("thumbs.db", "desktop.ini")
        or any(part.startswith(".") for part in parts)
    )


def decode_all(
    source: Source,
    keep: Callable[[int, str, decode.Pixels], None],
    on_event: OnEvent,
    skip_broken: bool,
    place: Callable[[str], Place | None],
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
                with decode.decoded(data, name, found.kinds) as pixels:
                    keep(index, name, pixels)
                    del pixels  # before the next large image
            except KdError as error:
                if not skip_broken:
                    raise
                broken[index] = error.message

    workers = min(8, cpu_count())
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
    places = sorted(found.images.items(), key=lambda item: item[0].name)
    found.broken = {place: broken[index] for place, index in places if index in broken}
    found.images = {place: index for place, index in found.images.items() if index not in broken}
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
            raise KdError(f"unusable class name {place.class_name!r}", "Rename the class.")
        found.images[place] = count  # of two members with one name the later holds, as in tar
        batch.append((count, name, data))
        held, count = held + len(data), count + 1
        if len(batch) >= BATCH_FILES or held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def skipped_notes(found: Found, source: Source) -> list[str]:
    """Notes on files of a source that are not used, and on images that are not plain RGB."""
    notes = []
    if found.broken:
        more = "" if len(found.broken) <= MAX_LISTED else ", …"
        listed = ", ".join(printable(place.name) for place in list(found.broken)[:MAX_LISTED])
        notes.append(f"Skipped {len(found.broken):,} broken images ({listed}{more}).")
    if found.other:
        notes.append(f"Skipped {len(found.other)} files that are not images ({printable(found.other[0])}).")
    if source.skipped:
        notes.append(f"Skipped {len(source.skipped)} links and special files.")
    kinds = Counter(found.kinds)
    if kinds.keys() - {"grey"} or 0 < kinds["grey"] < len(found.images):
        listed = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        notes.append(f"Images that are not plain RGB: {listed}.")
    return notes
