"""Views: augmented copies of training images, random by a counter (seed, view, sample) without any state.

Batch order, processes, workers and global generators have no influence. Hence a teacher's output for a view can
be cached, a run can resume exactly, and one process or four train on the same images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcli.base.config import augment_steps

UInt32 = npt.NDArray[np.uint32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

# Counters of different purposes differ, so that their random numbers are independent.
FLIP, CROP, ORDER, NOISE, _, CUTOUT, MIX, DROPOUT, CONTRAST, RESIZED_CROP, JITTER, RANDAUGMENT = range(12)
SPLIT_EPOCH = 4  # the epoch of `order` with seed 0 that divides images; another one would move all splits
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
    return np.sqrt(-2 * np.log(uniform(first))) * np.cos(2 * np.pi * uniform(second))


def below(random: UInt32, limit: int) -> Int64:
    """Random bits → whole numbers in 0 … limit − 1, limit up to 2³²; the bias is below limit · 2⁻³²."""
    return ((random.astype(np.uint64) * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)


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


def _boxes(random: UInt32, half: Int64, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Masks (B, H, W, 1) of boxes with a uniform centre, from bits (2, B) and half of their sides (2, B)."""

    def covered(bits: UInt32, half: Int64, length: int) -> npt.NDArray[np.bool_]:  # (B, length)
        centre, place = below(bits, length), np.arange(length)
        return (place >= (centre - half)[:, None]) & (place < (centre + half)[:, None])

    rows, columns = covered(random[0], half[0], height), covered(random[1], half[1], width)
    return (rows[:, :, None] & columns[:, None, :])[..., None]


