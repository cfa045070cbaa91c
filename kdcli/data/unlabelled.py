"""Images without labels: a folder or archive of image files at any depth, whatever its folders are called."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import OnEvent, Progress
from kdcli.data import decode, rows
from kdcli.data.images import NO_LABEL, ImageSet, Splits
from kdcli.data.pack import FORMAT_VERSION, Cache, Selection
from kdcli.data.sources import Source, open_source
from kdcli.data.tree import Place, decode_all, is_aside, left_out

_PART = "unlabelled"
_CHUNK = 1024  # images looked at together


def add_unlabelled(
    splits: Splits, path: Path, *, cache_dir: Path, skip_broken: bool, on_event: OnEvent
) -> Splits:
    """A data set with further images to train on; decoded once, then read from the cache.

    They get size and channels of the data's images. Those that are then, pixel by pixel, one of the data's own are
    left out: of the test images because they would be trained on, and of the train images because they are, or are
    kept for validation. Names and folders count for nothing.

    Raises:
        UsageError: no such folder or file.
        KdError: not an archive, a broken image without `skip_broken`, an image that cannot get that size, or none.
    """
    if not path.exists():
        raise UsageError(
            f"no images without labels at {path}", "--unlabelled takes a folder or an archive of images."
        )
    try:
        source = open_source(path)
    except KdError as error:
        raise KdError(error.message, "--unlabelled takes a folder or an archive of images.") from error
    own = f"{splits.train.input_size} {splits.train.fingerprint} {splits.test.fingerprint}"
    content = source.key()

    def cache_for(skipping: bool) -> Cache:
        words = f"unlabelled {FORMAT_VERSION} {content} {own}"
        words += " without broken images" if skipping else ""
        return Cache(cache_dir, hashlib.sha256(words.encode()).hexdigest()[:32])

    for skipping in (False, True)[: 1 + skip_broken]:
        known = cache_for(skipping).parts((_PART,))
        if known is not None:
            break
    else:
        cache = _pack(source, splits, cache_for, skip_broken, on_event)
        known = cache.parts((_PART,))
        if known is None:
            raise cache.unreadable()
    [images], _, notes = known
    return replace(splits, unlabelled=images, notes=(*splits.notes, *notes))


def _pack(
    source: Source, splits: Splits, cache_for: Callable[[bool], Cache], skip_broken: bool, on_event: OnEvent
) -> Cache:
    size = splits.train.input_size
    with cache_for(skip_broken).packing(None, size[2]) as (workspace, spool):

        def keep(index: int, name: str, pixels: decode.Pixels) -> None:
            spool.put(index, decode.fit_to(pixels, name, size, "the data's images are"))

        found = decode_all(source, keep, on_event, skip_broken, _place)
        numbers = [index for _, index in sorted((place.rest, index) for place, index in found.images.items())]
        if not numbers:
            more = f": all are broken, as {found.broken[0]}" if found.broken else ""
            raise KdError(f"no images in {source.path}{more}", "PNG, JPEG, WebP and BMP files are read.")
        pixels = spool.view()
        among_test, among_train = _hashes(splits.test), _hashes(splits.train)
        kept, of_test, of_train = [], 0, 0
        for start in range(0, len(numbers), _CHUNK):
            on_event(Progress("comparing with test images", start, len(numbers)))
            chosen = np.array(numbers[start : start + _CHUNK], dtype=np.int64)
            for number, image in zip(chosen.tolist(), rows.take(pixels, chosen), strict=True):
                digest = _hash(image)
                if digest in among_test:
                    of_test += 1
                elif digest in among_train:
                    of_train += 1
                else:
                    kept.append(number)
        where = source.path.name or str(source.path)
        if not kept:
            raise KdError(
                f"all {len(numbers):,} images in {source.path} are among those of {splits.spec}",
                "--unlabelled takes images that are not part of --data.",
            )
        notes = [f"{len(kept):,} images without labels from {where}."]
        for count, split in ((of_test, "test"), (of_train, "train")):
            if count:
                notes.append(f"Left out {count:,} images in {where} that are among the {split} images.")
        notes += [f"{where}: {note}" for note in left_out(found, source)]
        cache = cache_for(bool(found.broken))
        selection = Selection(np.array(kept, dtype=np.int64), np.full(len(kept), NO_LABEL, np.int64))
        cache.store(workspace, pixels, [selection], classes=(), label=where, notes=notes, names=(_PART,))
    return cache


def _place(name: str) -> Place | None:
    return None if is_aside(name) else Place("", "", "", name)


def _hash(image: decode.Pixels) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def _hashes(data: ImageSet) -> set[bytes]:
    """Of each image's pixels."""

    def chunks() -> Iterator[decode.Pixels]:
        for start in range(0, len(data), _CHUNK):
            yield from rows.take(data.images, slice(start, start + _CHUNK))

    return {_hash(image) for image in chunks()}
