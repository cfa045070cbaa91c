"""Views: augmented copies of training images, random by a counter (seed, view, sample) without any state.

Batch order, processes, workers and global generators have no influence. Hence a teacher's output for a view can
be cached, a run can resume exactly, and one process or four train on the same images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

UInt32 = npt.NDArray[np.uint32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

# Counters of different purposes differ, so that their random numbers are independent.
FLIP, CROP, ORDER, NOISE, SPLIT, CUTOUT, MIXUP, DROPOUT, CONTRAST = range(9)
CROP_PADDING = 4
GREY = 128  # fill value of cutout


def philox(counter: npt.NDArray[np.uint64], key: tuple[int, int]) -> UInt32:
    """Philox4x32-10 (Salmon et al., SC 2011): a block cipher as random generator.

    From counters (4, N) and a key of two words, each below 2³², to uint32 (4, N): uniform and independent.
    """
    c0, c1, c2, c3 = (part.astype(np.uint64) for part in counter)
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    for _ in range(10):
        left, right = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (right >> shift) ^ c1 ^ np.uint64(k0),
            right & low,
            (left >> shift) ^ c3 ^ np.uint64(k1),
            left & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def random_bits(seed: int, purpose: int, view: int, samples: Int64, block: int | Int64 = 0) -> UInt32:
    """uint32 (4, N): four random 32-bit words per sample in one view, for one purpose.

    `block` is the index of further random bits of the same sample; one number, or one for each sample.
    """
    numbers = samples.astype(np.uint64)
    counter = np.stack(
        [
            numbers & np.uint64(0xFFFFFFFF),
            (numbers >> np.uint64(32)) | np.uint64(purpose << 16),
            np.full_like(numbers, view & 0xFFFFFFFF),
            np.broadcast_to(np.asarray(block, np.uint64), numbers.shape),
        ]
    )
    return philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))


def uniform(random: UInt32) -> Float64:
    """Random bits → numbers in (0, 1), never 0 or 1."""
    return (random.astype(np.float64) + 0.5) / 2.0**32


def normal(first: UInt32, second: UInt32) -> Float64:
    """Standard normal numbers from 32 random bits each (Box and Muller 1958)."""
    result: Float64 = np.sqrt(-2 * np.log(uniform(first))) * np.cos(2 * np.pi * uniform(second))
    return result


def below(random: UInt32, limit: int) -> Int64:
    """Random bits → whole numbers in 0 … limit − 1, limit up to 2³²; the bias is below limit · 2⁻³²."""
    numbers: Int64 = ((random.astype(np.uint64) * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)
    return numbers


def order(seed: int, epoch: int, samples: Int64) -> Int64:
    """The samples in the epoch's random order."""
    random = random_bits(seed, ORDER, epoch, samples).astype(np.uint64)
    keys = (random[0] << np.uint64(32)) | random[1]
    return samples[np.argsort(keys, kind="stable")]


def _flip(images: Tensor, seed: int, view: int, samples: Int64) -> Tensor:
    """Mirror left and right by a random bit per sample, inverted from view to view.

    Two consecutive views hold both variants of every image once, so two cached views cover all variants.
    (Alternating flip: Jordan, "94% on CIFAR-10 in 3.29 Seconds", arXiv:2404.00498.)
    """
    coin = random_bits(seed, FLIP, 0, samples)[0] & 1
    mirrored = torch.from_numpy(np.flatnonzero(coin != view & 1)).to(images.device)
    turned = images.clone()
    turned[mirrored] = images[mirrored].flip(2)
    return turned


def _crop(images: Tensor, seed: int, view: int, samples: Int64) -> Tensor:
    """A crop of the original size from the image padded with 4 black pixels on each side."""
    _, height, width, _ = images.shape
    padded = torch.nn.functional.pad(images, (0, 0, CROP_PADDING, CROP_PADDING, CROP_PADDING, CROP_PADDING))
    top, left = below(random_bits(seed, CROP, view, samples)[:2], 2 * CROP_PADDING + 1)  # (B,) each, 0 … 8
    y = torch.from_numpy(top[:, None] + np.arange(height)).to(images.device)
    x = torch.from_numpy(left[:, None] + np.arange(width)).to(images.device)
    batch = torch.arange(len(images), device=images.device)
    return padded[batch[:, None, None], y[:, :, None], x[:, None, :]]


def _cutout(images: Tensor, seed: int, view: int, samples: Int64) -> Tensor:
    """Cover a square of half the shorter side by grey, its centre anywhere (DeVries & Taylor, arXiv:1708.04552)."""
    _, height, width, _ = images.shape
    half = max(1, min(height, width) // 4)
    random = random_bits(seed, CUTOUT, view, samples)

    def covered(bits: UInt32, length: int) -> Tensor:  # (B, length)
        centre = below(bits, length)[:, None]
        place = np.arange(length)
        return torch.from_numpy((place >= centre - half) & (place < centre + half)).to(images.device)

    hole = covered(random[0], height)[:, :, None, None] & covered(random[1], width)[:, None, :, None]
    return images.masked_fill(hole, GREY)


MIXUP_NAME = "mixup"
STEPS = {"crop": _crop, "flip": _flip, "cutout": _cutout}  # in the order they are applied


def apply(name: str, images: Tensor, seed: int, view: int, samples: Int64) -> Tensor:
    """Augment each image of a batch, uint8 (B, H, W, C) on any device, as view `view` does, without mixing.

    Args:
        name: steps joined by hyphens, such as `flip-crop`, or `none` (see `config.AUGMENT_STEPS`).
        samples: (B,), each image's index in the data set.
    """
    for step, function in STEPS.items():
        if step in name.split("-"):
            images = function(images, seed, view, samples)
    return images


def distinct_views(name: str) -> int:
    """Number of different views; 0 if there is no limit."""
    return {"none": 1, "flip": 2}.get(name, 0)


@dataclass(frozen=True)
class Mixing:
    """Mixup of a batch: share · image + (1 − share) · partner (Zhang et al., arXiv:1710.09412, α = 1)."""

    partners: Int64  # (B,), indices of the samples mixed in
    shares: npt.NDArray[np.float32]  # float32 (B,), in (0, 1): the weight of each sample itself


def mixing(name: str, seed: int, view: int, samples: Int64, pool: Int64) -> Mixing | None:
    """Partners, from the training samples `pool`, and shares of a view; None for an augmentation without mixup."""
    if MIXUP_NAME not in name.split("-"):
        return None
    random = random_bits(seed, MIXUP, view, samples)
    return Mixing(pool[below(random[0], len(pool))], uniform(random[1]).astype(np.float32))


def make_view(
    name: str, take: Callable[[Int64], Tensor], seed: int, view: int, samples: Int64, pool: Int64
) -> Tensor:
    """View `view` of the given samples, uint8 (B, H, W, C): the input of teacher and student.

    Mixed images are rounded, so that teacher and student get the same pixels.

    Args:
        take: from sample indices (B,) to raw images uint8 (B, H, W, C).
        pool: indices of the samples that may be mixed in: the training samples.
    """
    images = apply(name, take(samples), seed, view, samples)
    mixed = mixing(name, seed, view, samples, pool)
    if mixed is None:
        return images
    others = apply(name, take(mixed.partners), seed, view, mixed.partners)
    share = torch.from_numpy(mixed.shares).to(images.device)[:, None, None, None]
    return torch.lerp(others.float(), images.float(), share).round_().to(torch.uint8)
