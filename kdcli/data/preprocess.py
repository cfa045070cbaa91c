"""Preprocessing of raw pixels: part of each model, and the only place where pixels are scaled.

Every preprocessing is a module from raw RGB pixels `(B, C, H, W)`, float32 in 0–255, to the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import Note, OnEvent, ignore
from kdcli.base.names import nearest
from kdcli.data import rows

Int64 = npt.NDArray[np.int64]
_CHUNK = 4096
# Squared pixels of so many images add up to less than 2²⁴: float32 holds the sum exactly, and is fast.
_EXACT = 256
_MOST_SIDE = 4096
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "nearest-exact")


def _chunks(images: rows.Images, samples: Int64) -> Iterator[npt.NDArray[np.uint8]]:
    """The chosen images, a part at a time: all may be larger than memory."""
    for start in range(0, len(samples), _CHUNK):
        yield rows.take(images, samples[start : start + _CHUNK])


def _moments(images: rows.Images, samples: Int64) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation per channel, exact in integers: (C,), (C,)."""
    _, height, width, channels = images.shape
    total = torch.zeros(channels, dtype=torch.int64)
    squares = torch.zeros(channels, dtype=torch.int64)
    for chunk in _chunks(images, samples):
        for start in range(0, len(chunk), _EXACT):
            pixels = torch.from_numpy(chunk[start : start + _EXACT]).flatten(1).float()  # (b, H·W·C)
            total += pixels.sum(dim=0).to(torch.int64).reshape(-1, channels).sum(dim=0)
            squares += pixels.square().sum(dim=0).to(torch.int64).reshape(-1, channels).sum(dim=0)
    count = len(samples) * height * width
    mean = total.numpy() / count
    return mean, np.sqrt(squares.numpy() / count - mean**2)


def to_pixels(images: Tensor) -> Tensor:
    """Raw images uint8 (B, H, W, C) → pixels float32 (B, C, H, W), 0–255; a KdError for another type, as of 0–1.

    The permutation of contiguous NHWC is channels-last NCHW, so the cast is the only copy.
    """
    if images.dtype != torch.uint8:
        raise KdError(
            f"images are {images.dtype}, and must be torch.uint8 of (B, H, W, C), 0–255",
            "Floats in 0–1: (255 * images).round().byte()",
        )
    return images.permute(0, 3, 1, 2).float()


class Preprocess(nn.Module):
    """Base: transform in RGB order, then reverse the channels if the network was trained with `bgr`."""

    name: ClassVar[str] = "none"
    resizes: ClassVar[bool] = False  # whether it takes images of any size

    def __init__(self, channel_order: str = "rgb") -> None:
        super().__init__()
        if channel_order not in ("rgb", "bgr"):
            raise UsageError(f"unknown channel order: {channel_order}", "It is rgb or bgr.")
        self.channel_order = channel_order

    def transform(self, pixels: Tensor) -> Tensor:
        """Raw pixels (B, C, H, W) in 0–255 → the network's input before the channels are reordered."""
        return pixels

    def forward(self, pixels: Tensor) -> Tensor:
        """Raw pixels (B, C, H, W) in 0–255 RGB → the network's input."""
        prepared = self.transform(pixels)
        return prepared.flip(1) if self.channel_order == "bgr" else prepared

    def output_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """(H, W, C) of the network's input, from that of the raw images."""
        return size

    @classmethod
    def fit(cls, images: rows.Images, samples: Int64, channel_order: str, on_event: OnEvent) -> Preprocess:
        return cls(channel_order)

    def args(self) -> dict[str, Any]:
        """Plain values that rebuild this object together with its tensors."""
        return {"channel_order": self.channel_order}

    def spec(self) -> dict[str, Any]:
        """`{"name", "args", "state"}`, as a checkpoint stores it."""
        return {"name": self.name, "args": self.args(), "state": dict(self.state_dict())}