def _cutout(images: Tensor, seed: int, view: int, samples: Int64) -> Tensor:
    """Cover a square of half the shorter side by grey, its centre anywhere (DeVries & Taylor, arXiv:1708.04552)."""
    _, height, width, _ = images.shape
    half = np.full((2, len(samples)), max(1, min(height, width) // 4))
    hole = _boxes(random_bits(seed, CUTOUT, view, samples), half, height, width)
    return images.masked_fill(torch.from_numpy(hole).to(images.device), GREY)


def _each(images: Tensor, change: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Each image changed by itself, as (C, H, W); `change` takes it and its place in the batch."""
    changed = torch.empty_like(images)
    for index, image in enumerate(images.permute(0, 3, 1, 2)):
        changed[index] = change(image, index).permute(1, 2, 0)
    return changed


def _resized_crop(images: Tensor, seed: int, view: int, samples: Int64) -> Tensor:
    """8 … 100 % of the area in a shape of 3:4 … 4:3, resized to the whole (torchvision's RandomResizedCrop)."""
    from torchvision.transforms.v2 import functional as F

    _, height, width, _ = images.shape
    tries = np.stack([uniform(random_bits(seed, RESIZED_CROP, view, samples, block)) for block in range(10)])

    def crop(image: Tensor, index: int) -> Tensor:
        # the first box of ten that fits, else the largest in the middle
        for size, shape, y, x in tries[:, :, index].tolist():
            area, ratio = height * width * (0.08 + 0.92 * size), (4 / 3) ** (2 * shape - 1)
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
                break
        else:
            h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
            top, left = (height - h) // 2, (width - w) // 2
        return F.resized_crop(image, top, left, h, w, [height, width], antialias=True)

    return _each(images, crop)


def _jitter(images: Tensor, seed: int, view: int, samples: Int64) -> Tensor:
    """Brightness, contrast and saturation by up to 40 %, hue by up to 10 % of its circle, in random order."""
    from torchvision.transforms.v2 import functional as F

    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    middle, reach = np.array([[1, 1, 1, 0], [0.4, 0.4, 0.4, 0.1]])[:, :, None]
    factors = middle + reach * (2 * uniform(random_bits(seed, JITTER, view, samples)) - 1)  # (4, B)
    orders = random_bits(seed, JITTER, view, samples, block=1).argsort(axis=0, kind="stable")

    def change(image: Tensor, index: int) -> Tensor:
        for which in orders[:, index]:
            image = changes[which](image, factors[which, index])
        return image

    return _each(images, change)


def _randaugment_operations(height: int, width: int) -> tuple[Callable[[Tensor, float], Tensor], ...]:
    """Operations of torchvision's RandAugment on an image (C, H, W); their strength is −1 … 1."""
    from torchvision.transforms.v2 import functional as F

    def shear(share: float) -> float:
        return math.degrees(math.atan(0.3 * share))

    return (
        lambda image, strength: image,
        lambda image, strength: F.affine(image, 0.0, [0, 0], 1.0, [shear(strength), 0.0], center=[0.0, 0.0]),
        lambda image, strength: F.affine(image, 0.0, [0, 0], 1.0, [0.0, shear(strength)], center=[0.0, 0.0]),
        lambda image, strength: F.affine(image, 0.0, [int(150 / 331 * width * strength), 0], 1.0, [0.0, 0.0]),
        lambda image, strength: F.affine(
            image, 0.0, [0, int(150 / 331 * height * strength)], 1.0, [0.0, 0.0]
        ),
        lambda image, strength: F.rotate(image, 30 * strength),
        lambda image, strength: F.adjust_brightness(image, 1 + 0.9 * strength),
        lambda image, strength: F.adjust_saturation(image, 1 + 0.9 * strength),
        lambda image, strength: F.adjust_contrast(image, 1 + 0.9 * strength),
        lambda image, strength: F.adjust_sharpness(image, 1 + 0.9 * strength),
        lambda image, strength: F.posterize(image, round(8 - 4 * abs(strength))),
        lambda image, strength: F.solarize(image, 255 * (1 - abs(strength))),
        lambda image, strength: F.autocontrast(image),
        lambda image, strength: F.equalize(image),
    )


def _randaugment(images: Tensor, seed: int, view: int, samples: Int64) -> Tensor:
    """Two random operations of magnitude 9 of 30, torchvision's default (Cubuk et al., arXiv:1909.13719)."""
    operations = _randaugment_operations(*images.shape[1:3])
    random = random_bits(seed, RANDAUGMENT, view, samples)
    chosen, signs = below(random[:2], len(operations)), np.where(random[2:] & 1, 1.0, -1.0)  # (2, B) each

    def change(image: Tensor, index: int) -> Tensor:
        for which, sign in zip(chosen[:, index], signs[:, index], strict=True):
            image = operations[which](image, 9 / 30 * sign)
        return image

    return _each(images, change)


STEPS = {  # in the order they are applied
    "crop": _crop,
    "resized-crop": _resized_crop,
    "flip": _flip,
    "randaugment": _randaugment,
    "jitter": _jitter,
    "cutout": _cutout,
}


def apply(name: str, images: Tensor, seed: int, view: int, samples: Int64) -> Tensor:
    """Augment each image of a batch, uint8 (B, H, W, C) on any device, as view `view` does, without mixing.

    Args:
        name: steps joined by hyphens, such as `flip-crop`, or `none` (see `config.AUGMENT_STEPS`).
        samples: (B,), each image's index in the data set.
    """
    steps = augment_steps(name)
    for step, function in STEPS.items():
        if step in steps:
            images = function(images, seed, view, samples)
    return images


def distinct_views(name: str) -> int:
    """Number of different views; 0 if there is no limit."""
    return {"none": 1, "flip": 2}.get(name, 0)


@dataclass(frozen=True)
class Mixing:
    """Two images in one: in each pixel weight · image + (1 − weight) · partner."""

    partners: Int64  # (B,), indices of the samples mixed in
    weights: npt.NDArray[np.float32]  # of the samples themselves: (B, 1, 1, 1), or (B, H, W, 1) of each pixel

    @property
    def shares(self) -> npt.NDArray[np.float32]:
        """float32 (B,): the weight of each sample's own label."""
        return self.weights.mean(axis=(1, 2, 3))


def mixes(name: str) -> bool:
    """Whether an augmentation mixes two images."""
    return not {"mixup", "cutmix"}.isdisjoint(augment_steps(name))


def is_of_torchvision(name: str) -> bool:
    """Whether functions of torchvision make the views: their values may change with its version."""
    return not {"resized-crop", "randaugment", "jitter"}.isdisjoint(augment_steps(name))


def mixing(
    name: str, seed: int, view: int, samples: Int64, pool: Int64, size: tuple[int, int]
) -> Mixing | None:
    """Partners, from the training samples `pool`, and weights of a view of (H, W) pixels; None without mixing.

    mixup: one share, uniform in (0, 1) (Zhang et al., arXiv:1710.09412, α = 1). cutmix: that share is the area
    around a box of the partner, before the box is cut off at the edges (Yun et al., arXiv:1905.04899, α = 1).
    """
    if not mixes(name):
        return None
    random = random_bits(seed, MIX, view, samples)
    partners, share = pool[below(random[0], len(pool))], uniform(random[1])
    if "cutmix" not in augment_steps(name):
        return Mixing(partners, share.astype(np.float32)[:, None, None, None])
    half = (0.5 * np.sqrt(1 - share) * np.array(size)[:, None]).astype(np.int64)
    return Mixing(partners, (~_boxes(random[2:], half, *size)).astype(np.float32))


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
    mixed = mixing(name, seed, view, samples, pool, (images.shape[1], images.shape[2]))
    if mixed is None:
        return images
    others = apply(name, take(mixed.partners), seed, view, mixed.partners)
    weights = torch.from_numpy(mixed.weights).to(images.device)
    return torch.lerp(others.float(), images.float(), weights).round_().to(torch.uint8)
