"""Contents of a folder, archive or table of images, and problems with it."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kdcli.base.config.settings import TEST_FRACTION
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent
from kdcli.base.text import dims
from kdcli.data import decode
from kdcli.data.datasets import Request
from kdcli.data.read_images import Found, Place, is_ignored
from kdcli.data.sources import Source, open_source
from kdcli.data.tables import table_source
from kdcli.data.tree import find_images, layout

_TINY = 8  # pixels of a side, below which an image is named
Size = tuple[int, int]  # (H, W)


@dataclass(frozen=True)
class Survey:
    """Contents and problems of a data set, for `kd data`."""

    counts: dict[str, dict[str, int]]  # images of each class, by split and class
    sizes: dict[str, Size]  # smallest, median and largest image by its number of pixels
    kinds: dict[str, int]  # images that are not plain RGB
    problems: dict[str, list[str]]  # names of files, by problem
    refusal: KdError | None  # the error that training would end in


def survey(path: Path, skip_broken: bool, on_event: OnEvent) -> Survey:
    """Read all images of a source once; KdError if it cannot be read at all."""
    sizes: dict[int, Size] = {}

    def put(index: int, pixels: decode.Pixels) -> None:
        sizes[index] = pixels.shape[:2]

    request = Request(str(path), path, path, None, None, on_event, True, 1.0, TEST_FRACTION)
    found, source, _ = find_images(table_source(path) or open_source(path), put, request)
    refusal = None
    try:
        layout(found, source)
    except KdError as error:
        refusal = error
    if found.broken and not skip_broken:
        refusal = refusal or KdError(
            f"{path} has {len(found.broken):,} broken images",
            "Replace or remove them, or pass --skip-broken.",
        )
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for place in found.images:
        counts[place.split][place.class_name] += 1
    ordered = sorted((sizes[index] for index in found.images.values()), key=lambda size: size[0] * size[1])
    named = {"smallest": 0, "median": len(ordered) // 2, "largest": -1} if ordered else {}
    return Survey(
        {split: dict(sorted(counts[split].items())) for split in ("train", "val", "test") if split in counts},
        {name: ordered[number] for name, number in named.items()},
        dict(Counter(found.kinds)),
        {problem: names for problem, names in _problems(found, source, sizes).items() if names},
        refusal,
    )


def _problems(found: Found, source: Source, sizes: dict[int, Size]) -> dict[str, list[str]]:
    images = {place.name: sizes[index] for place, index in found.images.items()}
    names = [*images, *(place.name for place in found.broken)]
    filled = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    members = Counter(place.class_name for place in found.images)
    copies: dict[bytes, list[Place]] = defaultdict(list)
    for place, index in found.images.items():
        copies[found.digests[index]].append(place)
    groups = [
        (" = ".join(sorted(place.name for place in places)), places)
        for places in copies.values()
        if places[1:]
    ]
    return {
        "broken": list(found.broken.values()),
        "not an image": found.other,
        f"smaller than {_TINY} pixels": [
            f"{name}, {dims(size)}" for name, size in images.items() if min(size) < _TINY
        ],
        f"more than {decode.LARGE_PIXELS // 1_000_000} million pixels": [
            f"{name}, {dims(size)}"
            for name, size in images.items()
            if size[0] * size[1] > decode.LARGE_PIXELS
        ],
        "link or special file": source.skipped,
        "folder without images": [
            folder for folder in source.folders if folder and folder not in filled and not is_ignored(folder)
        ],
        "class of one image": [name for name, count in members.items() if count == 1],
        "equal images in two splits": [
            text for text, places in groups if len({place.split for place in places}) > 1
        ],
        "equal images in two classes": [
            text for text, places in groups if len({place.class_name for place in places}) > 1
        ],
        "name with control characters": [name for name in names if not name.isprintable()],
    }
