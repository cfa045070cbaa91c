"""Views: the generator against published vectors, the pictures against plain numpy, one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from kdcli.data import augment

# Random123's kat_vectors for philox4x32, 10 rounds (Salmon et al.)
KNOWN = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        (0xFFFFFFFF, 0xFFFFFFFF),
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    out = augment.philox(np.array(counter, np.uint64)[:, None], key)
    assert out[:, 0].tolist() == expected


def images(count: int = 12, size: int = 9) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, size, size + 1, 3)).astype(np.uint8)
    )


PHOTOGRAPHS = "flip-resized-crop-randaugment-jitter"


@pytest.mark.parametrize(
    "name", ["none", "flip", "flip-crop", "flip-crop-cutout", "crop", "cutout", PHOTOGRAPHS]
)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), view=st.integers(0, 1000), shuffle=st.integers(0, 10**6))
def test_a_view_depends_on_seed_view_and_sample_alone(name: str, seed: int, view: int, shuffle: int) -> None:
    pictures, samples = images(), np.arange(100, 112)
    whole = augment.apply(name, pictures, seed, view, samples)
    order = np.random.default_rng(shuffle).permutation(12)[:5]
    torch.random.manual_seed(shuffle)
    part = augment.apply(name, pictures[torch.from_numpy(order)], seed, view, samples[order])
    assert torch.equal(part, whole[torch.from_numpy(order)])
    assert whole.dtype == torch.uint8
    assert whole.shape == pictures.shape


def test_two_flip_views_hold_both_variants_of_every_image() -> None:
    pictures, samples = images(), np.arange(12)
    first, second = (augment.apply("flip", pictures, 5, view, samples) for view in (0, 1))
    mirrored = pictures.flip(2)
    for index in range(12):
        pair = {tuple(v[index].flatten().tolist()) for v in (first, second)}
        assert pair == {tuple(v[index].flatten().tolist()) for v in (pictures, mirrored)}
    assert torch.equal(augment.apply("flip", pictures, 5, 2, samples), first)
    halves = torch.tensor([0, 1], dtype=torch.uint8).expand(10_000, 1, 2)[..., None]
    share = augment.apply("flip", halves, 0, 0, np.arange(10_000))[:, 0, 0, 0].double().mean()
    assert share == pytest.approx(0.5, abs=0.02)


def test_flip_crop_is_a_shifted_window_of_the_padded_and_maybe_mirrored_image() -> None:
    pictures, samples = images(), np.arange(12)
    seen = set()
    for view in range(30):
        out = augment.apply("flip-crop", pictures, 3, view, samples).numpy()
        for index in range(12):
            padded = np.pad(pictures[index].numpy(), ((4, 4), (4, 4), (0, 0)))
            found = [
                (dy, dx, mirror)
                for dy in range(9)
                for dx in range(9)
                for mirror in (False, True)
                if np.array_equal(
                    out[index],
                    padded[dy : dy + 9, dx : dx + 10][:, :: -1 if mirror else 1],
                )
            ]
            assert found
            seen.update(found)
    assert {dy for dy, _, _ in seen} == set(range(9))
    assert {dx for _, dx, _ in seen} == set(range(9))


def test_order_is_a_permutation_that_changes_with_epoch_and_seed() -> None:
    samples = np.arange(1000) * 3
    first = augment.order(0, 0, samples)
    assert sorted(first.tolist()) == samples.tolist()
    assert not np.array_equal(first, augment.order(0, 1, samples))
    assert not np.array_equal(first, augment.order(1, 0, samples))
    assert np.array_equal(first, augment.order(0, 0, samples))


def test_normal_numbers_have_normal_moments() -> None:
    random = augment.random_bits(1, augment.NOISE, 0, np.arange(200_000))
    x = augment.normal(random[0], random[1])
    assert abs(x.mean()) < 0.01
    assert x.std() == pytest.approx(1, abs=0.01)
    assert (x**4).mean() == pytest.approx(3, abs=0.1)


def test_cutout_greys_one_square_that_may_hang_over_the_edge() -> None:
    pictures, samples = torch.zeros(300, 12, 16, 3, dtype=torch.uint8), np.arange(300)
    out = augment.apply("cutout", pictures, 7, 2, samples).numpy()
    centres = set()
    for picture in out:
        rows, columns = np.nonzero((picture == augment.GREY).all(axis=2))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width  # a full rectangle, 6 × 6 unless it is cut off by an edge
        assert height == 6 or rows.min() == 0 or rows.max() == 11
        assert width == 6 or columns.min() == 0 or columns.max() == 15
        assert 3 <= height <= 6
        assert 3 <= width <= 6
        centres.add((rows.min(), columns.min()))
    assert len(centres) > 60
    assert set(np.unique(out)) == {0, augment.GREY}


def test_mixup_is_the_weighted_mean_of_two_views() -> None:
    data, samples, pool = images(40), np.arange(25, 35), np.arange(0, 40, 3)

    def take(numbers: np.ndarray) -> torch.Tensor:  # type: ignore[type-arg]
        return data[torch.from_numpy(numbers)]

    found = augment.make_view("flip-crop-mixup", take, 9, 4, samples, pool).numpy()
    mixed = augment.mixing("flip-crop-mixup", 9, 4, samples, pool, (9, 10))
    assert mixed is not None
    for index, sample in enumerate(samples):
        own, other = (
            augment.apply("flip-crop", take(np.array([n])), 9, 4, np.array([n])).numpy()[0].astype(np.float64)
            for n in (sample, mixed.partners[index])
        )
        exact = mixed.shares[index] * own + (1 - mixed.shares[index]) * other
        assert np.abs(found[index] - exact).max() <= 0.5 + 1e-3
    shares = augment.mixing("mixup", 1, 0, np.arange(20_000), pool, (9, 10))
    assert shares is not None
    assert shares.shares.mean() == pytest.approx(0.5, abs=0.01)  # Beta(1, 1): uniform
    assert shares.shares.std() == pytest.approx(12**-0.5, abs=0.01)
    assert augment.mixing("flip-crop", 1, 0, samples, pool, (9, 10)) is None


def test_each_step_draws_its_own_numbers() -> None:
    samples = np.arange(5000)
    drawn = [augment.uniform(augment.random_bits(1, purpose, 0, samples)[0]) for purpose in range(12)]
    for first in range(12):
        for second in range(first):
            assert abs(np.corrcoef(drawn[first], drawn[second])[0, 1]) < 0.07


def test_resized_crop_has_the_shapes_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, boxes, real = images(300, size=40), [], F.resized_crop

    def recorded(image: torch.Tensor, *box: int, **options: bool) -> torch.Tensor:
        boxes.append(box)
        return real(image, *box, **options)

    monkeypatch.setattr(F, "resized_crop", recorded)
    out = augment.apply("resized-crop", pictures, 3, 1, np.arange(300))
    for index, (top, left, h, w, *_) in enumerate(boxes[:20]):
        part = pictures[index, top : top + h, left : left + w].permute(2, 0, 1)
        exact = F.resize(part, [40, 41], antialias=True).permute(1, 2, 0)
        assert (out[index].int() - exact.int()).abs().max() <= 1
    top, left, h, w = np.array([box[:4] for box in boxes]).T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 40).all() and (left + w <= 41).all()
    assert (w / h).min() > 0.7 and (w / h).max() < 1.43  # 3:4 … 4:3, in whole pixels
    area = h * w / (40 * 41)
    assert area.min() < 0.1 and area.max() > 0.85 and 0.45 < area.mean() < 0.58
    narrow = augment.apply("resized-crop", pictures[:20, :, :4], 3, 1, np.arange(20))
    assert narrow.shape == (20, 40, 4, 3)


def test_randaugment_has_the_operations_of_torchvision() -> None:
    theirs, picture = v2.RandAugment(), images(1, size=64)[0].permute(2, 0, 1).contiguous()
    picture = F.gaussian_blur(picture, 9)  # photographs are smooth
    mine = augment._randaugment_operations(64, 65)
    assert len(mine) == len(theirs._AUGMENTATION_SPACE)
    for operation, (name, (magnitudes, signed)) in zip(mine, theirs._AUGMENTATION_SPACE.items(), strict=True):
        values = magnitudes(31, 64, 65)
        value = 0.0 if values is None else float(values[9])
        for sign in (1, -1):
            expected = theirs._apply_image_or_video_transform(
                picture,
                name,
                sign * value if signed else value,
                interpolation=v2.InterpolationMode.NEAREST,
                fill={torch.Tensor: None},
            )
            difference = (operation(picture, sign * 9 / 30).int() - expected.int()).abs()
            assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02, name
    drawn = [augment.apply("randaugment", images(60), 0, view, np.arange(60)) for view in range(2)]
    assert not torch.equal(*drawn) and (drawn[0] != images(60)).any()


def test_jitter_changes_four_properties_in_a_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = images(1)[0].permute(2, 0, 1)

    def bits(seed: int, purpose: int, view: int, samples: np.ndarray, block: int = 0) -> np.ndarray:  # type: ignore[type-arg]
        words = [0xC0000000] * 4 if block == 0 else [3, 1, 2, 0]  # the middle of the upper half; the order
        return np.repeat(np.array(words, np.uint32)[:, None], len(samples), axis=1)

    monkeypatch.setattr(augment, "random_bits", bits)
    expected = F.adjust_brightness(
        F.adjust_saturation(F.adjust_contrast(F.adjust_hue(picture, 0.05), 1.2), 1.2), 1.2
    )
    found = augment.apply("jitter", images(1), 0, 0, np.arange(1))[0].permute(2, 0, 1)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_cutmix_puts_a_box_of_the_partner_into_the_image() -> None:
    data, pool = images(40, size=20), np.arange(0, 40, 3)

    def take(numbers: np.ndarray) -> torch.Tensor:  # type: ignore[type-arg]
        return data[torch.from_numpy(numbers)]

    found = augment.make_view("flip-cutmix", take, 9, 4, np.arange(25, 35), pool)
    mixed = augment.mixing("flip-cutmix", 9, 4, np.arange(25, 35), pool, (20, 21))
    assert mixed is not None
    for index, sample in enumerate(range(25, 35)):
        own, other = (
            augment.apply("flip", take(np.array([n])), 9, 4, np.array([n]))[0]
            for n in (sample, mixed.partners[index])
        )
        same = (found[index] == own).all(2)
        ys, xs = np.nonzero(~same.numpy())
        if len(ys) and mixed.partners[index] != sample:
            top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
            assert torch.equal(found[index, top:bottom, left:right], other[top:bottom, left:right])
            assert mixed.shares[index] == pytest.approx(1 - (bottom - top) * (right - left) / 420)
    shares = augment.mixing("cutmix", 1, 0, np.arange(5000), pool, (20, 21)).shares
    assert 0 <= shares.min() < 0.3 and shares.max() == 1 and 0.55 < shares.mean() < 0.75
