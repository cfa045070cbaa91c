"""Unlabelled images: a folder or archive of image files at any depth, whatever its folders are called."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from kdcli.base.errors import KdError, UsageError
from kdcli.data import decode
from kdcli.data.datasets import Request
from kdcli.data.images import NO_LABEL, Splits, pixel_hashes
from kdcli.data.pack import Cache, Packed, Selection
from kdcli.data.read_images import Place, decode_all, is_ignored, skipped_notes
from kdcli.data.sources import Source, open_source

_PART = "unlabelled"


def add_unlabelled(splits: Splits, path: Path, request: Request) -> Splits:
    """A data set with further images to train on; decoded once, then read from the cache.

    They get the size and channels of the data's images. Those that then equal, pixel by pixel, one of the data's
    own are left out: test images, because they would be trained on; training images, because they already are, or
    are kept for validation. Names and folders count for nothing.
    """
    if not path.exists():
        raise UsageError(
            f"no unlabelled images at {path}", "--unlabelled takes a folder or archive of images."
        )
    source = open_source(path)
    key = {
        "unlabelled": source.key(),
        "data": [splits.train.input_size, splits.train.fingerprint, splits.test.fingerprint],
        "resize": request.resize,
        "skip_broken": request.skip_broken,
    }
    cache = Cache(request.cache_dir, key, request.on_event)
    packed = cache.load() or _pack(source, splits, cache, request)
    return replace(splits, unlabelled=packed.parts[_PART], notes=(*splits.notes, *packed.notes))


def _pack(source: Source, splits: Splits, cache: Cache, request: Request) -> Packed:
    size, where = splits.train.input_size, source.path.name or str(source.path)
    with cache.packer(None, size[2]) as packer:

        def keep(index: int, name: str, pixels: decode.Pixels) -> None:
            packer.put(index, decode.fit_to(pixels, name, size, "the data's images are", request.resize))

        def place_of(name: str) -> Place | None:
            return None if is_ignored(name) else Place("", "", "", name)

        # 1. Decode.
        found = decode_all(source, keep, request.on_event, request.skip_broken, place_of)
        indices = [index for _, index in sorted((place.name, index) for place, index in found.images.items())]
        if not indices:
            more = f": all are broken, as {next(iter(found.broken)).name}" if found.broken else ""
            raise KdError(f"no images in {source.path}{more}", decode.FORMATS_READ)
        # 2. Leave out the data's own images.
        split_of = dict.fromkeys(pixel_hashes(splits.train.images), "training")
        split_of |= dict.fromkeys(pixel_hashes(splits.test.images), "test")
        digests = list(pixel_hashes(packer.images()))
        kept = [index for index in indices if digests[index] not in split_of]
        left_out = Counter(split_of[digests[index]] for index in indices if digests[index] in split_of)
        if not kept:
            raise KdError(
                f"all {len(indices):,} images in {source.path} are among those of {splits.spec}",
                "--unlabelled takes images that are not part of --data.",
            )
        # 3. Store.
        notes = [f"{len(kept):,} unlabelled images from {where}."]
        for split, count in sorted(left_out.items()):
            notes.append(f"Left out {count:,} images in {where} that are among the {split} images.")
        notes += [f"{where}: {note}" for note in skipped_notes(found, source)]
        name_of = {index: place.name for place, index in found.images.items()}
        labels, names = np.full(len(kept), NO_LABEL, np.int64), [name_of[index] for index in kept]
        selection = Selection(np.array(kept, dtype=np.int64), labels, names)
        return cache.store(packer, {_PART: selection}, classes=(), label=where, notes=notes)