class MeanStd(Preprocess):
    """Per channel `(x − mean) / std`, mean and std (C,) in units of 0–255."""

    name = "mean-std"
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, channel_order: str = "rgb") -> None:
        super().__init__(channel_order)
        self.register_buffer("mean", mean.float().reshape(-1))
        self.register_buffer("std", std.float().reshape(-1))

    def transform(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean[:, None, None]).div_(self.std[:, None, None])

    @classmethod
    def described(
        cls, values: tuple[Sequence[float], Sequence[float]], channels: int, order: str
    ) -> Preprocess:
        """From mean and std in units of 0–255, each one value or one a channel, in the network's channel order."""
        state = {}
        for name, given in zip(("mean", "std"), values, strict=True):
            if len(given) not in (1, channels):
                raise UsageError(
                    f"{name}: {len(given)} values for {channels} channels", "Set one, or one a channel."
                )
            each = torch.tensor(given).expand(channels)
            state[name] = each.flip(0) if order == "bgr" else each
        return cls(**state, channel_order=order)

    @classmethod
    def fit(cls, images: rows.Images, samples: Int64, channel_order: str, on_event: OnEvent) -> Preprocess:
        mean, std = _moments(images, samples)
        return cls(torch.from_numpy(mean), torch.from_numpy(np.maximum(std, 1e-3)), channel_order)


