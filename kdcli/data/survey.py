"""Contents of a data set, and problems with it."""

import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from kdcli.base.config import DataConfig
from kdcli.base.config.settings import TEST_FRACTION
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent
from kdcli.base.plotting import drawn_to, shown
from kdcli.base.text import dims
from kdcli.data import decode, rows
from kdcli.data.datasets import DATASETS
from kdcli.data.images import Splits
from kdcli.data.load import existing, load
from kdcli.data.read_images import Found, Place, is_ignored
from kdcli.data.sources import Source, open_source
from kdcli.data.tables import Row, TableSource, table_source
from kdcli.data.tree import find_images, layout

_TINY = 8  # pixels of a side, below which an image is named
_NEAR_BITS = 3  # of 64, by which the hashes of near-duplicates differ
_LEAST = 16  # pixels of a side, below which an image has no hash
_FLAT = 16  # grey levels between its darkest and its brightest part, below which it has none
_PAIRS = 4 << 20  # of hashes, compared at a time
_SHEET_COLUMNS, _SHEET_ROWS, _SHEET_SIDE = 8, 100, 64  # images of a class, classes, pixels
Size = tuple[int, int]  # (H, W)


@dataclass(frozen=True)
class Survey:
    """Contents and problems of a data set, for `kd data`."""

    counts: dict[str, dict[str, int]]  # images of each class, by split and class
    sizes: dict[str, Size]  # smallest, median and largest image by its number of pixels
    kinds: dict[str, int]  # images that are not plain RGB
    problems: dict[str, list[str]]  # names of files, by problem
    refusal: KdError | None  # the error that training would end in

    @property
    def imbalance(self) -> float:
        """Training images of the largest class, as a multiple of those of the smallest."""
        counts = self.counts.get("train", {0: 0}).values()
        return max(counts) / max(1, min(counts))


def survey(spec: str, config: DataConfig, on_event: OnEvent) -> Survey:
    """Read all images of a data set once, and draw the sheet; KdError if it cannot be read at all."""
    sizes: dict[int, Size] = {}
    hashes: dict[int, int] = {}

    def put(index: int, pixels: decode.Pixels) -> None:
        sizes[index] = pixels.shape[:2]
        if min(sizes[index]) >= _LEAST and (value := difference_hash(pixels)) is not None:
            hashes[index] = value

    source = _source_of(spec, config, on_event)
    found = find_images(source, put, on_event, True, TEST_FRACTION)
    refusal = None
    try:
        layout(found, source)
    except KdError as error:
        refusal = error
    if found.broken and not config.skip_broken:
        refusal = refusal or KdError(
            f"{spec} has {len(found.broken):,} broken images",
            "Replace or remove them, or pass --skip-broken.",
        )
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for place in found.images:
        counts[place.split][place.class_name] += 1
    ordered = sorted((sizes[index] for index in found.images.values()), key=lambda size: size[0] * size[1])
    named = {"smallest": 0, "median": len(ordered) // 2, "largest": -1} if ordered else {}
    problems = _problems(found, source, sizes)
    problems["near-duplicate images in two splits"] = list(_near_copies(found, hashes))
    if config.sheet is not None:
        _draw_sheet(config.sheet, *sheet_of(found, source))
    return Survey(
        {split: dict(sorted(counts[split].items())) for split in ("train", "val", "test") if split in counts},
        {name: ordered[number] for name, number in named.items()},
        dict(Counter(found.kinds)),
        {problem: names for problem, names in problems.items() if names},
        refusal,
    )


def _problems(found: Found, source: Source, sizes: dict[int, Size]) -> dict[str, list[str]]:
    images = {place.name: sizes[index] for place, index in found.images.items()}
    names = [*images, *(place.name for place in found.broken)]
    filled = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    members = Counter(place.class_name for place in found.images)
    alike: dict[str, list[str]] = defaultdict(list)
    for name in sorted(members):
        alike[re.sub("[-_ ]", "", name.casefold())].append(name)
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
        "link or special file": [*source.skipped],
        "folder without images of a class": [
            folder for folder in source.folders if folder and folder not in filled and not is_ignored(folder)
        ],
        "class of one image": [name for name, count in members.items() if count == 1],
        "similar class names": [" = ".join(group) for group in alike.values() if group[1:]],
        "duplicate images in two splits": [
            text for text, places in groups if len({place.split for place in places}) > 1
        ],
        "duplicate images in two classes": [
            text for text, places in groups if len({place.class_name for place in places}) > 1
        ],
        "name with control characters": [name for name in names if not name.isprintable()],
    }


