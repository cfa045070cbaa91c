"""Preprocessing against numpy in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import InterpolationMode

from kdcli.base.errors import KdError, UsageError
from kdcli.data import preprocess
from kdcli.data.preprocess import PREPROCESSES, Photo


def images(count: int = 60, size: int = 5) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def prepared(fitted: preprocess.Preprocess, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    return fitted(torch.from_numpy(raw).permute(0, 3, 1, 2).float()).double().numpy()


def test_mean_std() -> None:
    raw = images()
    x = raw.astype(np.float64)
    expected = (x - x.mean(axis=(0, 1, 2))) / x.std(axis=(0, 1, 2))
    np.testing.assert_allclose(
        prepared(preprocess.fit("mean-std", raw), raw), expected.transpose(0, 3, 1, 2), atol=1e-5
    )


def test_mean_image() -> None:
    raw = images()
    expected = raw - raw.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(
        prepared(preprocess.fit("mean-image", raw), raw), expected.transpose(0, 3, 1, 2), atol=1e-4
    )


def test_gcn_zca_by_its_definition() -> None:
    raw = images(200, 4)
    x = raw.transpose(0, 3, 1, 2).reshape(200, -1).astype(np.float64)
    x -= x.mean(axis=1, keepdims=True)
    x *= 55 / np.sqrt((x**2).sum(axis=1, keepdims=True))
    centred = x - x.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred / 200)
    whiten = vectors @ np.diag(1 / np.sqrt(values + 0.1)) @ vectors.T
    found = prepared(preprocess.fit("gcn-zca", raw), raw).reshape(200, -1)
    np.testing.assert_allclose(found, centred @ whiten, atol=2e-3)


def test_a_constant_image_does_not_divide_by_zero() -> None:
    fitted = preprocess.fit("gcn-zca", images())
    grey = np.full((1, 5, 5, 3), 77, np.uint8)
    assert np.isfinite(prepared(fitted, grey)).all()


@pytest.mark.parametrize(
    ("height", "width", "interpolation"),
    [
        (50, 75, "bilinear"),
        (77, 41, "bicubic"),
        (20, 23, "nearest"),
        (32, 60, "bilinear"),
        (45, 45, "bicubic"),
    ],
)
def test_photo_is_a_preset_of_torchvision(height: int, width: int, interpolation: str) -> None:
    """The shorter side becomes 32; grey images are taken as RGB."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, height, width), np.uint8))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    kind = InterpolationMode(interpolation)
    preset = ImageClassification(crop_size=27, resize_size=32, mean=mean, std=std, interpolation=kind)
    photo = Photo(255 * torch.tensor(mean), 255 * torch.tensor(std), 32, 27, interpolation)
    torch.testing.assert_close(photo(pixels.float()), preset(pixels), rtol=0, atol=1e-5)
    assert photo.output_size((height, width, 1)) == (27, 27, 3)
    grey = pixels[:, :1]
    torch.testing.assert_close(photo(grey.float()), preset(grey.expand(-1, 3, -1, -1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in PREPROCESSES if name not in ("scale-shift", "photo")])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_round_trip_and_channel_order(name: str, order: str) -> None:
    raw = images()
    fitted = preprocess.fit(name, raw, channel_order=order)
    again = preprocess.from_spec(fitted.spec())
    np.testing.assert_array_equal(prepared(again, raw), prepared(fitted, raw))
    rgb = prepared(preprocess.fit(name, raw), raw)
    np.testing.assert_array_equal(prepared(fitted, raw), rgb[:, ::-1] if order == "bgr" else rgb)


@pytest.mark.parametrize("name", ["mean-std", "mean-image", "gcn-zca"])
def test_only_the_chosen_images_count(name: str) -> None:
    raw = images(9000, 2)
    chosen = np.arange(1, 9000, 2)  # more than one chunk
    some = preprocess.fit(name, raw, chosen)
    alone = preprocess.fit(name, raw[chosen].copy())
    for key, value in some.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[key])


def test_errors() -> None:
    with pytest.raises(UsageError, match="unknown preprocessing: magic"):
        preprocess.fit("magic", images())
    with pytest.raises(UsageError, match="channel order"):
        preprocess.fit("none", images(), channel_order="grb")
    with pytest.raises(KdError, match="whitening needs"):
        preprocess.fit("gcn-zca", images(2, 64))
    with pytest.raises(KdError, match="cannot be rebuilt"):
        preprocess.from_spec({"name": "mean-std", "args": {}, "state": {"mean": torch.zeros(3)}})


def test_moments_are_exact_for_any_number_of_images() -> None:
    """Brightest images, and counts around the pieces in which they are added up."""
    for count in (1, 255, 256, 257, 700, 4500):
        images = np.full((count, 3, 2, 3), 255, np.uint8)
        images[: count // 3] = 254
        mean, std = preprocess._moments(images, np.arange(count))
        flat = images.reshape(-1, 3).astype(np.int64)
        np.testing.assert_array_equal(mean, flat.sum(axis=0) / len(flat))
        np.testing.assert_array_equal(std, np.sqrt((flat**2).sum(axis=0) / len(flat) - mean**2))