class Photo(MeanStd):
    """Resize the shorter side to `side`, crop a square of `crop`, then as `MeanStd`: presets of torchvision and timm.

    A shorter side of `side` is not resized; both 0: images are taken as they are. Resized pixels are rounded to whole
    numbers, as those of 8-bit images.
    """

    name = "photo"
    resizes = True

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        side: int,
        crop: int,
        interpolation: str = "bilinear",
        antialias: bool = True,
        channel_order: str = "rgb",
    ) -> None:
        super().__init__(mean, std, channel_order)
        if not min(side, 1) <= crop <= side <= _MOST_SIDE or interpolation not in INTERPOLATIONS:
            raise ValueError(f"resize to {side}, crop to {crop}, {interpolation}")
        self.side, self.crop, self.interpolation, self.antialias = side, crop, interpolation, antialias

    def transform(self, pixels: Tensor) -> Tensor:
        if self.side == 0:
            return super().transform(pixels)
        shorter = min(pixels.shape[2:])
        if shorter != self.side:
            smooth = self.interpolation in ("bilinear", "bicubic")
            options = {"align_corners": False, "antialias": self.antialias} if smooth else {}
            size = [self.side * edge // shorter for edge in pixels.shape[2:]]
            resized = nn.functional.interpolate(pixels, size, mode=self.interpolation, **options)
            pixels = resized.round().clamp(0, 255)
        top, left = (round((edge - self.crop) / 2) for edge in pixels.shape[2:])
        return super().transform(pixels[:, :, top : top + self.crop, left : left + self.crop])

    def output_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        height, width, channels = size
        return self.crop or height, self.crop or width, max(channels, self.mean.numel())  # grey becomes RGB

    def args(self) -> dict[str, Any]:
        names = ("side", "crop", "interpolation", "antialias")
        return {**{name: getattr(self, name) for name in names}, **super().args()}


class MeanImage(Preprocess):
    """`x − mean image`, the mean (C, H, W) in units of 0–255."""

    name = "mean-image"
    mean: Tensor

    def __init__(self, mean: Tensor, channel_order: str = "rgb") -> None:
        super().__init__(channel_order)
        self.register_buffer("mean", mean.float())

    def transform(self, pixels: Tensor) -> Tensor:
        return pixels - self.mean

    @classmethod
    def fit(cls, images: rows.Images, samples: Int64, channel_order: str, on_event: OnEvent) -> Preprocess:
        total = np.zeros(images.shape[1:], np.int64)
        for chunk in _chunks(images, samples):
            total += chunk.sum(axis=0, dtype=np.int64)
        return cls(torch.from_numpy(total / len(samples)).permute(2, 0, 1), channel_order)  # (C, H, W)


class ScaleShift(MeanImage):
    """`(x − mean) · scale`, Caffe's transform_param; mean (C, 1, 1) or (C, H, W) in units of 0–255, RGB."""

    name = "scale-shift"

    def __init__(self, mean: Tensor, scale: float = 1.0, channel_order: str = "rgb") -> None:
        super().__init__(mean, channel_order)
        self.scale = float(scale)

    def transform(self, pixels: Tensor) -> Tensor:
        return super().transform(pixels) * self.scale

    def args(self) -> dict[str, Any]:
        return {"scale": self.scale, **super().args()}


class GcnZca(Preprocess):
    """Global contrast normalisation and ZCA whitening, as the CIFAR-10 NIN was trained (Goodfellow et al., pylearn2).

    Per image over all its values: subtract the mean, scale to L2 norm `scale`; then `(x − mean) @ whiten`, with
    `whiten = V diag(1/√(λ + filter_bias)) Vᵀ` from the eigenvectors and eigenvalues of the covariance of the
    normalised training images. `mean` is (D,), D = C·H·W in C, H, W order; `whiten` (D, D), symmetric.
    """

    name = "gcn-zca"
    scale = 55.0
    filter_bias = 0.1
    mean: Tensor
    whiten: Tensor

    def __init__(self, mean: Tensor, whiten: Tensor, channel_order: str = "rgb") -> None:
        super().__init__(channel_order)
        self.register_buffer("mean", mean.float())
        self.register_buffer("whiten", whiten.float())

    def transform(self, pixels: Tensor) -> Tensor:
        flat = contrast_normalise(pixels.flatten(1), self.scale)  # (B, D)
        return ((flat - self.mean) @ self.whiten).reshape(pixels.shape)

    @classmethod
    def fit(cls, images: rows.Images, samples: Int64, channel_order: str, on_event: OnEvent) -> Preprocess:
        size = int(np.prod(images.shape[1:]))
        if size > 8192:
            raise KdError(
                f"whitening needs a {size} × {size} matrix for images of {images.shape[1]}×{images.shape[2]}",
                "Use --preprocess mean-std, or smaller images.",
            )
        on_event(Note(f"fitting ZCA whitening on {len(samples):,} images ({size} × {size})"))
        total = torch.zeros(size, dtype=torch.float64)
        products = torch.zeros(size, size, dtype=torch.float64)
        for chunk in _chunks(images, samples):
            pixels = torch.from_numpy(chunk).permute(0, 3, 1, 2)
            flat = contrast_normalise(pixels.flatten(1).double())
            total += flat.sum(dim=0)
            products += flat.T @ flat
        mean = total / len(samples)
        covariance = products / len(samples) - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        whiten = (vectors / torch.sqrt(values.clamp_min(0) + cls.filter_bias)) @ vectors.T
        return cls(mean, whiten, channel_order)


def contrast_normalise(flat: Tensor, scale: float = GcnZca.scale) -> Tensor:
    """Images (B, D): subtract each one's mean, scale it to L2 norm `scale`; a constant image becomes 0."""
    centred = flat - flat.mean(dim=1, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / scale
    return centred / torch.where(norm < 1e-8, torch.ones_like(norm), norm)


PREPROCESSES: dict[str, type[Preprocess]] = {
    kind.name: kind for kind in (MeanStd, MeanImage, GcnZca, ScaleShift, Photo, Preprocess)
}


def _class_of(name: str) -> type[Preprocess]:
    if name not in PREPROCESSES:
        raise UsageError(f"unknown preprocessing: {name}", nearest(name, PREPROCESSES))
    return PREPROCESSES[name]


def fit(
    name: str,
    images: rows.Images,
    samples: Int64 | None = None,
    *,
    channel_order: str = "rgb",
    on_event: OnEvent = ignore,
) -> Preprocess:
    """Measure a preprocessing's constants on training images uint8 (N, H, W, C), all or those of `samples`."""
    samples = np.arange(len(images)) if samples is None else samples
    return _class_of(name).fit(images, samples, channel_order, on_event)


def from_spec(spec: dict[str, Any]) -> Preprocess:
    """Rebuild from `Preprocess.spec()`; values that do not fit raise KdError."""
    kind = _class_of(str(spec["name"]))
    try:
        return kind(**{**spec["state"], **spec["args"]})
    except (TypeError, ValueError, RuntimeError) as error:
        raise KdError(f"preprocessing {spec['name']} cannot be rebuilt: {error}") from error