def _source_of(spec: str, config: DataConfig, on_event: OnEvent) -> Source:
    """The images as files; those of a named data set, which are none, in a table."""
    path = Path(spec) if spec in DATASETS else existing(spec)
    if spec not in DATASETS and not any(known.locate(path) for known in DATASETS.values()):
        if table := table_source(path):
            table.key()  # refuses missing files
        return table or open_source(path)
    splits = load(spec, data_dir=config.data_dir, cache_dir=config.cache_dir, on_event=on_event)
    return TableSource(path, rows=partial(_rows_of, splits), total=len(splits.train) + len(splits.test))


def _rows_of(splits: Splits) -> Iterator[Row]:
    for split, part in (("train", splits.train), ("test", splits.test)):
        for number, label in enumerate(part.labels.tolist()):
            stream = io.BytesIO()
            pixels = rows.take(part.images, slice(number, number + 1)).squeeze()
            Image.fromarray(pixels).save(stream, "BMP")
            yield Row(f"{split} {number}", split, part.classes[label], stream.getvalue(), part.classes)


def difference_hash(pixels: decode.Pixels) -> int | None:
    """64 bits: which of 8 × 8 parts of an image (H, W, 3) are darker than their right neighbours; None if flat."""
    small = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.LANCZOS))
    if np.ptp(small) < _FLAT:
        return None
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def _near_copies(found: Found, hashes: Mapping[int, int]) -> Iterator[str]:
    """Each image that is nearly one of another split, with the nearest: test in train and val, val in train."""
    known: dict[str, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
    for place, index in found.images.items():
        if place.split in known and index in hashes:
            known[place.split].append((place.name, index))
    for ours, theirs in ((known["val"], known["train"]), (known["test"], known["train"] + known["val"])):
        mine, others = (np.array([hashes[index] for _, index in part], np.uint64) for part in (ours, theirs))
        step = max(1, _PAIRS // max(1, len(others)))
        for start in range(0, len(mine) if theirs else 0, step):
            bits = np.bitwise_count(mine[start : start + step, None] ^ others)
            for row in np.flatnonzero(bits.min(axis=1) <= _NEAR_BITS).tolist():
                (name, index), (other, twin) = ours[start + row], theirs[bits[row].argmin()]
                if found.digests[index] != found.digests[twin]:
                    yield f"{name} ≈ {other}"


def sheet_of(found: Found, source: Source) -> tuple[list[str], decode.Pixels]:
    """Names of the classes, and a picture with a row for each: some images, spread over its files."""
    members: dict[str, list[str]] = defaultdict(list)
    for place in found.images:
        members[place.class_name].append(place.name)
    classes, side = sorted(members)[:_SHEET_ROWS], _SHEET_SIDE
    row_of: dict[str, int] = {}
    for row, title in enumerate(classes):
        row_of |= dict.fromkeys(members[title][:: -(-len(members[title]) // _SHEET_COLUMNS)], row)
    picture = np.full((max(1, len(classes)), _SHEET_COLUMNS, side, side, 3), 255, np.uint8)
    columns = Counter[int]()
    for name, data in source.read(row_of.__contains__):
        row = row_of[name]
        picture[row, columns[row] % _SHEET_COLUMNS] = decode.resize(decode.decode(data, name), side)
        columns[row] += 1
    return classes, picture.swapaxes(1, 2).reshape(-1, _SHEET_COLUMNS * side, 3)


def _draw_sheet(target: Path, classes: list[str], picture: decode.Pixels) -> None:
    with drawn_to(target, _SHEET_COLUMNS, 0.8 * len(classes) + 0.4) as figure:
        axes = figure.add_subplot()
        axes.imshow(picture)
        axes.set_xticks([])
        axes.set_yticks((np.arange(len(classes)) + 0.5) * _SHEET_SIDE, labels=[*map(shown, classes)])
